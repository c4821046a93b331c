"""What is wrong with a step: one pure rule a kind of alert, in a table. No state, no torch, no files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

RATE_TOLERANCE = 1e-6
"""Relative difference of learning rates that rounding may make."""
LEAST_LOSSES = 5
"""Losses that must lie in the window before a further one can be a spike."""
LEAST_RATES = 50
"""Steps whose throughput must be known before a fall of it can be told."""
LEAST_MEMORY_GB = 0.1
"""Memory below which growth is nobody's problem."""


class Alert(TypedDict):
    """One alert, as plain values."""

    type: str
    """nan, loss_spike, grad_explosion, throughput_drop, learning_rate, data_wait or memory_growth"""
    step: int
    value: float
    """What was measured."""
    threshold: float
    """The bound that it broke, in the unit of ``value``."""
    message: str
    """One sentence for a person."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a value may go. Each is exclusive: a value that equals its bound breaks none."""

    loss_spike: float = 2.0
    """Loss over the mean of the window before it."""
    grad_norm: float = 10.0
    """Gradient norm before clipping, absolute."""
    throughput_share: float = 0.5
    """Mean throughput of the newest steps over the median of the last hundreds."""
    data_wait_share: float = 0.3
    """Share of the newest steps' time that went into waiting for data."""
    memory_growth: float = 1.5
    """Memory over its level after the first steps; then over its level at the last alert."""


class Facts(NamedTuple):
    """One step and what came before it. A ``None`` was not measured, or there is too little of it yet."""

    step: int
    loss: float
    """Nats."""
    grad_norm: float
    learning_rate: float
    is_warmup: bool
    loss_before: float | None
    """Mean of the window of losses before this one."""
    rate_now: float | None
    """Mean throughput of the newest steps, tokens a second."""
    rate_before: float | None
    """Median throughput of the last hundreds of steps."""
    expected_learning_rate: float | None
    data_share: float | None
    """Waiting for data over all time of the newest steps."""
    memory_gb: float | None
    memory_level_gb: float | None
    """The level that memory is compared with."""


class Finding(NamedTuple):
    """A rule that a step broke."""

    value: float
    threshold: float
    message: str


Detector = Callable[[Facts, Limits], Finding | None]


def find_not_finite(loss: float, grad_norm: float) -> Finding | None:
    """Judged before all others, which would compare with a value that compares with nothing. Warm-up is no excuse."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    value = grad_norm if math.isfinite(loss) else loss
    return Finding(value, math.inf, f"loss {loss} and gradient norm {grad_norm} must be finite numbers")


def find_loss_spike(facts: Facts, limits: Limits) -> Finding | None:
    """The loss is more than a multiple of the mean of the window before it; not in warm-up, where losses may jump."""
    if facts.is_warmup or facts.loss_before is None or not facts.loss > limits.loss_spike * facts.loss_before:
        return None
    bound = limits.loss_spike * facts.loss_before
    return Finding(
        facts.loss, bound,
        f"loss {facts.loss:.4f} is above {limits.loss_spike:g} x {facts.loss_before:.4f}, the mean before it",
    )  # fmt: skip


def find_grad_explosion(facts: Facts, limits: Limits) -> Finding | None:
    """The gradient norm before clipping is above an absolute bound, in warm-up too."""
    if not facts.grad_norm > limits.grad_norm:
        return None
    return Finding(
        facts.grad_norm, limits.grad_norm, f"gradient norm {facts.grad_norm:.4g} is above {limits.grad_norm:g}"
    )


def find_throughput_drop(facts: Facts, limits: Limits) -> Finding | None:
    """The mean of the newest steps is a small share of what was usual: one slow step among them is not enough."""
    if facts.rate_now is None or facts.rate_before is None:
        return None
    bound = limits.throughput_share * facts.rate_before
    if not facts.rate_now < bound:
        return None
    return Finding(
        facts.rate_now, bound,
        f"{facts.rate_now:,.0f} tokens/s are below {limits.throughput_share:g} x {facts.rate_before:,.0f}, the usual",
    )  # fmt: skip


def find_wrong_learning_rate(facts: Facts, limits: Limits) -> Finding | None:
    """The learning rate is not the one that the schedule has for this step."""
    expected = facts.expected_learning_rate
    if expected is None or abs(facts.learning_rate - expected) <= RATE_TOLERANCE * abs(expected):
        return None
    return Finding(
        facts.learning_rate, expected, f"learning rate {facts.learning_rate:.6e}, the schedule says {expected:.6e}"
    )


def find_data_wait(facts: Facts, limits: Limits) -> Finding | None:
    """The loader keeps the accelerator waiting."""
    if facts.data_share is None or not facts.data_share > limits.data_wait_share:
        return None
    return Finding(
        facts.data_share, limits.data_wait_share,
        f"{facts.data_share:.0%} of the time goes into waiting for data, above {limits.data_wait_share:.0%}",
    )  # fmt: skip


def find_memory_growth(facts: Facts, limits: Limits) -> Finding | None:
    """Memory has grown by a factor since the level it is compared with."""
    now, level = facts.memory_gb, facts.memory_level_gb
    if now is None or level is None or level <= LEAST_MEMORY_GB or not now > limits.memory_growth * level:
        return None
    return Finding(now, limits.memory_growth * level, f"memory grew from {level:.2f} GB to {now:.2f} GB")


NOT_FINITE = "nan"
MEMORY_GROWTH = "memory_growth"
LOSS_SPIKE = "loss_spike"
DETECTORS: tuple[tuple[str, Detector], ...] = (
    (LOSS_SPIKE, find_loss_spike),
    ("grad_explosion", find_grad_explosion),
    ("throughput_drop", find_throughput_drop),
    ("learning_rate", find_wrong_learning_rate),
    ("data_wait", find_data_wait),
    (MEMORY_GROWTH, find_memory_growth),
)
"""Kind of alert -> its rule, for steps whose loss and gradient norm are numbers."""


def alert(kind: str, step: int, finding: Finding) -> Alert:
    """The finding as an alert of ``kind``."""
    return Alert(type=kind, step=step, value=finding.value, threshold=finding.threshold, message=finding.message)
