"""Watches a training run from its numbers alone: moving windows, alerts, a summary, a verdict on a phase.

Loads no torch, except inside ``compute_gradient_norm``. Which alerts there are is in ``encdec.training.detectors``.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from encdec.training.detectors import (
    DETECTORS,
    LEAST_LOSSES,
    LEAST_RATES,
    LOSS_SPIKE,
    MEMORY_GROWTH,
    NOT_FINITE,
    Alert,
    Facts,
    Limits,
    alert,
    find_not_finite,
)
from encdec.training.windows import MetricWindow, MovingMedian

__all__ = ["MetricWindow", "TrainingMonitor", "compute_gradient_norm"]

if TYPE_CHECKING:
    from torch import nn

    from encdec.training.execution import PhaseConfig

MOST_SPIKES = 5
"""Loss spikes that a phase may have and still pass."""
LONGEST_MEAN = 50
"""Steps of the means by which a phase is judged."""
NEWEST_STEPS = 10
"""Steps whose mean throughput is the present one."""
USUAL_STEPS = 500
"""Steps whose median throughput is the usual one."""
DATA_STEPS = 50
"""Steps over which waiting for data is added up, after the first, which starts the loader."""
SETTLING_STEPS = 10
"""Steps after which memory has its level: buffers and optimizer state are there."""
KEPT_PER_TYPE = 1000
"""Alerts of one type that are kept; all are counted."""


class TrainingMonitor:
    """Takes each step's numbers, says what is wrong with them, and sums them up.

    A step whose loss or gradient norm is no finite number gives the alert ``nan`` and enters no window.

    Args:
        loss_spike_threshold: a loss above this multiple of the mean of the window before it is a spike, from the fifth
            loss on, outside of warm-up. The spike itself then enters the window like any loss.
        grad_norm_threshold: a gradient norm (before clipping) above it is an explosion; absolute, in warm-up too.
        window_size: values in ``loss_window``, ``grad_norm_window`` and ``throughput_window``.
        throughput_share, data_wait_share, memory_growth: as in ``detectors.Limits``.
    """

    def __init__(
        self,
        loss_spike_threshold: float = 2.0,
        grad_norm_threshold: float = 10.0,
        window_size: int = 100,
        *,
        throughput_share: float = Limits.throughput_share,
        data_wait_share: float = Limits.data_wait_share,
        memory_growth: float = Limits.memory_growth,
    ) -> None:
        self.limits = Limits(
            loss_spike=loss_spike_threshold,
            grad_norm=grad_norm_threshold,
            throughput_share=throughput_share,
            data_wait_share=data_wait_share,
            memory_growth=memory_growth,
        )
        self.loss_window = MetricWindow(window_size)
        self.grad_norm_window = MetricWindow(window_size)
        self.throughput_window = MetricWindow(window_size)
        self.alerts: list[Alert] = []
        """In the order in which they arose; the first thousand of each type."""
        self.occurrences: Counter[str] = Counter()
        """All alerts, by type."""
        self.steps = 0
        """Calls of ``update``."""
        self._losses, self._grad_norms, self._rates = array("d"), array("d"), array("d")
        self._given_initial: float | None = None
        self._given_after_warmup: float | None = None
        self._after_warmup: float | None = None
        self._newest_rates = MetricWindow(NEWEST_STEPS)
        self._usual_rate = MovingMedian(USUAL_STEPS)
        self._waits: deque[float] = deque(maxlen=DATA_STEPS)
        self._times: deque[float] = deque(maxlen=DATA_STEPS)
        self._memory_level: float | None = None
        self._timed = self._weighed = 0
        self._newest_is_finite = True

    # ---- each step

    def update(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        tokens_per_second: float,
        is_warmup: bool = False,
        *,
        expected_learning_rate: float | None = None,
        data_seconds: float | None = None,
        step_seconds: float | None = None,
        memory_gb: float | None = None,
    ) -> list[Alert]:
        """Take one step's numbers; returns the alerts that they raise, which are in ``alerts``, too.

        Args:
            step: optimizer steps done, this one included.
            loss: nats.
            grad_norm: before clipping.
            tokens_per_second: measured.
            is_warmup: the learning rate still rises.
            expected_learning_rate: what the schedule says; None: nobody knows.
            data_seconds: part of ``step_seconds`` that went into waiting for data; None: not measured.
            memory_gb: memory in use after the step; None: not measured.
        """
        self.steps += 1
        loss, grad_norm = float(loss), float(grad_norm)
        finding = find_not_finite(loss, grad_norm)
        self._newest_is_finite = finding is None
        if finding:
            raised = [alert(NOT_FINITE, step, finding)]
        else:
            rate_now, rate_before = self._weigh_rate(tokens_per_second)
            facts = Facts(
                step, loss, grad_norm, learning_rate, is_warmup,
                self.loss_window.mean if len(self.loss_window) >= LEAST_LOSSES else None,
                rate_now, rate_before, expected_learning_rate,
                self._weigh_waiting(data_seconds, step_seconds), memory_gb, self._level_before(memory_gb),
            )  # fmt: skip
            raised = [alert(kind, step, found) for kind, detect in DETECTORS if (found := detect(facts, self.limits))]
            self._take(loss, grad_norm, tokens_per_second, is_warmup)
        for each in raised:
            self.record(each)
        return raised

    def record(self, raised: Alert) -> None:
        """Keep and count an alert, also one that somebody else raised."""
        self.occurrences[raised["type"]] += 1
        if self.occurrences[raised["type"]] <= KEPT_PER_TYPE:
            self.alerts.append(raised)
        if raised["type"] == MEMORY_GROWTH:
            self._memory_level = raised["value"]  # again only after as much growth again

    def _take(self, loss: float, grad_norm: float, rate: float, is_warmup: bool) -> None:
        self.loss_window.add(loss)
        self.grad_norm_window.add(grad_norm)
        self.throughput_window.add(rate)
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self._rates.append(rate)
        if self._after_warmup is None and not is_warmup:
            self._after_warmup = loss

    def _weigh_rate(self, rate: float) -> tuple[float | None, float | None]:
        """(present, usual) throughput with this step's, tokens a second."""
        self._newest_rates.add(rate)
        self._usual_rate.add(rate)
        if len(self._usual_rate) < LEAST_RATES:
            return None, None
        return self._newest_rates.mean, self._usual_rate.value

    def _weigh_waiting(self, waited: float | None, seconds: float | None) -> float | None:
        """Share of the newest steps' time that went into waiting for data; None while they are too few."""
        if waited is None or seconds is None or not math.isfinite(waited) or not math.isfinite(seconds):
            return None
        self._timed += 1
        if self._timed > 1:
            self._waits.append(waited)
            self._times.append(seconds)
        total = sum(self._times) if len(self._times) == DATA_STEPS else 0.0
        return sum(self._waits) / total if total > 0 else None

    def _level_before(self, memory_gb: float | None) -> float | None:
        """What memory is compared with; None until it has settled."""
        if memory_gb is None or not math.isfinite(memory_gb):
            return None
        self._weighed += 1
        if self._weighed <= SETTLING_STEPS:
            self._memory_level = max(memory_gb, self._memory_level or 0.0)
            return None
        return self._memory_level

    # ---- what has been

    @property
    def loss_history(self) -> list[float]:
        """A copy of every finite step's loss."""
        return self._losses.tolist()

    @property
    def grad_norm_history(self) -> list[float]:
        """A copy of every finite step's gradient norm."""
        return self._grad_norms.tolist()

    @property
    def throughput_history(self) -> list[float]:
        """A copy of every finite step's throughput, tokens a second."""
        return self._rates.tolist()

    @property
    def initial_loss(self) -> float | None:
        """The first loss, unless another was assigned (a chain's first loss); None without any."""
        if self._given_initial is not None:
            return self._given_initial
        return self._losses[0] if self._losses else None

    @initial_loss.setter
    def initial_loss(self, value: float | None) -> None:
        self._given_initial = value

    @property
    def warmup_complete_loss(self) -> float | None:
        """The first loss after warm-up, unless another was assigned; None where warm-up has not ended."""
        return self._after_warmup if self._given_after_warmup is None else self._given_after_warmup

    @warmup_complete_loss.setter
    def warmup_complete_loss(self, value: float | None) -> None:
        self._given_after_warmup = value

    def _judged_losses(self) -> tuple[float | None, float | None]:
        """(start, now): means over a tenth of the steps, at most 50, never one batch of a long run; as assigned where
        that is all there is. Now is nan where the newest step's was no number: it must not pass for the mean before.
        """
        count = min(LONGEST_MEAN, max(1, len(self._losses) // 10))
        start, now = self._given_initial, self._given_after_warmup
        if self._losses:
            start = sum(self._losses[:count]) / count if start is None else start
            now = sum(self._losses[-count:]) / count
        return start, now if self._newest_is_finite else math.nan

    def get_summary(self) -> dict[str, Any]:
        """Plain values; None where there are none yet. ``current`` and ``decrease`` are of means (at most 50 steps)."""
        start, now = self._judged_losses()
        norms = self.grad_norm_window
        return {
            "loss": {
                "current": _number(now),
                "initial": self.initial_loss,
                "after_warmup": self.warmup_complete_loss,
                "min": min(self._losses, default=None),
                "max": max(self._losses, default=None),
                "decrease": None if start is None or now is None else _number(start - now),
            },
            "grad_norm": {"mean": norms.mean, "std": norms.std, "max": norms.max if len(norms) else None},
            "throughput": {"mean_tokens_per_sec": self.throughput_window.mean},
            "alerts": sum(self.occurrences.values()),
            "steps": self.steps,
        }

    def validate_phase(self, phase_config: PhaseConfig) -> dict[str, Any]:
        """The verdict on a phase: ``{passed, checks: [{name, passed, message}]}``. What nobody measured does not pass.

        ``loss_after_warmup`` is the present mean loss of a run whose warm-up has ended, or what was assigned to
        ``warmup_complete_loss``; ``loss_decrease`` starts from ``initial_loss`` where one was assigned.
        """
        start, now = self._judged_losses()
        after = self._given_after_warmup
        if after is None and self._after_warmup is not None:
            after = now
        fall = None if start is None or now is None else start - now
        spikes = sum(each["type"] == LOSS_SPIKE for each in self.alerts)
        highest, least = phase_config.max_loss_after_warmup, phase_config.min_loss_decrease
        checks = [
            _check("loss_after_warmup", after, after is not None and after <= highest, f"must be <= {highest:g}"),
            _check("loss_decrease", fall, fall is not None and fall >= least, f"must be >= {least:g}"),
            _check("loss_spikes", spikes, spikes <= MOST_SPIKES, f"must be <= {MOST_SPIKES}"),
        ]
        return {"passed": all(check["passed"] for check in checks), "checks": checks}


def _number(value: float | None) -> float | None:
    """JSON has no nan and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _check(name: str, value: float | None, passed: bool, bound: str) -> dict[str, Any]:
    found = "nobody measured it" if value is None else f"{value:.4g}"
    return {"name": name, "passed": passed, "message": f"{found}, {bound}"}


def compute_gradient_norm(model: nn.Module) -> float:
    """L2 norm of all gradients as they are now; 0.0 where there are none.

    With sharded parameters (DTensor: FSDP2, tensor parallelism) it is the norm of the whole gradients: every rank of
    their meshes must call it, and all get the same. DeepSpeed's ZeRO-3 keeps its gradients elsewhere; of those it sees
    none.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate

    squares: dict[Any, list[Any]] = {}
    for parameter in model.parameters():
        gradient = parameter.grad
        split: tuple[Any, ...] = ()
        if isinstance(gradient, DTensor):
            whole = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
            gradient = gradient.redistribute(placements=whole)
            split = tuple((gradient.device_mesh, dim) for dim, placed in enumerate(whole) if placed.is_shard())
            gradient = gradient.to_local()
        if gradient is not None:
            square = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64).square()
            squares.setdefault(split, []).append(square)
    total = 0.0
    for split, parts in squares.items():
        summed = torch.stack(parts).sum()
        for mesh, dim in split:
            dist.all_reduce(summed, group=mesh.get_group(dim))
        total += summed.item()
    return math.sqrt(total)
