"""What a run directory says about its run, however it was run: losses, gradient norms, seconds, the last checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encdec.files import RunPaths
from encdec.gates import Evidence, Measurement
from encdec.records import read_json_lines, read_steps
from encdec.training.state import LossHistory

QUICK_STEPS = 100
"""Steps between looks at the QUICK gates."""


@dataclass(frozen=True)
class RunFacts:
    """A run's step records, each step once: that of the newest attempt counts."""

    steps: Mapping[int, Mapping[str, Any]]
    total_steps: int
    """Step at which the run is complete."""
    closed: tuple[Evidence, ...] = ()
    """The gates that ended training in its midst, as the newest attempt's ledger has them."""

    @classmethod
    def read(cls, paths: RunPaths, total_steps: int) -> RunFacts:
        """From the records of all attempts."""
        numbers = paths.attempt_numbers()
        steps = {record["step"]: record for n in numbers for record in read_steps(paths.attempt(n).steps)}
        return cls(dict(sorted(steps.items())), total_steps, closed_in(paths))

    @property
    def last_step(self) -> int:
        """0 before the first."""
        return max(self.steps, default=0)

    @property
    def seconds(self) -> float:
        """Spent in the steps that count."""
        return sum(record["step_seconds"] for record in self.steps.values())

    @property
    def losses(self) -> LossHistory:
        """As the trainer keeps it."""
        history = LossHistory(self.total_steps)
        for record in self.steps.values():
            history.add(record["loss"])
        return history

    @property
    def final_loss(self) -> float:
        """Mean of the last steps, nats; nan before the first."""
        return self.losses.last_mean()

    def measured(self) -> dict[str, Measurement]:
        """What the records measure, for gates; nothing before the first step."""
        if not self.steps:
            return {}
        history, window = self.losses, self.losses.window
        last = f"mean of the last {min(window, len(self.steps))} training steps, step {self.last_step}"
        norms = [record["grad_norm"] for record in list(self.steps.values())[-window:]]
        fall = history.first_mean - history.last_mean()
        return {
            "loss": Measurement(history.last_mean(), last),
            "grad_norm": Measurement(sum(norms) / len(norms), last + ", before clipping"),
            "loss_decrease": Measurement(fall, "mean of the first training steps minus mean of the last"),
        }

    def not_finite(self) -> int:
        """Steps whose loss or gradient norm is no finite number."""
        return sum(
            not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])) for record in self.steps.values()
        )

    def quick_looks(self) -> Iterator[tuple[int, dict[str, Measurement]]]:
        """(step, what QUICK judges) at every QUICK_STEPS, and at the last step."""
        for step, record in self.steps.items():
            if step % QUICK_STEPS == 0 or step == self.last_step:
                yield step, quick_measurements(step, record["loss"], record["grad_norm"])


def closed_in(paths: RunPaths) -> tuple[Evidence, ...]:
    """Of the newest attempt; empty where no gate ended its training."""
    number = paths.newest_attempt()
    ledger = [] if number is None else list(read_json_lines(paths.attempt(number).events("rank-0")))
    said = [record for record in ledger if record.get("event") == "gate_not_passed"]
    return tuple(Evidence(**item) for item in said[-1]["evidence"]) if said else ()


def quick_measurements(step: int, loss: float, grad_norm: float) -> dict[str, Measurement]:
    """What QUICK judges at a training step."""
    bad = sum(not math.isfinite(value) for value in (loss, grad_norm))
    source = f"training step {step}"
    return {"loss": Measurement(loss, source), "nan_count": Measurement(bad, f"loss and gradient norm, {source}")}


def newest_attempt_says(paths: RunPaths) -> str:
    """Why the newest attempt ended, in its own words; empty where it left none."""
    number = paths.newest_attempt()
    if number is None:
        return ""
    attempt = paths.attempt(number)
    said = (_message_in(path) for path in (attempt.outcome, attempt.error, attempt.result))
    return next(filter(None, said), "")


def _message_in(path: Path) -> str:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or its writer was killed
        return ""
    return str(record.get("message", "")) if isinstance(record, dict) else ""
