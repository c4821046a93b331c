"""When a checkpoint is made, and what becomes of one that is written while training goes on.

Ranks act at the same step boundaries without a word of their own: that any rank still writes, and that rank 0's clock
says a checkpoint is due, travels with the reduction that each step does anyway. Observers are told on the main thread.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from encdec import distributed
from encdec.checkpoints import CheckpointManager, Saved
from encdec.estimates import checkpoint_interval_seconds
from encdec.training import storage
from encdec.training.config import FullConfig, TrainingConfig
from encdec.training.observers import Observer
from encdec.training.schedule import Schedule

log = logging.getLogger("encdec.train")
FIRST_GUESS_SECONDS = 1.0
"""For which training stands still at a save, before one has been measured."""
SECONDS_TO_LAND = 30.0
"""Left to a checkpoint that is being written when training ends by an error."""


def averaged(training: TrainingConfig) -> int:
    """How many checkpoints the average at the end takes: none, or two or more."""
    return training.average_last if training.average_last >= 2 else 0


def averaged_from(training: TrainingConfig, total_steps: int) -> int:
    """First step that the average at the end can need; 0 where training may stop early, at any step."""
    return 0 if training.early_stopping_enabled else max(0, total_steps - training.average_last * training.save_steps)


def kept_for_roll_back(training: TrainingConfig) -> int:
    """How many of the newest scheduled checkpoints a run may go back to: one must be older than any divergence."""
    if not training.max_rollbacks:
        return 0
    longest = max(training.loss_spike_patience, training.grad_spike_patience, training.gate_steps)
    return 1 + math.ceil(longest / training.save_steps)


class Standing(NamedTuple):
    """How saving stands: seen by one rank, or by any of them once the ranks have agreed."""

    writing: bool
    """A checkpoint is being written."""
    due: bool
    """The clock says that one should be made (``training.save_every: auto``)."""


class Saving:
    """Decides when, keeps the policy for failures, tells the observers.

    Args:
        checkpoints: where they go.
        config: its intervals and policies are obeyed.
        total_steps: step at which training is complete.
        observers: told on rank 0.
    """

    def __init__(
        self, checkpoints: CheckpointManager, config: FullConfig, total_steps: int, observers: list[Observer]
    ) -> None:
        self._checkpoints, self._training, self._total_steps = checkpoints, config.training, total_steps
        self._mean_time_to_interrupt = 3600 * config.infra.mean_time_to_interrupt_hours
        self._observers = observers
        self._newest_began = time.monotonic()
        self._newest_metrics: dict[str, float] = {}
        self._measured: Saved | None = None
        self.last: str | None = None
        """The checkpoint to go on from: the last committed, or the one that this run went on from."""

    # ---- when

    def is_scheduled(self, step: int) -> bool:
        """Whether every run like this one has a checkpoint of ``step``, whatever befalls it and whatever the clock."""
        return step >= self._total_steps or step % self._training.save_steps == 0

    def look(self) -> Standing:
        """How saving stands on this rank.

        Raises:
            Exception: the thread that writes has died of an error that only this rank knows.
        """
        flying = self._checkpoints.flying
        if flying and flying.crashed:
            self._checkpoints.wait()
        return Standing(writing=bool(flying and flying.writing), due=self._is_due())

    def _is_due(self) -> bool:
        if self._training.save_every != "auto" or distributed.rank() != 0:
            return False
        return time.monotonic() - self._newest_began >= self.interval_seconds()

    def interval_seconds(self) -> float:
        """Between two checkpoints where the clock decides: the optimum for what the last one took."""
        blocking, total = FIRST_GUESS_SECONDS, FIRST_GUESS_SECONDS
        if self._measured:
            blocking, total = self._measured.blocking_seconds, self._measured.seconds
        return checkpoint_interval_seconds(blocking, total, self._mean_time_to_interrupt)

    # ---- do

    def save(
        self, model: nn.Module, optimizer: Optimizer, schedule: Schedule, step: int, metrics: dict[str, float],
        extra_state: dict[str, Any], *, scheduled: bool, goes_on: bool,
    ) -> None:  # fmt: skip
        """Commit a checkpoint of ``step``, or begin to.

        Args:
            scheduled: every run like this one has it.
            goes_on: training goes on after it: beside it, and without it, where the configuration lets it.

        Raises:
            OSError: it could not be written, and that ends training.
        """
        landed = self.land()
        if landed and landed.step == step and metrics == self._newest_metrics:
            return  # it was on its way already
        self._newest_began, self._newest_metrics = time.monotonic(), metrics
        began, background = time.perf_counter(), goes_on and self._training.async_save
        try:
            name = self._checkpoints.save(
                model, optimizer, schedule, step, metrics,
                extra_state=extra_state, scheduled=scheduled, blocking=not background,
            )  # fmt: skip
        except OSError as error:
            self._pass_over(step, error, goes_on)
            return
        if not background:
            seconds = time.perf_counter() - began
            self._tell(Saved(step, name, seconds, seconds))

    def land(self) -> Saved | None:
        """Wait for the checkpoint in the background, if there is one, and tell of it; None where none was committed.

        Raises:
            OSError: it could not be written, and that ends training; on every rank.
            FencedError: a newer attempt exists.
        """
        flying = self._checkpoints.flying
        if flying is None:
            return None
        try:
            saved = self._checkpoints.wait()
        except OSError as error:
            self._pass_over(flying.step, error, goes_on=True)
            return None
        if saved:
            self._tell(saved)
        return saved

    def abandon(self) -> None:
        """Training ends by an error: let the checkpoint that is being written come to its end, but not for ever."""
        flying = self._checkpoints.flying
        if flying is None:
            return
        try:
            if saved := self._checkpoints.wait(SECONDS_TO_LAND):
                self._tell(saved)
        except Exception as error:  # the error that ends training is the one to be raised
            log.warning("the checkpoint of step %d is lost: %s", flying.step, error)

    def _tell(self, saved: Saved) -> None:
        self.last, self._measured = saved.checkpoint_id, saved
        for observer in self._observers:
            observer.on_save(saved)

    def _pass_over(self, step: int, error: OSError, goes_on: bool) -> None:
        """Tell of a save that failed; go on without it where that is allowed and an earlier one exists."""
        allowed = goes_on and self._training.on_save_failure == "continue" and error.errno in storage.MENDABLE
        ends = not (allowed and self.last)
        reason = f"{error.strerror} at {error.filename or self._checkpoints.output_dir}"
        with contextlib.suppress(OSError) if ends else contextlib.nullcontext():  # the same disk may hold the ledger
            for observer in self._observers:
                observer.on_save_failed(step, reason, self.last)
        if ends:
            raise error
