"""From the trainer to a tracker's process: a message of one line, written if the pipe has room and else dropped.

Messages, one JSON object a line, each with ``step``: first ``{begin}``, the first step that will be told, then
``{scalars}``, ``{kind, words, warn}``, and ``{rewind}``: what was told of later steps is void. The end of the pipe is
the end of the attempt; the process then flushes and ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import encdec
from encdec.checkpoints import Saved
from encdec.files import RunPaths
from encdec.records import StepRecord
from encdec.training.observers import Observer, in_words

log = logging.getLogger("encdec.train")
BYTES_OF_A_MESSAGE = 4096
"""PIPE_BUF: up to here a pipe takes a message whole or not at all (pipe(7))."""
BYTES_THAT_WAIT = 1 << 20
"""In the pipe, for a tracker that is slow: some thousand logged steps."""
CHARACTERS_OF_A_TEXT = 2000
SECONDS_TO_FLUSH = 15.0
"""That an attempt's end waits for a tracker."""
SECONDS_TO_FLUSH_HURRIED = 3.0
"""The same, where a cluster is about to kill the attempt; it has saved before."""
FAILED = 1
"""Exit code of a process that has said why it ended."""
OWN_CODE = str(Path(encdec.__path__[0]).parent)
DEAF_TO = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
"""What a cluster or a terminal sends to all processes of a job: the tracker's ends with its input."""


class TrackerObserver(Observer):
    """Tells a tracker of every ``logging_steps``-th step, of evaluations, saves, alerts and events.

    Its process starts with the first step, so a start is not slower for it. Whatever happens to it is one warning.

    Args:
        name: of the tracker.
        command: starts its process.
        logging_steps: steps between points.
        total_steps: the last step, told in any case.
        samples_per_epoch: in the training split.
        step_seconds_at_peak: of a step at the GPUs' peak, for the model FLOPs utilization; None: it is not known.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        logging_steps: int,
        total_steps: int,
        samples_per_epoch: int,
        step_seconds_at_peak: float | None = None,
    ) -> None:
        self._name, self._command = name, list(command)
        self._every, self._total, self._samples = logging_steps, total_steps, samples_per_epoch
        self._at_peak = step_seconds_at_peak
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        self._lost = False
        self._dropped = 0
        self._patience = SECONDS_TO_FLUSH
        self._step = 0
        self._early: list[Mapping[str, Any]] = []

    @classmethod
    def of_run(cls, name: str, paths: RunPaths, **settings: Any) -> TrackerObserver:
        """For the run in a run directory, ``name`` as in ``training.report_to``; ``settings`` as of the class."""
        return cls(name, [sys.executable, "-m", "encdec.training.tracking", name, str(paths.root)], **settings)

    # ---- what is told

    def on_step(self, record: StepRecord, moving_loss: float) -> None:
        step = self._step = record.step
        first = self._process is None
        if first:
            self._begin(step)
        if first or step % self._every == 0 or step == self._total:
            values = scalars(record, moving_loss, record.samples_consumed / self._samples, self._at_peak)
            self._send({"step": step, "scalars": values})

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._send({"step": step, "scalars": {f"eval/{name}": value for name, value in metrics.items()}})

    def on_save(self, saved: Saved) -> None:
        seconds = {"checkpoint/seconds": saved.seconds, "checkpoint/blocking_seconds": saved.blocking_seconds}
        self._send({"step": saved.step, "scalars": seconds})

    def on_save_failed(self, step: int, reason: str, last: str | None) -> None:
        self._text(step, "checkpoint/failed", f"{reason}; the newest is {last}", warn=True)

    def on_alert(self, alert: Mapping[str, Any]) -> None:
        self._text(alert["step"], f"alert/{alert['type']}", alert["message"], warn=True)

    def on_event(self, kind: str, facts: Mapping[str, Any]) -> None:
        if kind == "rolled_back":
            self._send({"step": facts["to_step"], "rewind": True})
        self._text(facts.get("step", self._step), f"events/{kind}", in_words(kind, facts), warn=True)

    def on_end(self, ending: Mapping[str, Any]) -> None:
        if ending["cause"] == "signalled":
            self._patience = SECONDS_TO_FLUSH_HURRIED

    def close(self) -> None:
        """Have the process flush and end; one that takes too long is ended."""
        if self._early:  # no step was done, and yet there is something to tell
            self._begin(max(message["step"] for message in self._early) + 1)
        if self._process is None:
            return
        os.close(self._pipe)
        try:
            self._process.wait(self._patience)
        except subprocess.TimeoutExpired:
            log.warning("%s has not taken everything within %.0f s: the rest is left out", self._name, self._patience)
            self._process.kill()
            self._process.wait()

    # ---- how

    def _text(self, step: int, kind: str, words: str, *, warn: bool) -> None:
        self._send({"step": step, "kind": kind, "words": words[:CHARACTERS_OF_A_TEXT], "warn": warn})

    def _begin(self, step: int) -> None:
        """Start the process; what was to be told before is told now."""
        if self._lost:
            return
        try:
            self._start()
        except OSError as error:
            self._lose(error)
            return
        self._send({"step": step, "begin": True})
        for message in self._early:
            self._send(message)
        self._early.clear()

    def _send(self, message: Mapping[str, Any]) -> None:
        """Never waits and never raises."""
        if self._lost:
            return
        if self._process is None:
            self._early.append(message)
            return
        line = json.dumps(message).encode() + b"\n"
        if len(line) > BYTES_OF_A_MESSAGE:
            return
        try:
            os.write(self._pipe, line)
        except BlockingIOError:
            self._dropped += 1
            if self._dropped == 1:
                log.warning("%s is slow, and is told less: training does not wait for it", self._name)
        except OSError as error:  # its process has ended
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self._lost = True
        if self._process is None or self._process.poll() != FAILED:  # then it has said why itself
            log.warning("%s is told nothing more, training goes on: %s", self._name, error.strerror)

    def _start(self) -> None:
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ours, False)
        path = os.pathsep.join(filter(None, [OWN_CODE, os.environ.get("PYTHONPATH")]))
        with contextlib.suppress(OSError):  # a user may have a limit on the size of pipes
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, BYTES_THAT_WAIT)
        try:
            with _signals_blocked():
                self._process = subprocess.Popen(
                    self._command, stdin=theirs, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}
                )
        except OSError:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._pipe = ours


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started meanwhile never sees DEAF_TO, nor does what it starts itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def scalars(
    record: StepRecord, moving_loss: float, epoch: float, step_seconds_at_peak: float | None
) -> dict[str, float]:
    """A step record under the names that trackers show; what is no number, or not known, is left out."""
    seconds = record.step_seconds or math.nan
    values = {
        "train/loss": record.loss,
        "train/loss_50_step_mean": moving_loss,
        "train/learning_rate": record.learning_rate,
        "train/aux_loss": math.nan if record.aux_loss is None else record.aux_loss,
        "train/grad_norm": record.grad_norm,
        "train/tokens_seen": record.tokens_seen,
        "train/epoch": epoch,
        "throughput/tokens_per_second": record.tokens_per_second,
        "throughput/data_wait_share": record.data_seconds / seconds,
        "throughput/mfu": math.nan if step_seconds_at_peak is None else step_seconds_at_peak / seconds,
        "memory/gb": record.memory_gb,
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}
