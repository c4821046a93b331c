"""W&B and TensorBoard, each as the tracker's process uses it: one curve a run, however many attempts it takes.

Steps that are computed again after a lost attempt, a restart in place or a roll-back are told once: TensorBoard forgets
the earlier ones (``SessionLog.START``, which its readers understand as "what was said from this step on is void"), W&B,
which takes nothing back, keeps them.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from encdec.files import RunPaths, atomic_write_text
from encdec.training.run_config import RunConfig
from encdec.training.tracking.wandb_files import last_step

log = logging.getLogger("encdec.train")
SECONDS_TO_BE_ANSWERED = 30.0
"""By W&B's server, unless WANDB_INIT_TIMEOUT says otherwise; then it is recorded offline."""
SECONDS_FOR_A_PREDECESSOR = 20.0
"""That the process of a rank that has died may take to write down what it was told."""
SECONDS_BETWEEN_FLUSHES = 5
ROWS_TO_TELL_AGAIN = 4096
"""Far more than W&B's process has not written yet."""
STARTS = 4
"""Of W&B's process in one attempt."""
LONGEST_RUN_ID = 64
"""Characters, as W&B allows."""


class Backend(Protocol):
    """A tracker. Whatever it raises ends its part, and nothing else."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves; of one name, steps ascend but for ``rewind``."""

    def text(self, step: int, kind: str, words: str, *, warn: bool) -> None:
        """An alert or an event: ``kind`` such as alert/loss_spike."""

    def rewind(self, step: int) -> None:
        """The steps after ``step`` are computed again, on other data."""

    def close(self) -> None:
        """Flush."""


class TensorBoard:
    """Event files in one folder, one a start.

    Args:
        folder: the run's ``tensorboard/``.
        first_step: the first that will be told; what earlier starts said from there on is void.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._text = Event, Summary, text_pb
        self._start = SessionLog(status=SessionLog.START)
        self._writer = EventFileWriter(str(folder), flush_secs=SECONDS_BETWEEN_FLUSHES)
        self._void_from(first_step)

    def _void_from(self, step: int) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, session_log=self._start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=points)))

    def text(self, step: int, kind: str, words: str, *, warn: bool) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._text(kind, words)))

    def rewind(self, step: int) -> None:
        self._void_from(step + 1)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for all attempts of a run directory; offline where nobody is logged in or no server answers.

    Its id is made once and kept in ``wandb/run-id``. Steps that its files have a row of are not told again: a server
    would drop them, but offline records would overlap when they are uploaded.

    W&B has a process of its own, which no mask protects from a cluster's SIGTERM; it is then started again, and told
    again what its file lacks.

    Args:
        folder: the run's ``wandb/``.
        run: named and described there.
    """

    def __init__(self, folder: Path, run: RunConfig) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._wandb, self._folder, self._config = wandb, folder, run
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(_alone(folder / "lock"))
        self._recent: deque[tuple[int, dict[str, float]]] = deque(maxlen=ROWS_TO_TELL_AGAIN)
        self._mode: Any = os.environ.get("WANDB_MODE")
        self._starts_left = STARTS
        self._open()

    def _open(self) -> None:
        """Start W&B's process and the run; again if the process is ended meanwhile, offline if no server takes it."""
        self._floor = self._last = last_step(self._folder)
        while True:
            try:
                self._run = self._init()
                return
            except Exception as error:  # W&B has no class for what the loss of its process is like
                self._end_service()
                if self._starts_left <= 1:
                    raise
                if not isinstance(error, self._wandb.Error) or self._mode not in (None, "online"):
                    continue
                why = "nobody is logged in" if type(error).__name__ == "UsageError" else type(error).__name__
                log.warning("W&B: %s: recording offline under %s (upload later with wandb sync)", why, self._folder)
                self._mode = "offline"
            finally:
                self._starts_left -= 1

    def _end_service(self) -> None:
        """Wait until W&B's process has ended; it holds the run's id as long as it lives."""
        with contextlib.suppress(Exception):  # it may have ended
            self._wandb.teardown()

    def _init(self) -> Any:
        run, infra = self._config, self._config.config.infra
        return self._wandb.init(
            dir=str(self._folder),
            id=kept_run_id(self._folder / "run-id", run.name),
            resume="allow",
            project=infra.wandb_project,
            entity=infra.wandb_entity,
            name=infra.wandb_run_name or run.name,
            job_type=str(run.phase.phase) if run.phase else "training",
            config=run.to_mapping(),
            mode=self._mode,
            settings=self._wandb.Settings(
                console="off",  # the logs are in the run directory
                disable_git=True,  # code/git.json has it
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", SECONDS_TO_BE_ANSWERED)),
            ),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step <= self._floor:
            return
        self._last = max(step, self._last)  # a checkpoint that was written meanwhile is told of late
        self._recent.append((self._last, dict(values)))
        self._surely(lambda: self._run.log(dict(values), step=self._last), told_again=True)

    def text(self, step: int, kind: str, words: str, *, warn: bool) -> None:
        level = "WARN" if warn else "INFO"
        self._surely(lambda: self._run.alert(kind, f"step {step}: {words}", level=level))

    def rewind(self, step: int) -> None:
        self._floor = self._last

    def close(self) -> None:
        self._surely(lambda: self._run.finish())
        self._end_service()  # which may still write its file's last rows
        self._lock.close()

    def _surely(self, act: Callable[[], object], *, told_again: bool = False) -> None:
        """``act``; if W&B's process has ended meanwhile, once more with a new one that knows the recent rows.

        Args:
            told_again: whether ``act`` is one of these rows.
        """
        try:
            act()
        except Exception:
            if self._starts_left <= 0:
                raise
            floor = self._floor
            self._end_service()
            self._open()
            for step, values in self._recent:
                if step > self._floor:
                    self._last = max(step, self._last)
                    self._run.log(values, step=step)
            self._floor = max(floor, self._floor)
            if not told_again:
                act()


def kept_run_id(file: Path, name: str) -> str:
    """The run's id at W&B, made up once: two run directories are two runs, whatever they are called."""
    if not file.is_file():
        tail = secrets.token_hex(4)
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", name)[: LONGEST_RUN_ID - len(tail) - 1]
        atomic_write_text(file, f"{stem}-{tail}\n")
    return file.read_text(encoding="utf-8").strip()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for the process of an earlier rank, as long as may be expected; one that is cut off is not waited for."""
    deadline = time.monotonic() + SECONDS_FOR_A_PREDECESSOR
    with path.open("w") as lock:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield


def open_backend(name: str, paths: RunPaths, run: RunConfig, first_step: int) -> Backend:
    """The tracker that ``training.report_to`` calls ``name``, for the run in a run directory."""
    if name == "tensorboard":
        return TensorBoard(paths.root / "tensorboard", first_step)
    return WeightsAndBiases(paths.root / "wandb", run)
