"""The monitor: windows, each rule with a case that breaks it and a near miss, the summary, the verdict on a phase."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from encdec.errors import ConfigError
from encdec.training.detectors import DETECTORS, NOT_FINITE
from encdec.training.execution import PHASE_CONFIGS, PhaseConfig, TrainingPhase
from encdec.training.monitor import KEPT_PER_TYPE, MetricWindow, TrainingMonitor, compute_gradient_norm
from tests.encdec.training import norm_lab
from tests.many_ranks import in_ranks

USUAL = {
    "loss": 4.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1000.0, "expected_learning_rate": 1e-3,
    "data_seconds": 0.01, "step_seconds": 1.0, "memory_gb": 10.0,
}  # fmt: skip
Steps = Iterable[dict[str, Any]]


def watched(steps: Steps) -> TrainingMonitor:
    """A monitor that has seen a usual step for each of ``steps``, with those values changed."""
    monitor = TrainingMonitor()
    for step, changed in enumerate(steps, 1):
        monitor.update(step, **{**USUAL, **changed})
    return monitor


def usual(count: int) -> list[dict[str, Any]]:
    return [{}] * count


WAITED = {"data_seconds": 0.35}
CASES: dict[str, tuple[str, Steps, Steps]] = {
    "a loss that is no number": ("nan", [{"loss": math.nan}], [{"loss": 1e30}]),
    "an infinite loss": ("nan", [{"loss": math.inf}], [{"loss": -1e30}]),
    "a gradient that is no number": ("nan", [{"grad_norm": math.nan}], [{"grad_norm": 1e30}]),
    "an infinite gradient": ("nan", [{"grad_norm": -math.inf}], [{"grad_norm": 0.0}]),
    "no number in warm-up": ("nan", [{"loss": math.nan, "is_warmup": True}], [{"is_warmup": True}]),
    "a spike, and twice the mean": ("loss_spike", [*usual(20), {"loss": 8.01}], [*usual(20), {"loss": 8.0}]),
    "a spike is no part of its own mean": ("loss_spike", [*usual(5), {"loss": 8.5}], [*usual(5), {"loss": 7.9}]),
    "a spike, and the same in warm-up": (
        "loss_spike", [*usual(20), {"loss": 40.0}], [*usual(20), {"loss": 40.0, "is_warmup": True}],
    ),
    "a spike, and a loss with four before it": ("loss_spike", [*usual(5), {"loss": 9.0}], [*usual(4), {"loss": 9.0}]),
    "a spike after a NaN": (
        "loss_spike", [*usual(20), {"loss": math.nan}, {"loss": 9.0}], [*usual(20), {"loss": math.nan}, {"loss": 5.0}],
    ),
    "an explosion, and a norm at the threshold": ("grad_explosion", [{"grad_norm": 10.01}], [{"grad_norm": 10.0}]),
    "an explosion in warm-up": (
        "grad_explosion", [{"grad_norm": 50.0, "is_warmup": True}], [{"grad_norm": 9.0, "is_warmup": True}],
    ),
    "stalled throughput, and a slow step": (
        "throughput_drop",
        [*usual(60), *[{"tokens_per_second": 100.0}] * 10],
        [*usual(60), {"tokens_per_second": 1.0}, *usual(9), {"tokens_per_second": 1.0}, *usual(9)],
    ),
    "throughput that stalls, and that falls to three fifths": (
        "throughput_drop",
        [*usual(60), *[{"tokens_per_second": 0.0}] * 6],
        [*usual(60), *[{"tokens_per_second": 600.0}] * 100],
    ),
    "stalled throughput, and a slow start": (
        "throughput_drop",
        [*usual(50), *[{"tokens_per_second": 1.0}] * 9],
        [*[{"tokens_per_second": 1.0}] * 40, *usual(60)],
    ),
    "another learning rate, and one rounded": (
        "learning_rate", [{"learning_rate": 1.00001e-3}], [{"learning_rate": 1e-3 * (1 + 5e-7)}],
    ),
    "a learning rate that is no number, and one nobody expects": (
        "learning_rate", [{"learning_rate": math.nan}], [{"learning_rate": 5.0, "expected_learning_rate": None}],
    ),
    "waiting for data, and a little": ("data_wait", [WAITED] * 51, [{"data_seconds": 0.29}] * 60),
    "waiting for data, and a loader that starts": (
        "data_wait", [*usual(10), *[WAITED] * 60], [{"data_seconds": 600.0, "step_seconds": 601.0}, *usual(60)],
    ),
    "waiting for data, and not long enough": ("data_wait", [WAITED] * 51, [WAITED] * 50),
    "memory growth, and half as much again": (
        "memory_growth", [*usual(10), {"memory_gb": 15.1}], [*usual(10), {"memory_gb": 15.0}],
    ),
    "memory growth, and the start": (
        "memory_growth",
        [*usual(10), {"memory_gb": 16.0}],
        [*[{"memory_gb": 2.0}] * 9, *usual(10), {"memory_gb": 14.0}],
    ),
    "memory growth, and of next to nothing": (
        "memory_growth",
        [*[{"memory_gb": 0.11}] * 10, {"memory_gb": 0.2}],
        [*[{"memory_gb": 0.1}] * 10, {"memory_gb": 0.2}],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "breaks", "near_miss"), CASES.values(), ids=CASES)
def test_rule(kind: str, breaks: Steps, near_miss: Steps):
    found = [alert for alert in watched(breaks).alerts if alert["type"] == kind]
    assert found
    assert set(found[0]) == {"type", "step", "value", "threshold", "message"}
    assert not [alert for alert in watched(near_miss).alerts if alert["type"] == kind]


def test_every_rule_has_its_cases():
    assert {kind for kind, *_ in CASES.values()} == {NOT_FINITE, *(kind for kind, _ in DETECTORS)}


def test_alert_says_what_was_measured_at_which_step_and_against_what():
    monitor = watched(usual(10))
    raised = monitor.update(step=11, loss=9.0, grad_norm=1.0, learning_rate=1e-3, tokens_per_second=1000.0)
    assert raised == monitor.alerts
    assert [(a["type"], a["step"], a["value"], a["threshold"]) for a in raised] == [("loss_spike", 11, 9.0, 8.0)]
    assert raised[0]["message"] == "loss 9.0000 is above 2 x 4.0000, the mean before it"


def test_thresholds_are_those_given():
    monitor = TrainingMonitor(loss_spike_threshold=3.0, grad_norm_threshold=5.0)
    for step in range(1, 11):
        monitor.update(step, 4.0, 1.0, 1e-3, 1000.0)
    monitor.update(11, 11.9, 5.0, 1e-3, 1000.0)
    assert monitor.alerts == []
    monitor.update(12, 20.0, 5.1, 1e-3, 1000.0)
    assert [alert["type"] for alert in monitor.alerts] == ["loss_spike", "grad_explosion"]


def test_memory_growth_is_told_again_only_after_as_much_growth_again():
    levels = [10.0] * 10 + [16.0, 20.0, 24.0, 24.1, 30.0]
    monitor = watched({"memory_gb": level} for level in levels)
    assert [(alert["value"], alert["threshold"]) for alert in monitor.alerts] == [(16.0, 15.0), (24.1, 24.0)]


def test_of_one_type_a_thousand_alerts_are_kept_and_all_counted():
    monitor = watched([{"grad_norm": 11.0}] * (KEPT_PER_TYPE + 5))
    assert len(monitor.alerts) == KEPT_PER_TYPE
    assert monitor.occurrences == {"grad_explosion": KEPT_PER_TYPE + 5}
    assert monitor.get_summary()["alerts"] == KEPT_PER_TYPE + 5


# ---- windows


@pytest.mark.parametrize("size", [1, 3, 100, 250])
def test_window_holds_as_many_values_as_its_size(size: int):
    window = MetricWindow(size)
    for value in range(300):
        window.add(float(value))
    assert (len(window.values), window.window_size) == (size, size)
    assert window.values == [float(value) for value in range(300 - size, 300)]


def test_window_sums_up():
    window = MetricWindow(4)
    for value in (100.0, 2.0, 4.0, 4.0, 6.0):
        window.add(value)
    assert (window.mean, window.min, window.max) == (4.0, 2.0, 6.0)
    assert window.std == pytest.approx(math.sqrt(2.0))


def test_empty_window():
    window = MetricWindow(5)
    assert (window.mean, window.std, window.min, window.max) == (0.0, 0.0, math.inf, -math.inf)
    assert window.values == []


def test_window_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least one value, found 0"):
        MetricWindow(0)


def test_windows_of_a_monitor_have_the_size_asked_for():
    monitor = TrainingMonitor(window_size=7)
    for step in range(1, 20):
        monitor.update(step, float(step), 1.0, 1e-3, 10.0)
    assert monitor.loss_window.values == [float(step) for step in range(13, 20)]
    assert len(monitor.grad_norm_window.values) == len(monitor.throughput_window.values) == 7
    assert len(monitor.loss_history) == len(monitor.grad_norm_history) == len(monitor.throughput_history) == 19


FINITE = st.floats(0, 1e6)
NO_NUMBER = st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.lists(st.tuples(FINITE, FINITE), max_size=30), st.tuples(NO_NUMBER, FINITE | NO_NUMBER), st.booleans())
def test_a_nan_never_changes_what_is_in_a_window(steps, bad, turned):
    monitor = TrainingMonitor(window_size=10)
    for number, (loss, norm) in enumerate(steps, 1):
        monitor.update(number, loss, norm, 1e-3, 1000.0)
    windows = (monitor.loss_window, monitor.grad_norm_window, monitor.throughput_window)
    before = [(window.mean, window.std, window.values) for window in windows]
    loss, norm = reversed(bad) if turned else bad
    raised = monitor.update(len(steps) + 1, loss, norm, 1e-3, 1.0)
    assert [alert["type"] for alert in raised] == ["nan"]
    assert [(window.mean, window.std, window.values) for window in windows] == before


@given(st.lists(FINITE | NO_NUMBER, max_size=30))
def test_a_window_passes_over_what_is_no_number(values):
    window = MetricWindow(10)
    for value in values:
        window.add(value)
    assert window.values == [value for value in values if math.isfinite(value)][-10:]
    assert math.isfinite(window.mean) and math.isfinite(window.std)


# ---- summary and verdict


def test_summary():
    monitor = TrainingMonitor()
    for step, loss in enumerate((10.0, 9.0, 7.0, 6.0), 1):
        monitor.update(step, loss, float(step), 1e-3, 500.0 * step, is_warmup=step < 3)
    assert monitor.get_summary() == {
        "loss": {"current": 6.0, "initial": 10.0, "after_warmup": 7.0, "min": 6.0, "max": 10.0, "decrease": 4.0},
        "grad_norm": {"mean": 2.5, "std": pytest.approx(math.sqrt(1.25)), "max": 4.0},
        "throughput": {"mean_tokens_per_sec": 1250.0},
        "alerts": 0,
        "steps": 4,
    }


def test_summary_of_nothing_is_plain_json():
    summary = json.loads(json.dumps(TrainingMonitor().get_summary(), allow_nan=False))
    assert summary["loss"] == dict.fromkeys(("current", "initial", "after_warmup", "min", "max", "decrease"))
    assert (summary["alerts"], summary["steps"]) == (0, 0)


def falling(monitor: TrainingMonitor, start: float = 8.0, end: float = 4.0, steps: int = 100) -> TrainingMonitor:
    for step in range(steps):
        monitor.update(step + 1, start + (end - start) * step / (steps - 1), 1.0, 1e-3, 1000.0, is_warmup=step < 10)
    return monitor


def spiky(monitor: TrainingMonitor, spikes: int) -> TrainingMonitor:
    falling(monitor)
    for step in range(spikes):
        monitor.update(101 + 2 * step, 60.0 + 30 * step, 1.0, 1e-3, 1000.0)
        monitor.update(102 + 2 * step, 4.0, 1.0, 1e-3, 1000.0)
    for step in range(200, 240):
        monitor.update(step, 4.0, 1.0, 1e-3, 1000.0)
    return monitor


def assigned(initial: float | None, after: float | None) -> TrainingMonitor:
    monitor = TrainingMonitor()
    monitor.initial_loss, monitor.warmup_complete_loss = initial, after
    return monitor


def never_out_of_warmup(monitor: TrainingMonitor) -> TrainingMonitor:
    for step in range(1, 30):
        monitor.update(step, 8.0 - step / 10, 1.0, 1e-3, 1000.0, is_warmup=True)
    return monitor


def ending_in_nan(monitor: TrainingMonitor) -> TrainingMonitor:
    falling(monitor).update(101, math.nan, 1.0, 1e-3, 1000.0)
    return monitor


PHASE = PhaseConfig(TrainingPhase.VALIDATION, 10**6, "a test", max_loss_after_warmup=5.0, min_loss_decrease=1.0)
GOOD = {"loss_after_warmup": True, "loss_decrease": True, "loss_spikes": True}
VERDICTS: dict[str, tuple[Callable[[], TrainingMonitor], dict[str, bool]]] = {
    "a good run": (lambda: falling(TrainingMonitor()), GOOD),
    "nothing at all": (TrainingMonitor, GOOD | {"loss_after_warmup": False, "loss_decrease": False}),
    "a loss that stays too high": (lambda: falling(TrainingMonitor(), 8.0, 5.5), GOOD | {"loss_after_warmup": False}),
    "a loss that hardly falls": (lambda: falling(TrainingMonitor(), 4.5, 4.0), GOOD | {"loss_decrease": False}),
    "five spikes": (lambda: spiky(TrainingMonitor(), 5), GOOD),
    "six spikes": (lambda: spiky(TrainingMonitor(), 6), GOOD | {"loss_spikes": False}),
    "the chain's first loss": (lambda: falling(assigned(5.2, None), 4.5, 4.0), GOOD),
    "a first loss that was lower": (lambda: falling(assigned(4.5, None)), GOOD | {"loss_decrease": False}),
    "losses from elsewhere": (lambda: assigned(8.0, 4.0), GOOD),
    "a loss after warm-up from elsewhere": (
        lambda: falling(assigned(None, 20.0)), GOOD | {"loss_after_warmup": False},
    ),
    "warm-up never ended": (lambda: never_out_of_warmup(TrainingMonitor()), GOOD | {"loss_after_warmup": False}),
    "no number at the end": (
        lambda: ending_in_nan(TrainingMonitor()), GOOD | {"loss_after_warmup": False, "loss_decrease": False},
    ),
    "no number from elsewhere": (
        lambda: assigned(math.nan, math.nan), GOOD | {"loss_after_warmup": False, "loss_decrease": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), VERDICTS.values(), ids=VERDICTS)
def test_verdict_on_a_phase(make: Callable[[], TrainingMonitor], expected: dict[str, bool]):
    verdict = make().validate_phase(PHASE)
    assert {check["name"]: check["passed"] for check in verdict["checks"]} == expected
    assert verdict["passed"] == all(expected.values())
    assert all(set(check) == {"name", "passed", "message"} for check in verdict["checks"])


def test_a_verdict_rests_on_means_and_not_on_one_batch():
    monitor = falling(TrainingMonitor(), steps=500)
    monitor.update(501, 7.0, 1.0, 1e-3, 1000.0)  # one bad batch at the end
    assert monitor.validate_phase(PHASE)["passed"]
    summary = monitor.get_summary()["loss"]
    assert summary["current"] < 4.5 < summary["initial"]


def test_messages_say_value_and_bound():
    verdict = TrainingMonitor().validate_phase(PHASE_CONFIGS[TrainingPhase.FULL])
    assert [check["message"] for check in verdict["checks"]] == [
        "nobody measured it, must be <= 4", "nobody measured it, must be >= 1.5", "0, must be <= 5",
    ]  # fmt: skip


# ---- gradients


def test_gradient_norm_of_a_model_without_gradients_is_zero():
    assert compute_gradient_norm(torch.nn.Linear(3, 2)) == 0.0


def test_gradient_norm_is_that_of_all_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    model[1].bias.requires_grad_(False)
    model(torch.ones(4, 3)).square().sum().backward()
    every = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert compute_gradient_norm(model) == pytest.approx(every.norm().item(), rel=1e-6)


def test_gradient_norm_of_huge_half_precision_gradients_does_not_overflow():
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    parameter.grad = torch.full((4,), 1e30, dtype=torch.bfloat16)
    assert compute_gradient_norm(torch.nn.ParameterList([parameter])) == pytest.approx(2e30, rel=1e-2)


def test_gradient_norm_of_sharded_models_is_that_of_the_whole():
    in_ranks(2, norm_lab.compare)


def test_reading_alerts_loads_no_torch():
    check = "import sys, encdec.training.monitor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
