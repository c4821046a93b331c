"""Files that are whole or absent, and the one object that knows every path of a run directory.

Write to a temporary sibling, fsync, rename, fsync the folder (POSIX rename(2) is atomic within a file system).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def fsync_directory(path: Path) -> None:
    """Make the names inside ``path`` durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of one file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_together(paths: Sequence[Path]) -> None:
    """Make files and folders durable at the same time: a journal takes them in one turn instead of one each.

    Raises:
        OSError: one of them could not be.
    """
    with ThreadPoolExecutor(max_workers=max(1, len(paths))) as pool:
        list(pool.map(lambda path: fsync_directory(path) if path.is_dir() else fsync_file(path), paths))


def fsync_tree(path: Path) -> None:
    """Make every file and folder under ``path`` durable, leaves first."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            fsync_file(Path(folder, name))
        fsync_directory(Path(folder))


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: readers see the old file or the new one, never a part.

    Raises:
        OSError: names a file.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:  # write(2) and fsync(2) know no names
            error.filename = str(path)
        raise
    fsync_directory(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON, two blanks per level, a newline at the end."""
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """A private sibling of ``final`` to fill; on leaving without an error it is synced and renamed to ``final``.

    Raises:
        FileExistsError: ``final`` came into being meanwhile (its content is left alone).
        NotADirectoryError: a part of the path above it is a file.
    """
    final = Path(final)
    try:
        make_parents(final)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(final.parent)) from error
    staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        yield staging
        fsync_tree(staging)
        try:
            os.rename(staging, final)
        except OSError as error:  # a non-empty target gives ENOTEMPTY or EEXIST, depending on the file system
            if final.exists():
                raise FileExistsError(str(final)) from error
            raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync_directory(final.parent)


def make_private(folder: Path) -> None:
    """Make a folder that only its user can enter, whatever the umask: then nobody else reaches what lies in it. One
    that is there already stays as open as its user wants it.

    Raises:
        OSError: it cannot be made.
    """
    make_parents(folder)
    folder.mkdir(mode=0o700, exist_ok=True)


def make_parents(path: Path) -> None:
    """Make the folders above ``path``, which nobody else can write into, whatever the umask.

    Raises:
        OSError: they cannot be made.
    """
    for parent in reversed(path.parents):
        if not parent.is_dir():
            parent.mkdir(mode=0o755, exist_ok=True)


MANIFEST = "manifest.json"
"""In a checkpoint's folder: what it holds, and its digests."""
ACCELERATE_CONFIGS = {
    "fsdp": Path("configs", "accelerate_fsdp2.yaml"),
    "deepspeed": Path("configs", "accelerate_deepspeed.yaml"),
}
"""By ``infra.distributed_type``; beside the packages, in a checkout as in a run's snapshot of it."""


@dataclass(frozen=True)
class AttemptPaths:
    """One attempt's folder: ``attempts/<n>/``."""

    root: Path

    @property
    def steps(self) -> Path:
        return self.root / "steps.jsonl"

    def events(self, writer: str) -> Path:
        """Ledger of one writer: ``node-<k>`` (its agent) or ``rank-0``. One writer per file."""
        return self.root / f"events-{writer}.jsonl"

    def heartbeat(self, node_rank: int) -> Path:
        return self.root / f"heartbeat-{node_rank}"

    def rank_logs(self, node_rank: int) -> Path:
        return self.root / "logs" / f"node-{node_rank}"

    @property
    def outcome(self) -> Path:
        return self.root / "outcome.json"

    @property
    def process(self) -> Path:
        """Which process runs the attempt (a ProcessRecord)."""
        return self.root / "process.json"

    @property
    def result(self) -> Path:
        """What rank 0 says when all its work is done (a RankResult)."""
        return self.root / "result.json"

    @property
    def error(self) -> Path:
        """What a rank that refused to run told its user (a Refusal)."""
        return self.root / "error.json"


@dataclass(frozen=True)
class RunPaths:
    """Every path of a run directory. The directory is the only thing a job reads.

    Args:
        root: the run directory, on storage that all nodes share.
    """

    root: Path

    @property
    def run_yaml(self) -> Path:
        return self.root / "run.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def code(self) -> Path:
        return self.root / "code"

    def accelerate_config(self, engine: str) -> Path:
        """What accelerate launch reads, beside its arguments, for an ``infra.distributed_type``."""
        return self.code / ACCELERATE_CONFIGS[engine]

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def submitit(self) -> Path:
        return self.root / "submitit"

    def batch_host(self, job: str) -> Path:
        """Written by the first node of a Slurm job: it sees the run directory."""
        return self.submitit / f"host-{job}"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    def attempt(self, number: int) -> AttemptPaths:
        return AttemptPaths(self.attempts / str(number))

    def announcement(self, start: str) -> Path:
        """What the head node of a start of a Slurm job tells the other nodes."""
        return self.attempts / f"start-{start}.json"

    def announcements(self) -> list[Path]:
        """Those of all starts so far."""
        return sorted(self.attempts.glob("start-*.json"))

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The model without its weights: config, generation config, tokenizer. What an export needs besides them."""
        return self.root / "model"

    @property
    def origin(self) -> Path:
        """Which weights the run has begun from, where its configuration does not say it all (an Origin)."""
        return self.root / "origin.json"

    @property
    def gates(self) -> Path:
        return self.root / "gates"

    @property
    def control(self) -> Path:
        return self.root / "control"

    @property
    def save_request(self) -> Path:
        """Touched by a person or a program: save at the next step boundary and go on."""
        return self.control / "SAVE"

    @property
    def stop_request(self) -> Path:
        """Touched by a person or a program: save at the next step boundary and stop."""
        return self.control / "STOP"

    @property
    def lock(self) -> Path:
        """Held (flock) by the command that starts an attempt, until the attempt can be seen."""
        return self.root / "lock"

    @property
    def job(self) -> Path:
        """The newest submission to Slurm (a JobRecord; the launcher writes it, before sbatch and after)."""
        return self.root / "job.json"

    @property
    def continuation(self) -> Path:
        """Which job runs the run now, and which waits for its end (a ContinuationRecord; its head task writes it)."""
        return self.root / "continuation.json"

    @property
    def launch(self) -> Path:
        """How the run is launched and continued (a LaunchOptions)."""
        return self.root / "launch.json"

    @property
    def sbatch(self) -> Path:
        """The script that Slurm got, whole: a successor gets the same."""
        return self.root / "submit.sbatch"

    @property
    def sanity_report(self) -> Path:
        return self.root / "sanity_check.json"

    def make(self) -> None:
        """Make the directory, which only its user can enter, and the folders in it.

        Raises:
            OSError: not writable.
        """
        make_private(self.root)
        for folder in (self.attempts, self.checkpoints, self.gates, self.control):
            folder.mkdir(parents=True, exist_ok=True)

    def attempt_numbers(self) -> list[int]:
        """Numbers of the attempts claimed so far, ascending."""
        if not self.attempts.is_dir():
            return []
        with os.scandir(self.attempts) as entries:
            return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())

    def claim_attempt(self) -> int:
        """Claim the next attempt number. Atomic: mkdir(2) succeeds for exactly one claimant of a number."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(name) for name in os.listdir(self.attempts) if name.isdecimal()]  # stray files, too
            number = max(taken, default=-1) + 1
            try:
                self.attempt(number).root.mkdir(mode=0o700)
                return number
            except FileExistsError:
                continue

    def newest_checkpoint(self) -> Path | None:
        """The committed checkpoint of the highest step; None where there is none."""
        steps = {path.name.removeprefix("step-"): path for path in self.checkpoints.glob("step-*")}
        numbers = [step for step in steps if step.isdecimal()]
        return steps[max(numbers, key=int)] if numbers else None

    def newest_attempt(self) -> int | None:
        """Number of the newest attempt, or None before the first. An older one is fenced off."""
        return max(self.attempt_numbers(), default=None)
