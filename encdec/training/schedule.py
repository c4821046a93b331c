"""The learning rate as a pure function of the step: linear warm-up, then decay to ``min_lr_ratio`` of the peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from encdec.training.config import TrainingConfig


@dataclass(kw_only=True)
class Schedule:
    """Sets the learning rate of every parameter group. Depends on the step alone, so on no world size.

    Args:
        peak: learning rate after warm-up.
        warmup_steps: steps of the ramp; its first step already has peak / warmup_steps, never zero.
        total_steps: step at which the decay ends.
        min_ratio: final over peak.
        shape: cosine | linear | constant.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    min_ratio: float
    shape: str
    step: int = 0
    """Steps done."""
    factor: float = 1.0
    """What all rates are multiplied by: below 1 once a run has been rolled back."""

    @classmethod
    def from_config(cls, training: TrainingConfig, *, warmup_steps: int, total_steps: int) -> Schedule:
        return cls(
            peak=training.learning_rate,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            min_ratio=training.min_lr_ratio,
            shape=training.lr_scheduler_type,
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step that follows ``step`` finished ones."""
        return self.factor * self._planned(step)

    def _planned(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        remaining = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * remaining)

    def apply(self, optimizer: Optimizer) -> float:
        """Set the coming step's learning rate and count the step; returns the rate."""
        rate = self.learning_rate(self.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.step += 1
        return rate

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step} | ({} if self.factor == 1.0 else {"factor": self.factor})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.factor = state["step"], state.get("factor", 1.0)
