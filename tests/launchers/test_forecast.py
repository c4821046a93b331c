"""Forecasts: arithmetic on a resolved run, by hand; what is measured goes before what is assumed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from encdec.reliability import expected_ettr
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import RunConfig, resolve_run
from launchers.launch_options import LaunchOptions
from launchers.planning.forecast import (
    DETECTION_SECONDS,
    HOLD_OFF_SECONDS,
    Forecast,
    Measured,
    Place,
    foresee,
    to_mapping,
)
from launchers.planning.plan import make_plan, sharding_of
from launchers.views import forecast as view
from tests.conftest import MICRO, REPOSITORY

DEFAULT = REPOSITORY / "configs" / "training_config.yaml"
CLUSTER = Place(on_slurm=True, gpu="h100", gpu_memory_gb=80.0, limit_seconds=4 * 3600.0)
HERE = Place(on_slurm=False, gpu_memory_gb=8.0)
MEASURED = Measured(
    source="before", steps=100, step_seconds=0.5, flops_per_second=1e9, startup_seconds=6.0, pause_seconds=2.0,
    finish_seconds=3.0, blocking_seconds=0.1, save_seconds=0.4, tokens_per_step=384, ranks=2,
    nodes=1,
)  # fmt: skip


def resolved(*settings: str, config: Any = MICRO, phase: str = "sanity_check", nodes: int = 1) -> RunConfig:
    return resolve_run(TrainingPhase(phase), config_file=config, settings=settings, nodes=nodes)


def foreseen(run: RunConfig, place: Place, measured: Measured | None = None, **options: Any) -> Forecast:
    return foresee(run, place, LaunchOptions(**options), sharding=sharding_of(run), measured=measured)


def test_hours_of_a_run_that_was_measured_are_its_parts():
    run = resolved("training.num_train_steps=100", "training.save_steps=30", "training.eval_steps=20")
    forecast = foreseen(run, HERE, MEASURED)
    pauses = 3 + 4 - 1  # before the last step: saves at 30, 60, 90, evaluations at 20, 40, 60, 80
    assert forecast.training_hours == pytest.approx((6 + 100 * 0.5 + pauses * 2 + 3) / 3600)
    assert forecast.wall_hours == pytest.approx(forecast.training_hours, rel=0.01)  # an interrupt a day
    assert forecast.gpu_hours == pytest.approx(2 * forecast.wall_hours)  # type: ignore[operator]
    assert forecast.tokens_per_second == 384 / 0.5
    assert forecast.basis == "measured by before, 100 steps"
    assert (forecast.attempts, forecast.mfu, forecast.limit_hours) == (1, None, None)


def test_speed_measured_on_other_ranks_is_scaled_by_flops():
    run = resolved("training.global_batch_size=16")
    forecast = foreseen(run, HERE, replace(MEASURED, flops_per_second=2e9))
    assert forecast.flops_per_step is not None
    assert forecast.step_seconds == pytest.approx(forecast.flops_per_step / 2e9 / 2)


def test_what_was_measured_on_few_ranks_is_scaled_and_says_so():
    run = resolved(nodes=4)
    assert (run.nodes, run.world_size) == (4, 8)
    forecast = foreseen(run, HERE, MEASURED)
    assert (forecast.blocking_seconds, forecast.save_seconds) == (pytest.approx(0.1 / 4), pytest.approx(0.4 / 4))
    assert forecast.basis == "measured by before, 100 steps on 2 ranks, for 8"
    at_once = foreseen(resolved("training.async_save=false", nodes=4), HERE, replace(MEASURED, ranks=8))
    assert at_once.blocking_seconds == pytest.approx(0.1 / 4)
    assert at_once.basis == "measured by before, 100 steps"


def test_a_run_that_fits_into_one_job_is_not_stretched_by_its_limit():
    run, never = resolved(), replace(HERE, failures_per_thousand_node_days=0.0)
    whole = foreseen(run, never, MEASURED).training_hours
    assert whole is not None
    fits, cut = (foreseen(run, replace(never, limit_seconds=3600 * whole * part), MEASURED) for part in (1.01, 0.7))
    assert fits.wall_hours == pytest.approx(foreseen(run, never, MEASURED).wall_hours)
    assert fits.attempts == 1 and cut.attempts is not None and cut.attempts > 1
    assert cut.wall_hours > 1.05 * fits.wall_hours  # type: ignore[operator]


def test_without_a_measurement_hours_are_known_only_of_a_known_gpu():
    unknown = foreseen(resolved(), HERE)
    assert unknown.step_seconds is None and unknown.wall_hours is None and unknown.ettr is None
    assert "no run of this model has been measured" in unknown.basis
    run = resolved(config=DEFAULT, phase="full", nodes=4)
    forecast = foreseen(run, CLUSTER)
    assert forecast.flops_per_step is not None and forecast.total_flops == forecast.flops_per_step * run.num_train_steps
    assert forecast.step_seconds == pytest.approx(forecast.flops_per_step / (0.4 * 989e12 * 32))
    assert forecast.mfu == pytest.approx(0.4)
    assert forecast.total_flops / forecast.step_seconds  # type: ignore[operator]
    assert forecast.gpu_hours == pytest.approx(32 * forecast.wall_hours)  # type: ignore[operator]
    assert foreseen(run, replace(CLUSTER, gpu=None)).wall_hours is None


def test_time_limit_makes_attempts_and_each_costs_its_start():
    run = resolved(config=DEFAULT, phase="full", nodes=4)
    short, long = (foreseen(run, replace(CLUSTER, limit_seconds=hours * 3600.0)) for hours in (1, 24))
    assert short.attempts == math.ceil(short.wall_hours / 1)  # type: ignore[operator]
    assert long.attempts == math.ceil(long.wall_hours / 24)  # type: ignore[operator]
    assert short.wall_hours > long.wall_hours  # type: ignore[operator]
    assert short.ettr < long.ettr  # type: ignore[operator]
    endless = foreseen(run, replace(CLUSTER, limit_seconds=math.inf))
    assert endless.attempts == 1 and endless.limit_hours is None


def test_failure_rate_of_the_cluster_decides_the_ettr():
    run = resolved(config=DEFAULT, phase="full", nodes=64)
    place = replace(CLUSTER, failures_per_thousand_node_days=6.5, limit_seconds=None)
    forecast = foreseen(run, place)
    mean = 1000 * 24 / (6.5 * 64)
    assert forecast.mean_time_to_interrupt_hours == pytest.approx(mean)
    assert forecast.recovery_seconds == forecast.startup_seconds + DETECTION_SECONDS + HOLD_OFF_SECONDS
    assert forecast.save_seconds is not None and forecast.blocking_seconds is not None
    by_hand = expected_ettr(
        forecast.save_interval_seconds or 0,
        3600 * mean,
        blocking_seconds=forecast.blocking_seconds,
        recovery_seconds=forecast.recovery_seconds,
        commit_seconds=forecast.save_seconds - forecast.blocking_seconds,
    )
    assert forecast.ettr == pytest.approx(by_hand)
    assert forecast.best_ettr >= forecast.ettr  # type: ignore[operator]
    assert forecast.interrupts == pytest.approx(forecast.wall_hours / mean)  # type: ignore[operator]
    successor = foreseen(run, place, continue_by="successor")
    assert successor.ettr > forecast.ettr  # type: ignore[operator]
    by_clock = foreseen(resolved("training.save_every=auto", config=DEFAULT, phase="full", nodes=64), place)
    assert by_clock.save_interval_seconds == by_clock.best_interval_seconds


def test_memory_is_its_parts_and_storage_is_the_checkpoints():
    forecast = foreseen(resolved(config=DEFAULT, phase="full"), CLUSTER)
    assert forecast.memory_gb is not None and forecast.storage is not None
    parts = dict(forecast.memory_gb)
    total = parts.pop("total_gb")
    assert total == pytest.approx(sum(parts.values())) and "process_gb" not in parts
    assert parts["optimizer_gb"] == pytest.approx(2 * parts["parameters_gb"])
    assert min(parts["gradients_gb"], parts["activations_gb"]) > 0
    assert forecast.storage.checkpoint_gb == pytest.approx(12 * 1_036_517_376 / 1e9)
    assert forecast.storage.disk_gb > forecast.storage.checkpoints * forecast.storage.checkpoint_gb
    here = foreseen(resolved(), HERE)
    assert (
        here.memory_gb is not None and min(here.memory_gb[name] for name in ("process_gb", "heap_gb", "saving_gb")) > 0
    )
    at_once = foreseen(resolved("training.async_save=false"), HERE)
    assert at_once.memory_gb is not None and at_once.memory_gb["saving_gb"] == 0


def test_sizes_that_are_not_known_leave_the_rest_standing():
    run = resolved("model.model_name_or_path=someone/else", config=DEFAULT, phase="full")
    forecast = foreseen(run, CLUSTER, replace(MEASURED, tokens_per_step=run.tokens_per_step, ranks=run.world_size))
    assert forecast.memory_gb is forecast.storage is forecast.flops_per_step is None
    assert forecast.step_seconds == 0.5 and forecast.wall_hours
    assert "not known here" in view.memory(forecast)


@pytest.mark.parametrize("measured", [None, MEASURED])
def test_forecast_is_json_and_readable(measured: Measured | None):
    for run, place in ((resolved(), HERE), (resolved(config=DEFAULT, phase="full", nodes=2), CLUSTER)):
        never = replace(place, failures_per_thousand_node_days=0.0)
        forecast = foreseen(run, never, measured)
        assert json.loads(json.dumps(to_mapping(forecast), allow_nan=False))["mean_time_to_interrupt_hours"] is None
        plan = make_plan(run, run_dir="runs/x", cluster="slurm", why_cluster="").with_forecast(forecast, ["careful"])
        assert json.dumps(plan.to_mapping(), allow_nan=False)
        rows = view.rows(plan)
        assert {"memory", "compute", "time", "storage", "warnings"} <= rows.keys()
        assert "None" not in "".join(rows.values()) and "inf" not in "".join(rows.values())
        assert "never" in rows.get("productive", "never")


def test_dry_run_loads_nothing_heavy(tmp_path: Path):
    command = [sys.executable, "-X", "importtime", "-m", "launchers.submit", "--phase", "medium", "--cluster", "local"]
    done = subprocess.run(
        [*command, "--config", str(MICRO), "--dry-run", "--json", "--run-dir", str(tmp_path / "run")],
        capture_output=True, text=True, cwd=REPOSITORY, check=True,
    )  # fmt: skip
    assert [plan["phase"] for plan in json.loads(done.stdout)] == ["sanity_check", "validation", "medium"]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "launchers.planning.forecast" in loaded
    assert not {"torch", "transformers", "datasets", "wandb", "accelerate", "deepspeed"} & loaded
