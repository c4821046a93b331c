"""One agent per node: rendezvous, rank processes, signals, heartbeats. Torch elastic, used as a library, or Accelerate,
which ends in torch elastic too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from encdec.files import AttemptPaths
from encdec.records import START_UP, JsonLinesWriter, RankResult, Refusal, event, read_record, read_steps
from launchers.nodes.forkserver import early_signals, listen_early
from launchers.nodes.outcomes import DEADLINE, FORWARDED_AS, WARNINGS, AttemptFacts
from launchers.nodes.parts import NodeJob, RankGroup, Watcher

FORWARDED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECONDS_BETWEEN_FORWARDS = 1.0
SECONDS_BETWEEN_HEARTBEATS = 10.0


class NodeAgent:
    """Runs the ranks of one node to their end, starting them again in place when one dies.

    Args:
        job: what to run.
        paths: the attempt's folder.
        deadline: asked at every look: whether the time is up although no signal says so.
        warned: called once a kind of warning, after the ranks.
    """

    def __init__(
        self,
        job: NodeJob,
        paths: AttemptPaths,
        *,
        deadline: Callable[[], bool] = lambda: False,
        warned: Callable[[str, JsonLinesWriter], None] = lambda signal_name, ledger: None,
    ) -> None:
        self.job, self.paths = job, paths
        self._deadline, self._warned = deadline, warned
        self._told_of: set[str] = set()
        self.failures: list[str] = []
        self.stop_signal: str | None = None
        self._events = JsonLinesWriter(paths.events(f"node-{job.node_rank}"))
        self._group: RankGroup | None = None
        self._next_forward = self._next_heartbeat = 0.0

    def run(self) -> AttemptFacts:
        """Start the ranks and supervise them; returns what is known when they have ended."""
        prepare_environment()
        for number in FORWARDED:
            signal.signal(number, self._on_signal)
        self.stop_signal = early_signals[-1] if early_signals else None
        early_signals.clear()
        supervise = choose_supervisor(self.job)  # before signals come in: threads that it starts keep their mask
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        self._tell("agent_ready", node=self.job.node_rank, launcher=self.job.launcher)
        try:
            ended_well = supervise(self, self.paths.rank_logs(self.job.node_rank))
        finally:
            # what asks to save is early from here on: this process may become the job of the next phase
            listen_early(for_exec=True)
            self._events.close()
        result = read_record(self.paths.result, RankResult) if ended_well and self.paths.result.is_file() else None
        refusal = read_record(self.paths.error, Refusal) if self.paths.error.is_file() else None
        restarts = self._group.restarts if self._group else 0
        return AttemptFacts(
            result=result,
            refusal=refusal,
            failures=self.failures,
            restarts=restarts,
            last_step=self.last_step(),
            stop_signal=self.stop_signal,
        )

    # ---- what the group of ranks asks and tells (launchers.nodes.parts.Watcher)

    def adopt(self, group: RankGroup) -> None:
        self._group = group

    def may_restart(self) -> bool:
        """Not after a stop was asked for, nor after a rank refused to run."""
        return self.stop_signal is None and not self.paths.error.exists()

    def last_step(self) -> int:
        """Highest step any rank 0 of this attempt has recorded."""
        return max((record["step"] for record in read_steps(self.paths.steps)), default=0)

    def rank_failed(self, rank: int, exit_code: int, restart: int) -> None:
        name = f" by {signal.Signals(-exit_code).name}" if exit_code < 0 else ""
        log = self.paths.rank_logs(self.job.node_rank) / f"rank-{rank}.restart-{restart}.err"
        line = f"rank {rank} ended with exit code {exit_code}{name}, see {log}"
        self.failures.append(line)
        self._tell("rank_failed", detail=line, rank=rank, exit_code=exit_code, restart=restart)
        with told_if_refused():
            self._events.sync()  # the head node judges by it, soon

    def met(self, restart: int) -> None:
        self._tell(START_UP, done="rendezvous", restart=restart)

    def restarting(self, count: int) -> None:
        self._tell("restarting", restart=count)

    def tick(self) -> None:
        now = time.monotonic()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + SECONDS_BETWEEN_HEARTBEATS
            with told_if_refused():
                self.paths.heartbeat(self.job.node_rank).touch()
        if self.stop_signal is None and self._deadline():
            self.stop_signal = DEADLINE
        if self.stop_signal and now >= self._next_forward:
            self._next_forward = now + SECONDS_BETWEEN_FORWARDS  # again and again: a rank may not have listened yet
            self._forward()
        if self.stop_signal in (*WARNINGS, "SIGTERM") and self.stop_signal not in self._told_of:
            self._told_of.add(self.stop_signal)
            with told_if_refused():
                self._warned(self.stop_signal, self._events)

    def _tell(self, kind: str, **facts: Any) -> None:
        """A line in the ledger."""
        with told_if_refused():
            self._events.write(event(kind, **facts))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = signal.Signals(number).name

    def _forward(self) -> None:
        for pid in self._group.pids() if self._group else ():
            try:
                os.kill(pid, signal.Signals[FORWARDED_AS])
            except ProcessLookupError:
                continue


def choose_supervisor(job: NodeJob) -> Callable[[Watcher, Path], bool]:
    """What runs the ranks of a node, their output under a folder: whether all of them ended well. Imports torch: while
    the forkserver imports the rest, where ranks are forks of it.
    """
    if job.launcher == "accelerate":
        from launchers.nodes import accelerated

        return accelerated.supervise
    from launchers.nodes import elastic

    return elastic.supervise


@contextlib.contextmanager
def told_if_refused() -> Iterator[None]:
    """A full disk that refuses a line or a heartbeat must not end the ranks, whose own writes may still fit."""
    try:
        yield
    except OSError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)


def prepare_environment() -> None:
    """Settings that torch elastic reads from the environment."""
    # the store that elastic would share keeps stale keys across restarts: gloo then connects to dead ranks and hangs
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
