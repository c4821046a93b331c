"""Plain records that cross files and processes: one JSON object a line, appended, never rewritten.

A killed writer leaves at most one torn last line. Readers skip it, and the next writer starts on a fresh line.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
import time
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from encdec.errors import RunDirectoryError

Record = TypeVar("Record")
BYTES_OF_AN_END = 1 << 16
"""Read from the end of a file to find its last record."""


class JsonLinesWriter:
    """Appends records to one file; one writer per file. A line is handed to the kernel as one write.

    Args:
        path: the file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")
        self._torn = False

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record`` as one line.

        Raises:
            OSError: it could not be written, or only a part of it, after which the next line is a fresh one.
        """
        line = b"\n" * self._torn + json.dumps(record).encode() + b"\n"
        self._torn = True
        if os.write(self._descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False

    def sync(self) -> None:
        """Make durable what has been appended, and seen by other machines where the file lies on a network.

        Raises:
            OSError: storage did not take it.
        """
        os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> JsonLinesWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file; a missing file has none, a torn line is skipped."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:  # line by line: the steps of a long run are hundreds of megabytes
        yield from records_of(stream)


def read_ends(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The first and the last record of a JSON-lines file, however long it is; None where there is none."""
    try:
        with path.open("rb") as stream:
            first = next(records_of(stream), None)
            stream.seek(-min(BYTES_OF_AN_END, os.fstat(stream.fileno()).st_size), os.SEEK_END)
            return first, next(records_of(reversed(stream.read().splitlines())), None)
    except FileNotFoundError:
        return None, None


def read_newest(path: Path, nbytes: int) -> Iterator[dict[str, Any]]:
    """Yield the records of the last ``nbytes`` bytes of a JSON-lines file, oldest first; a missing file has none."""
    try:
        with path.open("rb") as stream:
            stream.seek(-min(nbytes, os.fstat(stream.fileno()).st_size), os.SEEK_END)
            content = stream.read()
    except FileNotFoundError:
        return
    yield from records_of(content.splitlines())


def records_of(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among ``lines``; a torn line is skipped."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    """Made once a kind: that takes longer than reading a record."""
    return TypeAdapter(cast("type[Any]", kind))


def read_record(path: Path, kind: type[Record]) -> Record:
    """The record that the JSON file ``path`` holds; keys of later versions are passed over.

    Raises:
        RunDirectoryError: unreadable, or it does not hold a ``kind``.
    """
    try:
        return cast("Record", _adapter(cast("Hashable", kind)).validate_json(path.read_bytes()))
    except OSError as error:
        problem = str(error.strerror)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = " ".join([*map(str, first["loc"]), first["msg"].lower()])
    raise RunDirectoryError(
        "The files of a run directory must be whole",
        found=f"{path} ({problem})",
        remedy="Restore it from a copy; or, if nothing of the run is running, delete it: the run then goes on from its "
        "newest valid checkpoint",
    )


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one optimizer step did, over all ranks."""

    step: int
    """Optimizer steps done, this one included; the first step of a phase is 1."""
    loss: float
    """Mean cross-entropy over the global batch's target tokens, nats."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    tokens_seen: int
    """Raw corpus tokens consumed since the phase began (no padding, no sentinels)."""
    tokens_per_second: float
    """Raw corpus tokens per second of this step, all ranks together."""
    step_seconds: float
    data_seconds: float
    """Part of ``step_seconds`` that rank 0 waited for data."""
    samples_consumed: int
    memory_gb: float
    """Resident memory of rank 0's process, or allocated GPU memory where there is a GPU."""
    attempt: int
    restart: int
    """In-place restarts of this attempt so far."""
    aux_loss: float | None = None
    """Load-balancing loss of a mixture of experts, 1 where all experts are used alike; None, and not in the record,
    without experts."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        if self.aux_loss is None:
            del values["aux_loss"]
        return values


STEP_FIELDS = frozenset(field.name for field in fields(StepRecord)) - {"aux_loss"}


def is_step(record: Any) -> bool:
    """Whether a parsed line is a whole step record; an integer beyond all floats is no measurement."""
    return (
        isinstance(record, dict)
        and record.keys() >= STEP_FIELDS
        and all(
            isinstance(record[name], float)
            or (isinstance(record[name], int) and abs(record[name]) <= sys.float_info.max)
            for name in STEP_FIELDS
        )
    )


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the step records of a file; what is no whole one is skipped."""
    return filter(is_step, read_json_lines(path))


START_UP = "start_up"
"""Kind of the events that tell a start's parts apart: ``done`` (launch, imports, rendezvous or load) and ``restart``,
the restarts in place before it.
"""


def read_last_steps(path: Path, count: int) -> list[dict[str, Any]]:
    """At most ``count`` step records from the end of a file, oldest first; fewer where its end holds fewer."""
    return list(filter(is_step, read_newest(path, BYTES_OF_AN_END)))[-count:]


def event(kind: str, **facts: Any) -> dict[str, Any]:
    """One entry of the ledger: its kind, the time in seconds since the epoch, and the facts."""
    return {"event": kind, "time": time.time(), **facts}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended: ``attempts/<n>/outcome.json``."""

    cause: str
    """complete | signalled | stop_requested | gate | refused | crash | bad_node"""
    exit_code: int
    step: int
    """Last step done."""
    checkpoint: str | None
    """Name of the last checkpoint committed by this attempt."""
    message: str
    """One paragraph for a person."""
    restarts: int = 0
    """Times the ranks were started again in place."""
    checkpoint_verified: bool = False
    """Whether the last checkpoint was read back and all its digests matched."""
    first_loss: float | None = None
    """Mean over the phase's first steps, nats."""
    last_loss: float | None = None
    """Mean over the last steps, nats."""
    bad_node: str | None = None
    """The node on which a rank died first again and again."""
    time: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What rank 0 says of the end of its work: ``attempts/<n>/result.json``. The agent makes it an Outcome."""

    cause: str
    """complete | signalled | stop_requested | gate"""
    step: int
    checkpoint: str | None
    checkpoint_verified: bool
    first_loss: float | None
    last_loss: float | None
    message: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """What a rank that refused to run told its user: ``attempts/<n>/error.json``."""

    message: str
    exit_code: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ProcessRecord:
    """Which process runs an attempt: ``attempts/<n>/process.json``."""

    host: str
    pid: int
    created: float
    """Seconds since the epoch; a pid alone can be used again."""
    job: str | None = None
    """Slurm job that the process belongs to."""
    start: str | None = None
    """Which start of that job: ``<job>.<restart count>.<step>``."""
    endpoint: str | None = None
    """host:port where the nodes meet."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """The newest submission of a run to Slurm: ``job.json``."""

    submission: str
    """Random; part of the job's comment, by which a job is found whose id never reached us."""
    job: str | None
    """Job id; None while sbatch has not answered."""
    submitted: float
    """Seconds since the epoch."""
    attempts_before: int = 0
    """Attempts of the run before this submission: they count in no limit any more."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ContinuationRecord:
    """Which job runs a run, and which one waits for its end: ``continuation.json``."""

    job: str
    successor: str | None = None
    cancelled: bool = False
    """Whether the job saw that a user cancelled it: nothing goes on."""
    excluded: str | None = None
    """Nodes that later jobs of the run keep away from, as sbatch's --exclude takes them."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
