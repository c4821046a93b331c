"""Where training stands, as plain values: state, losses, result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from encdec.gates import GateReport

MOVING_WINDOW = 50
"""Steps in the moving mean of the loss."""


@dataclass
class TrainingState:
    """Where training stands. Everything else about the past is in the tensors."""

    global_step: int = 0
    epoch: int = 0
    best_eval_loss: float = math.inf
    total_tokens_seen: int = 0
    samples_consumed: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)
    """The newest evaluation: its ``step`` and its metrics; empty before the first."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the present step; empty where it has not been evaluated."""
        metrics = dict(self.evaluation)
        return metrics if metrics.pop("step", None) == self.global_step else {}

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; the step itself is the checkpoint's."""
        return {
            "epoch": self.epoch,
            "best_eval_loss": self.best_eval_loss if math.isfinite(self.best_eval_loss) else None,
            "tokens_seen": self.total_tokens_seen,
            "samples_consumed": self.samples_consumed,
            "evaluation": self.evaluation,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> TrainingState:
        best = state["best_eval_loss"]
        return cls(
            global_step=state["step"],
            epoch=state["epoch"],
            best_eval_loss=math.inf if best is None else best,
            total_tokens_seen=state["tokens_seen"],
            samples_consumed=state["samples_consumed"],
            evaluation=state.get("evaluation", {}),  # older states lack it: they are evaluated once more
        )


@dataclass(frozen=True)
class TrainResult:
    """How ``train`` ended."""

    cause: str
    """complete | signalled | stop_requested | gate"""
    step: int
    checkpoint: str | None
    first_loss: float
    """Mean over the first steps, nats."""
    last_loss: float
    """Mean over the last steps, nats."""
    message: str
    gates: GateReport | None = None
    """Of a closed gate, the verdicts at that step; else the newest of STANDARD and custom gates; None: none yet."""


class LossHistory:
    """The first and the newest losses: what the moving mean and the phase's verdict need."""

    def __init__(self, total_steps: int) -> None:
        self.window = min(MOVING_WINDOW, max(1, total_steps // 10))
        self.first: list[float] = []
        self.recent: list[float] = []

    def add(self, loss: float) -> None:
        if len(self.first) < self.window:
            self.first.append(loss)
        self.recent = [*self.recent[-(MOVING_WINDOW - 1) :], loss]

    @property
    def first_mean(self) -> float:
        return sum(self.first) / len(self.first) if self.first else math.nan

    def last_mean(self, window: int | None = None) -> float:
        last = self.recent[-(window or self.window) :]
        return sum(last) / len(last) if last else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.recent = list(state["first"]), list(state["recent"])
