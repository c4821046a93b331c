"""Roll-back: a run that diverges returns to its last good checkpoint, skips the data that it met there, and goes on
with a lower learning rate.

The recipe is PaLM's for loss spikes, which restarted from a checkpoint well before the spike and skipped the batches
seen before and during it (Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, section 5.1).

Divergence is, and nothing else is:
    no_nan            a loss or a gradient norm that is no finite number, or weights that are none at a save
    a QUICK gate      that is not passed
    gradient_spikes   as many in a row as would end training (``training.grad_spike_*``)
    loss_spike        ``training.loss_spike_patience`` steps in a row, after warm-up, each of whose losses is above
                      ``training.loss_spike_ratio`` times the mean of the up to 50 losses before that row

A good checkpoint is finite (no other is ever written), scheduled (so that every run like this one has it), and of a
step before the first one that belongs to the divergence.

A decision is written to ``checkpoints/rollbacks.json`` before anything follows from it, and every start reads it there:
a roll-back goes on from its checkpoint by the same path as a killed run does. Checkpoints carry the decisions that they
follow from. A skipped window is an interval of the sample stream, so a checkpoint tells by its step and its data
position alone whether a roll-back has withdrawn it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from encdec import distributed
from encdec.checkpoints import CheckpointInfo, CheckpointManager
from encdec.files import atomic_write_json
from encdec.records import read_record
from encdec.training.config import TrainingConfig

log = logging.getLogger("encdec.train")
FILE = "rollbacks.json"
"""Beside the checkpoints."""


@dataclass(frozen=True)
class Divergence:
    """What training cannot recover from by itself."""

    cause: str
    """no_nan | gradient_spikes | loss_spike | the name of a QUICK gate"""
    step: int
    """Last step done."""
    onset: int
    """First step that belongs to it."""
    samples: int
    """Position in the sample stream after the last batch that was computed, applied or not."""


@dataclass(frozen=True, kw_only=True)
class RollBack:
    """One decision to go back."""

    number: int
    """Of the run's roll-backs, from 1."""
    cause: str
    """That of the divergence."""
    from_step: int
    """Last step done before it."""
    to_step: int
    """Step of the checkpoint that training goes on from."""
    first_sample: int
    """Position in the sample stream from which samples are skipped: the checkpoint's."""
    next_sample: int
    """Position at which training goes on."""
    lr_factor: float
    """What the planned learning rate is multiplied by from then on, earlier roll-backs included."""

    @property
    def facts(self) -> dict[str, Any]:
        """For the ledger."""
        return asdict(self) | {"skipped_samples": self.next_sample - self.first_sample}


def elevated(losses: Sequence[float], ratio: float) -> int:
    """How many of the newest steps belong to a spike: each loss is above ``ratio`` times the mean before them all.

    Args:
        losses: of the newest steps, oldest first; the row is at most half as long.
    """
    if not losses or losses[-1] <= ratio * min(losses):
        return 0
    for row in range(len(losses) // 2, 0, -1):
        before = losses[:-row]
        if min(losses[-row:]) > ratio * sum(before) / len(before):
            return row
    return 0


class Recovery:
    """Finds divergence, decides what to go back to, and remembers it.

    Args:
        training: its ``max_rollbacks``, ``rollback_*`` and ``loss_spike_*`` fields.
        checkpoints: where the decisions lie, and what they are about.
        warmup_steps: steps in which no loss counts as a spike.
        global_batch_size: samples per step.
    """

    def __init__(
        self, training: TrainingConfig, checkpoints: CheckpointManager, *, warmup_steps: int, global_batch_size: int
    ) -> None:
        self._rules, self._checkpoints = training, checkpoints
        self._warmup_steps, self._global_batch_size = warmup_steps, global_batch_size
        self.history: list[RollBack] = []
        self.taken_up: list[RollBack] = []
        """Those of ``history`` that were decided after the checkpoint that was loaded last."""
        checkpoints.withdrawn = self.withdrawn

    # ---- find

    @property
    def possible(self) -> bool:
        """Whether the run may be rolled back once more."""
        return len(self.history) < self._rules.max_rollbacks

    def after_step(self, step: int, samples: int, losses: Sequence[float], fatal_spikes: int) -> Divergence | None:
        """What a step that is done has shown.

        Args:
            losses: of the newest steps, this one last.
            fatal_spikes: gradient spikes in a row, where they would end training.
        """
        if not self.possible:
            return None
        row = elevated(losses, self._rules.loss_spike_ratio)
        if fatal_spikes:
            return Divergence("gradient_spikes", step, step - max(row, fatal_spikes) + 1, samples)
        if row >= self._rules.loss_spike_patience and step - row >= self._warmup_steps:
            return Divergence("loss_spike", step, step - row + 1, samples)
        return None

    def at_gate(self, cause: str, step: int, samples: int, losses: Sequence[float], last_passed: int) -> Divergence:
        """A QUICK gate that passed at ``last_passed`` does not pass after ``step``."""
        row = elevated(losses, self._rules.loss_spike_ratio)
        return Divergence(cause, step, min(last_passed, step - row) + 1, samples)

    def not_finite(self, step: int, samples: int, losses: Sequence[float]) -> Divergence:
        """What was computed after ``step`` is no number."""
        return Divergence("no_nan", step, step - elevated(losses, self._rules.loss_spike_ratio) + 1, samples)

    # ---- decide

    def decide(self, divergence: Divergence) -> RollBack | None:
        """Choose the checkpoint and write the decision down; None where there is no good one, or no leave; collective.

        Raises:
            FencedError: a newer attempt exists: nothing is written.
            OSError: it could not be written.
        """
        if not self.possible:
            return None
        decision = distributed.on_rank_zero(lambda: self._decide(divergence))
        if decision is not None:
            self.history = [*self.history, decision]
        return decision

    def _decide(self, divergence: Divergence) -> RollBack | None:
        good = newest_good(self._checkpoints.own_checkpoints(), divergence)
        if good is None:
            log.warning(
                "not rolled back: no scheduled checkpoint is older than step %d, where the %s began",
                divergence.onset,
                divergence.cause,
            )
            return None
        decision = RollBack(
            number=len(self.history) + 1, cause=divergence.cause, from_step=divergence.step, to_step=good.step,
            first_sample=good.samples_consumed,
            next_sample=divergence.samples + self._rules.rollback_margin_steps * self._global_batch_size,
            lr_factor=self.lr_factor * self._rules.rollback_lr_factor,
        )  # fmt: skip
        self._checkpoints.fence()
        atomic_write_json(self._file, [asdict(item) for item in (*self.history, decision)])
        return decision

    # ---- remember

    @property
    def _file(self) -> Path:
        return self._checkpoints.output_dir / FILE

    def read(self) -> None:
        """Take up what was decided before, by this process or another; collective.

        Raises:
            RunDirectoryError: the file cannot be read, or is not what was written.
        """
        self.history = distributed.on_rank_zero(self._read)

    def _read(self) -> list[RollBack]:
        return read_record(self._file, list[RollBack]) if os.path.lexists(self._file) else []

    def take_up(self, known: Iterable[dict[str, Any]]) -> None:
        """A checkpoint has been loaded that follows from the decisions ``known``.

        Later ones hold as well, unless the checkpoint is of another history than this run's: then its own alone.
        """
        loaded = [RollBack(**decision) for decision in known]
        if self.history[: len(loaded)] != loaded:
            self.history = loaded
        self.taken_up = self.history[len(loaded) :]

    @property
    def lr_factor(self) -> float:
        """What the planned learning rate is multiplied by."""
        return self.history[-1].lr_factor if self.history else 1.0

    def position(self, samples: int) -> int:
        """Where the sample stream goes on after ``samples``, past what is skipped."""
        for decision in self.history:
            if decision.first_sample <= samples < decision.next_sample:
                return self.position(decision.next_sample)
        return samples

    def withdrawn(self, step: int, samples: int) -> bool:
        """Whether a checkpoint of ``step`` at that position of the stream comes from what was rolled back."""
        return any(d.to_step < step and d.first_sample < samples <= d.next_sample for d in self.history)

    def state_dict(self) -> list[dict[str, Any]]:
        return [asdict(decision) for decision in self.history]


def newest_good(infos: Iterable[CheckpointInfo], divergence: Divergence) -> CheckpointInfo | None:
    """The checkpoint to go back to; None where there is none."""
    good = [info for info in infos if info.scheduled and info.step < divergence.onset]
    return max(good, key=lambda info: info.step, default=None)
