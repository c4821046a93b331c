"""Alerts on their way from the steps of real trainers to ledger, log, trackers; how often they are told."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from encdec.checkpoints import CheckpointManager
from encdec.data.collator import UL2DataCollator
from encdec.data.packing import open_packed
from encdec.data.sampler import GlobalBatchSampler
from encdec.data.ul2_dataset import UL2Dataset, build_dataloader
from encdec.files import RunPaths
from encdec.records import StepRecord, read_json_lines
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training.alerts import Watch
from encdec.training.build import build_model, observers
from encdec.training.config import FullConfig
from encdec.training.observers import Observer
from encdec.training.rate_limit import RateLimit
from encdec.training.run_config import RunConfig, resolve_run
from encdec.training.schedule import Schedule
from encdec.training.trainer import Qwen3EncoderDecoderTrainer
from tests.conftest import MICRO
from tests.encdec.training.engine_lab import Made

AN_ALERT = {"type": "loss_spike", "step": 7, "value": 9.0, "threshold": 8.0, "message": "loss 9 is above 8"}


class Heard(Observer):
    """Keeps the alerts."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []

    def on_alert(self, alert) -> None:
        self.alerts.append(dict(alert))

    @property
    def steps(self) -> list[tuple[str, int]]:
        return [(alert["type"], alert["step"]) for alert in self.alerts]


def record(schedule: Schedule, step: int, **changed: Any) -> StepRecord:
    facts = {
        "step": step, "loss": 4.0, "grad_norm": 1.0, "learning_rate": schedule.learning_rate(step - 1),
        "tokens_seen": step, "tokens_per_second": 1000.0, "step_seconds": 1.0, "data_seconds": 0.01,
        "samples_consumed": step, "memory_gb": 3.0, "attempt": 0, "restart": 0,
    }  # fmt: skip
    return StepRecord(**{**facts, **changed})


@pytest.fixture
def schedule() -> Schedule:
    return Schedule.from_config(FullConfig().training, warmup_steps=10, total_steps=1000)


def watch(schedule: Schedule) -> tuple[Watch, Heard]:
    heard = Heard()
    told: list[Observer] = [heard]
    watching = Watch.from_config(FullConfig().training, schedule, told)
    told.append(watching)
    return watching, heard


def test_one_alert_of_a_type_in_a_hundred_steps_and_all_are_counted(schedule: Schedule):
    watching, heard = watch(schedule)
    for step in range(1, 251):
        watching.on_step(record(schedule, step, grad_norm=11.0), 4.0)
    assert heard.steps == [("grad_explosion", 1), ("grad_explosion", 101), ("grad_explosion", 201)]
    assert [alert["occurrences"] for alert in heard.alerts] == [1, 101, 201]
    assert "so at 99 more steps since the last alert" in heard.alerts[1]["message"]
    assert watching.monitor.occurrences == {"grad_explosion": 250}


def test_types_do_not_hold_each_other_back(schedule: Schedule):
    watching, heard = watch(schedule)
    for step in range(1, 40):
        watching.on_step(record(schedule, step, loss=20.0 if step == 30 else 4.0, grad_norm=11.0), 4.0)
    assert heard.steps == [("grad_explosion", 1), ("loss_spike", 30)]


def test_the_warm_up_is_the_schedules(schedule: Schedule):
    watching, heard = watch(schedule)
    for step in range(1, 12):
        watching.on_step(record(schedule, step, loss=4.0 if step < 10 else 100.0), 4.0)  # spikes at 10 and 11
    assert heard.steps == [("loss_spike", 11)]


def test_a_learning_rate_out_of_step_is_told_and_a_lower_peak_is_not(schedule: Schedule):
    watching, heard = watch(schedule)
    schedule.peak /= 2
    for step in range(20, 30):
        watching.on_step(record(schedule, step), 4.0)
    assert heard.alerts == []
    watching.on_step(record(schedule, 30, learning_rate=schedule.learning_rate(30)), 4.0)  # that of the next step
    assert heard.steps == [("learning_rate", 30)]


def test_a_new_start_is_no_alert(schedule: Schedule):
    first, _ = watch(schedule)
    for step in range(1, 100):
        first.on_step(record(schedule, step), 4.0)
    again, heard = watch(schedule)  # another machine, slower and with other memory, from step 100 on
    for step in range(100, 200):
        changed = {"loss": 9.0, "tokens_per_second": 10.0, "memory_gb": 30.0}
        again.on_step(record(schedule, step, **changed), 4.0)
    assert heard.alerts == []


def test_alerts_that_others_raise_are_counted(schedule: Schedule):
    watching, heard = watch(schedule)
    watching.on_alert(AN_ALERT)
    assert heard.alerts == []
    assert watching.monitor.alerts == [AN_ALERT]


@pytest.mark.parametrize(
    ("times", "answers"),
    [
        ([0, 1, 9, 10, 11], [0, None, None, 2, None]),
        ([100, 50, 55, 60], [0, 0, None, 1]),  # a return to an earlier step
        ([0, 10, 20], [0, 0, 0]),
    ],
)
def test_rate_limit(times, answers):
    limit = RateLimit(10)
    assert [limit.admit("a", now) for now in times] == answers
    assert limit.admit("b", times[-1]) == 0


# ---- real trainers, real files


@pytest.fixture
def resolved(made: Made, tmp_path: Path):
    def resolve(*settings: str) -> RunConfig:
        every = [f"data.packed_dir={made.folder}", "training.num_train_steps=6", "training.save_steps=3", *settings]
        return resolve_run(None, config_file=MICRO, settings=every, ranks_per_node=1)

    return resolve


def trainer_of(run: RunConfig, made: Made, paths: RunPaths) -> Qwen3EncoderDecoderTrainer:
    """As ``build_trainer`` puts it together, in one process without a process group."""
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(str(made.folder / "tokenizer"))
    dataset = UL2Dataset(open_packed(made.folder / "packed", "train"))
    sampler = GlobalBatchSampler(len(dataset), run.global_batch_size, 4, 0, 1, 42)
    loader = build_dataloader(dataset, UL2DataCollator(tokenizer, 64, 64, seed=42), sampler)
    trainer = Qwen3EncoderDecoderTrainer(
        build_model(run.config, tokenizer), tokenizer, run.config, loader,
        checkpoints=CheckpointManager(paths.checkpoints), sample_length=run.sample_length,
        total_steps=run.num_train_steps, warmup_steps=run.warmup_steps, observers=observers(run, paths, 0, 64),
    )  # fmt: skip
    trainer.observers.append(Watch.from_config(run.config.training, trainer.schedule, trainer.observers))
    return trainer


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    paths.make()
    assert paths.claim_attempt() == 0
    return paths


def alerts_in(paths: RunPaths) -> list[dict[str, Any]]:
    return [entry for entry in read_json_lines(paths.attempt(0).events("rank-0")) if entry["event"] == "alert"]


def close(trainer: Qwen3EncoderDecoderTrainer) -> None:
    for observer in trainer.observers:
        observer.close()


def test_alert_of_a_real_run_lands_in_ledger_log_and_summary(resolved, made: Made, paths: RunPaths, caplog):
    caplog.set_level(logging.INFO, "encdec.train")
    trainer = trainer_of(resolved("training.monitor_grad_norm=1e-6"), made, paths)
    trainer.train()
    close(trainer)
    [alert] = alerts_in(paths)
    assert (alert["type"], alert["step"], alert["threshold"], alert["occurrences"]) == ("grad_explosion", 1, 1e-6, 1)
    assert alert["value"] == next(iter(read_json_lines(paths.attempt(0).steps)))["grad_norm"]
    assert f"alert grad_explosion at step 1: {alert['message']}" in caplog.text
    assert "alerts of this attempt: 6 grad_explosion" in caplog.text


def test_an_ordinary_run_has_no_alerts_neither_when_it_goes_on(resolved, made: Made, paths: RunPaths):
    run = resolved("training.monitor_data_wait_share=1.0")  # a step of this model takes no longer than its data
    trainer = trainer_of(run, made, paths)
    trainer.train()
    close(trainer)
    again = trainer_of(run, made, paths)
    again.load_checkpoint(paths.checkpoints / "step-3")
    again.train()
    close(again)
    assert len(list(read_json_lines(paths.attempt(0).steps))) == 9
    assert alerts_in(paths) == []


def test_loss_that_is_no_number_lands_in_the_ledger_as_plain_json(resolved, made: Made, paths: RunPaths):
    trainer = trainer_of(resolved(), made, paths)
    with torch.no_grad():
        trainer.model.shared.weight.fill_(math.nan)
    assert trainer.train().cause == "gate"
    close(trainer)
    [alert] = alerts_in(paths)
    assert (alert["type"], alert["step"], alert["value"], alert["threshold"]) == ("nan", 1, None, None)
    assert "loss nan" in alert["message"]
    assert "NaN" not in paths.attempt(0).events("rank-0").read_text()
