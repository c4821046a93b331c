"""Run directories whose every moment is chosen by hand: what launcher, agents and rank 0 would have written then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from encdec.files import RunPaths, atomic_write_json
from encdec.records import JsonLinesWriter, Outcome, ProcessRecord, StepRecord, event

ZERO = 1_750_000_000.0
"""Seconds since the epoch at which a script begins; all its times are seconds after it."""


class ScriptedRun:
    """Writes the records of a run, one attempt after the other.

    Args:
        paths: a run directory with its ``run.yaml`` and folders.
    """

    def __init__(self, paths: RunPaths) -> None:
        self.paths = paths
        self.number = -1
        self.restart = 0

    def submitted(self, at: float) -> None:
        self._append(self.paths.events, "submitted", at, cluster="slurm")

    def attempt(self, began: float, *, job: str = "7") -> None:
        """Claimed by a process that began then."""
        self.number, self.restart = self.paths.claim_attempt(), 0
        process = ProcessRecord(host="n1", pid=1, created=ZERO + began - 0.3, job=job)
        atomic_write_json(self.place.process, process.to_json())
        self.node("claimed", began + 0.2, attempt=self.number, began=ZERO + began)

    def start(
        self, *, ready: float | None, met: float, imports: float, text: float, ranks: float, loaded: float
    ) -> None:
        """When each part of a start of the ranks was done; no ``ready`` where the agent goes on."""
        if ready is not None:
            self.node("agent_ready", ready, node=0)
        self.node("start_up", met, done="rendezvous", restart=self.restart)
        for done, at in (("imports", imports), ("load", text), ("rendezvous", ranks), ("load", loaded)):
            self.rank("start_up", at, done=done, restart=self.restart)

    def steps(
        self, steps: Iterable[int], *, since: float, seconds: float = 1.0, first: float | None = None, **measured: Any
    ) -> float:
        """Steps without a pause, from ``since`` on; returns when the last one was done.

        Args:
            first: seconds of the first of them, where it takes longer.
            measured: loss, grad_norm, ...: a value, or a function of the step.
        """
        now = since
        with JsonLinesWriter(self.place.steps) as writer:
            for count, step in enumerate(steps):
                took = first if first is not None and count == 0 else seconds
                now += took
                values = {name: value(step) if callable(value) else value for name, value in measured.items()}
                writer.write(step_record(step, ZERO + now, took, self.number, self.restart, **values))
        return now

    def saved(self, step: int, at: float, *, blocking: float, seconds: float | None = None) -> None:
        self.rank(
            "saved", at, step=step, checkpoint=f"step-{step}", seconds=seconds or blocking, blocking_seconds=blocking
        )

    def rank_died(self, seen: float, again: float) -> None:
        """A rank is seen dead, and the ranks start again."""
        self.node("rank_failed", seen, detail="rank 1 ended with exit code -9 by SIGKILL", restart=self.restart)
        self.restart += 1
        self.node("restarting", again, restart=self.restart)

    def ended(self, cause: str, at: float, *, step: int, message: str = "", requeued: bool = False) -> None:
        outcome = Outcome(
            cause=cause, exit_code=0, step=step, checkpoint=f"step-{step}", message=message or f"said {cause}",
            restarts=self.restart, time=ZERO + at,
        )  # fmt: skip
        atomic_write_json(self.place.outcome, outcome.to_json())
        if requeued:
            self.node("requeued", at, job="7", detail=None)
        self.node("ended", at, attempt=self.number, cause=cause)

    def alert(self, kind: str, at: float, *, step: int, message: str) -> None:
        self.rank("alert", at, type=kind, step=step, value=9.0, threshold=3.0, message=message)

    def checkpoint(self, step: int) -> None:
        """The folder alone: that a checkpoint is there."""
        (self.paths.checkpoints / f"step-{step}").mkdir(parents=True)

    def node(self, kind: str, at: float, **facts: Any) -> None:
        self._append(self.place.events("node-0"), kind, at, **facts)

    def rank(self, kind: str, at: float, **facts: Any) -> None:
        self._append(self.place.events("rank-0"), kind, at, **facts)

    @property
    def place(self):
        return self.paths.attempt(self.number)

    @staticmethod
    def _append(file: Any, kind: str, at: float, **facts: Any) -> None:
        with JsonLinesWriter(file) as ledger:
            ledger.write({**event(kind, **facts), "time": ZERO + at})


def step_record(step: int, time: float, seconds: float, attempt: int, restart: int, **measured: float) -> dict:
    values = {"loss": 7.0, "grad_norm": 1.0, "learning_rate": 1e-3, "memory_gb": 0.4} | measured
    return StepRecord(
        step=step, tokens_seen=384 * step, tokens_per_second=384 / seconds, step_seconds=seconds, data_seconds=0.0,
        samples_consumed=8 * step, attempt=attempt, restart=restart, time=time, **values,
    ).to_json()  # fmt: skip
