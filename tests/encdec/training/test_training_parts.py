"""The parts of the loop that are pure: schedule, early stopping, losses, verdict, requests."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from encdec import distributed
from encdec.files import RunPaths
from encdec.training.config import TrainingConfig
from encdec.training.early_stopping import EarlyStopping
from encdec.training.execution import PHASE_CONFIGS, TrainingPhase
from encdec.training.finish import judge_phase
from encdec.training.schedule import Schedule
from encdec.training.signals import Requests, Wishes
from encdec.training.state import LossHistory


def schedule(**changes) -> Schedule:
    return Schedule(
        **{"peak": 1.0, "warmup_steps": 10, "total_steps": 110, "min_ratio": 0.1, "shape": "cosine", **changes}
    )


def test_warm_up_never_spends_a_step_at_zero_and_reaches_the_peak():
    rates = [schedule().learning_rate(step) for step in range(10)]
    assert rates == [pytest.approx((step + 1) / 10) for step in range(10)]


@pytest.mark.parametrize(("shape", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_decay(shape: str, middle: float):
    made = schedule(shape=shape)
    assert made.learning_rate(10) == pytest.approx(1.0)
    assert made.learning_rate(60) == pytest.approx(middle)
    end = 1.0 if shape == "constant" else 0.1
    assert made.learning_rate(110) == made.learning_rate(500) == pytest.approx(end)


def test_schedule_sets_every_group_and_survives_a_restart():
    made = schedule()
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.ones(1)]}], lr=0.0)
    used = [made.apply(optimizer) for _ in range(5)]
    assert [group["lr"] for group in optimizer.param_groups] == [used[-1]] * 2
    again = schedule()
    again.load_state_dict(made.state_dict())
    assert again.apply(optimizer) == made.apply(optimizer)


def rules(**changes) -> EarlyStopping:
    return EarlyStopping(TrainingConfig(**{"early_stopping_patience": 2, "grad_spike_patience": 3, **changes}))


def test_gradient_spikes_stop_only_when_consecutive_and_after_the_exempt_steps():
    made = rules()
    assert all(made.after_step(step, 1e6) is None for step in range(1, 51))
    assert made.after_step(51, 1e6) is None
    assert made.after_step(52, 1.0) is None  # the row is broken
    assert [made.after_step(step, 2e3) is None for step in (53, 54, 55)] == [True, True, False]


def test_plateau_counts_checks_without_improvement_across_restarts():
    made = rules()
    assert [made.at_check(step, 3.0) for step in (100, 200)] == [None, None]
    resumed = rules()
    resumed.load_state_dict(made.state_dict())
    assert resumed.at_check(300, 2.995) is not None  # 0.005 is less than min_delta 0.01
    assert made.at_check(300, 2.9) is None


def test_verdict_survives_a_restart():
    made = rules()
    assert made.reason is None
    assert [made.judge(step, 1.0, 3.0) is None for step in (500, 501, 1000, 1500)] == [True, True, True, False]
    resumed = rules()
    resumed.load_state_dict(made.state_dict())
    assert resumed.reason == made.reason
    assert "3.0000" in resumed.reason
    indifferent = rules(early_stopping_enabled=False)
    indifferent.load_state_dict(made.state_dict())
    assert indifferent.reason is None


def test_early_stopping_can_be_switched_off():
    made = rules(early_stopping_enabled=False)
    assert all(made.after_step(step, math.inf) is None for step in range(100))
    assert all(made.at_check(step, 3.0) is None for step in range(100, 2000, 100))


def test_loss_history_keeps_first_and_last_means():
    history = LossHistory(total_steps=1000)
    assert history.window == 50
    for loss in range(200):
        history.add(float(loss))
    assert (history.first_mean, history.last_mean()) == (24.5, 174.5)
    short = LossHistory(total_steps=8)
    for loss in (5.0, 4.0, 3.0):
        short.add(loss)
    assert (short.window, short.first_mean, short.last_mean()) == (1, 5.0, 3.0)


@pytest.mark.parametrize(
    ("first", "last", "verdicts"),
    [
        (9.0, 8.0, [True, True]),
        (9.0, 8.95, [False, True]),
        (99.0, 16.0, [True, False]),
        (9.0, math.nan, [False, False]),
    ],
)
def test_phase_verdict(first: float, last: float, verdicts: list[bool]):
    report = judge_phase(PHASE_CONFIGS[TrainingPhase.SANITY_CHECK], first, last)
    assert [item.passed for item in report.evidence] == verdicts
    assert [item.gate for item in report.evidence] == ["loss_decreasing", "loss_reasonable"]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_signals_set_a_flag_and_nothing_else(number: signal.Signals):
    handlers = {each: signal.getsignal(each) for each in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
    try:
        requests = Requests(None).listen()
        assert requests.look() == Wishes(signalled=False, stop=False, save=False)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # they come twice
        assert requests.look() == Wishes(signalled=True, stop=False, save=False)
        assert requests.signal_name == number.name
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


def test_control_files(tmp_path: Path):
    paths = RunPaths(tmp_path)
    paths.make()
    paths.save_request.touch()
    assert Requests(paths).look() == Wishes(signalled=False, stop=False, save=True)
    assert not paths.save_request.exists()
    paths.stop_request.touch()
    assert Requests(paths).look() == Wishes(signalled=False, stop=True, save=False)
    assert paths.stop_request.exists()


def test_only_rank_zero_asks_the_storage_for_control_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = RunPaths(tmp_path)
    paths.make()
    paths.save_request.touch()
    paths.stop_request.touch()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert Requests(paths).look() == Wishes(signalled=False, stop=False, save=False)
    assert paths.save_request.exists()
