"""Gates: what must have been measured, and how it must compare, before work goes on. Pure, without torch.

A gate judges one metric by name. A metric that nobody measured, or that is no finite number, passes no gate.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args

from encdec.errors import ConfigError

Comparison = Literal["<", "<=", ">", ">="]
COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
NOT_MEASURED = "nobody measured it"


@dataclass(frozen=True)
class Measurement:
    """A value and where it comes from."""

    value: float
    source: str
    """A few words, for the evidence: what was measured, on what, at which step."""


@dataclass(frozen=True)
class Evidence:
    """One gate's verdict, with the fact that it rests on."""

    gate: str
    metric: str
    value: float | None
    """None: nobody measured it."""
    threshold: float
    comparison: str
    """How the value must compare with the threshold."""
    required: bool
    measured: str
    """Where the value comes from."""
    passed: bool

    def line(self) -> str:
        """In words: ``perplexity 1203, must be < 1000``."""
        value = NOT_MEASURED if self.value is None else f"{self.value:.4g}"
        name = self.metric if self.gate == self.metric else f"{self.gate}: {self.metric}"
        return f"{name} {value}, must be {self.comparison} {self.threshold:g}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; JSON has no nan and no infinity, so such a value is null there, named in ``measured``."""
        shown = self.value if self.value is None or math.isfinite(self.value) else None
        measured = self.measured if shown == self.value else f"{self.value}: {self.measured}"
        return {**self.__dict__, "value": shown, "measured": measured}


@dataclass(frozen=True)
class ValidationGate:
    """A bound on one metric.

    Args:
        name: what people call the gate.
        metric_name: what must be measured.
        threshold: the bound, in the metric's unit.
        comparison: how the metric must compare with it: ``<``, ``<=``, ``>`` or ``>=``.
        required: whether work stops if it does not pass; otherwise its verdict is told, no more.
        description: why it is asked for.
    """

    name: str
    metric_name: str
    threshold: float
    comparison: Comparison = "<"
    required: bool = True
    description: str = ""

    def __post_init__(self) -> None:
        if self.comparison not in COMPARE:
            raise ConfigError(
                f"A gate's comparison must be one of {', '.join(get_args(Comparison))}",
                found=f"{self.comparison!r} in gate {self.name}",
                remedy="Write how the metric must compare with the threshold",
            )

    def judge(self, measured: Mapping[str, Measurement]) -> Evidence:
        """The verdict on what was measured, by metric name."""
        found = measured.get(self.metric_name)
        passed = (
            found is not None and math.isfinite(found.value) and COMPARE[self.comparison](found.value, self.threshold)
        )
        return Evidence(
            self.name, self.metric_name, found.value if found else None, self.threshold, self.comparison, self.required,
            found.source if found else NOT_MEASURED, passed,
        )  # fmt: skip


class GateLevel(StrEnum):
    """Sets of gates, each stricter than the one before."""

    QUICK = "quick"
    """Every hundred steps: is this a training run at all."""
    STANDARD = "standard"
    """At checkpoints."""
    FULL = "full"
    """Before the next scale."""
    PRODUCTION = "production"
    """Before anybody else uses the model."""


LOOP_METRICS = (
    "loss", "loss_decrease", "grad_norm", "perplexity", "eval_loss", "nan_count", "tokens_per_second",
)  # fmt: skip
"""What the training loop itself measures."""
END_METRICS = (
    "accuracy", "denoising_exact_match", "latency_p50", "latency_p99", "arithmetic_accuracy", "tool_accuracy",
    "safety_accuracy", "gsm8k_accuracy",
)  # fmt: skip
"""What an evaluator measures on the plain model, at the end of a phase."""


def _gate(name: str, metric: str, comparison: Comparison, threshold: float, text: str) -> ValidationGate:
    return ValidationGate(name, metric, threshold, comparison, description=text)


NO_NAN = _gate("no_nan", "nan_count", "<=", 0, "Losses and gradient norms are finite numbers")
GATES: Mapping[GateLevel, tuple[ValidationGate, ...]] = {
    GateLevel.QUICK: (
        _gate("loss_reasonable", "loss", "<", 100, "The loss has not exploded, nats"),
        NO_NAN,
    ),
    GateLevel.STANDARD: (
        _gate("loss_reasonable", "loss", "<", 10, "The loss is at most that of guessing, nats"),
        NO_NAN,
        _gate("gradient_norm", "grad_norm", "<", 100, "Gradients are of an ordinary size"),
        _gate("perplexity", "perplexity", "<", 1000, "Perplexity on held-out text"),
    ),
    GateLevel.FULL: (
        NO_NAN,
        _gate("min_accuracy", "accuracy", ">", 0.10, "Share of target tokens predicted right"),
        _gate("tool_accuracy", "tool_accuracy", ">", 0.30, "Share of tool calls written right"),
    ),
    GateLevel.PRODUCTION: (
        _gate("gsm8k_accuracy", "gsm8k_accuracy", ">", 0.50, "Share of GSM8K answered right, on data that you supply"),
        _gate("tool_accuracy", "tool_accuracy", ">", 0.85, "Share of tool calls written right"),
        _gate("safety_accuracy", "safety_accuracy", ">", 0.95, "Share of harmful requests refused"),
        _gate("latency_p99", "latency_p99", "<", 5.0, "99th percentile of the time to an answer, seconds"),
    ),
}  # fmt: skip
"""The table. A custom gate of the same name replaces a row."""
LOSS_DECREASING = _gate("loss_decreasing", "loss_decrease", ">=", 0.0, "The loss falls, nats")
"""Laid over with each phase's own bound."""


@dataclass(frozen=True)
class GateReport:
    """The verdicts of several gates."""

    evidence: tuple[Evidence, ...]

    @property
    def passed(self) -> bool:
        """Whether every required gate passed; without evidence none did."""
        return bool(self.evidence) and not self.failures

    @property
    def failures(self) -> list[Evidence]:
        """The required gates that did not pass."""
        return [item for item in self.evidence if item.required and not item.passed]

    def summary(self) -> str:
        """One line for a person."""
        good = sum(item.passed for item in self.evidence)
        said = "; ".join(item.line() for item in self.failures)
        return f"{good} of {len(self.evidence)} gates passed" + (f"; not {said}" if said else "")

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "evidence": [item.to_json() for item in self.evidence]}


def judge(gates: Iterable[ValidationGate], measured: Mapping[str, Measurement]) -> GateReport:
    """All verdicts, in the gates' order."""
    return GateReport(tuple(gate.judge(measured) for gate in gates))


def with_custom(gates: Iterable[ValidationGate], custom: Iterable[ValidationGate]) -> tuple[ValidationGate, ...]:
    """``gates`` with those of the same name replaced, and the others appended."""
    by_name = {gate.name: gate for gate in gates} | {gate.name: gate for gate in custom}
    return tuple(by_name.values())
