"""configs/production_training.yaml says what its comments say, and the names that people know for its keys work."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from encdec.errors import ConfigError
from encdec.estimates import estimate_rank_memory
from encdec.train import parse
from encdec.training.config import OTHER_NAMES, FullConfig, TrainingConfig
from encdec.training.execution import TrainingPhase
from encdec.training.model_sizes import model_size
from encdec.training.run_config import RunConfig, resolve_run
from tests.conftest import MICRO, REPOSITORY

PRODUCTION = REPOSITORY / "configs" / "production_training.yaml"


def resolved(phase: TrainingPhase | None, nodes: int = 4) -> RunConfig:
    return resolve_run(phase, config_file=PRODUCTION, nodes=nodes)


# phase -> steps
STEPS = {None: 71_595, "sanity_check": 100, "validation": 1_002, "medium": 10_023, "full": 71_595}


@pytest.mark.parametrize("phase", STEPS)
def test_steps_of_its_comments(phase: str | None):
    run = resolved(TrainingPhase(phase) if phase else None)
    assert run.num_train_steps == STEPS[phase]
    assert run.sample_length == 2_728
    assert run.tokens_per_step == 1_396_736


def test_what_it_decides():
    training = resolved(TrainingPhase.FULL).config.training
    assert (training.optimizer, training.learning_rate, training.min_lr_ratio) == ("muon", 1e-3, 0.1)
    assert (training.save_steps, training.save_every, training.save_total_limit) == (1000, "auto", 5)
    assert training.per_device_train_batch_size == "auto"
    assert training.report_to == ["wandb", "tensorboard"]
    assert training.eval_samples > 0


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16, 32, 64])
def test_same_run_on_any_number_of_nodes(nodes: int):
    run = resolved(TrainingPhase.FULL, nodes)
    assert run.identity == resolved(TrainingPhase.FULL).identity
    micro, accumulation = run.micro_batches(run.world_size)
    assert micro * accumulation * 8 * nodes == 512


@pytest.mark.parametrize(("nodes", "micro", "low", "high"), [(1, 64, 45, 48), (4, 16, 11, 14), (1, 16, 16, 19)])
def test_memory_of_its_comments(nodes: int, micro: int, low: float, high: float):
    run = resolved(TrainingPhase.FULL, nodes)
    size = model_size(run.config.model)
    assert size is not None
    assert size.parameters == 1_036_517_376  # as the model's own test counts
    assert round(size.checkpoint_bytes("muon") / 1e9, 1) == 8.9
    estimate = estimate_rank_memory(
        size, ranks=run.world_size, micro_batch_size=micro, encoder_length=4096, decoder_length=2048,
        bytes_per_value=2, optimizer="muon", gradient_checkpointing=True, accumulates=micro * 8 * nodes < 512,
    )  # fmt: skip
    assert low < estimate["total_gb"] < high


@pytest.mark.parametrize(
    ("optimizer", "matrices"), [("adamw", 1_036_517_376), ("muon", 1_036_517_376 - 880_803_840)], ids=["adamw", "muon"]
)
def test_default_configuration_fits_eight_a100(optimizer: str, matrices: int):
    config = FullConfig()
    size = model_size(config.model)
    assert size is not None
    assert size.optimizer_bytes(optimizer) == 4 * size.parameters + 4 * matrices
    estimate = estimate_rank_memory(
        size, ranks=8, micro_batch_size=4, encoder_length=config.data.max_encoder_length,
        decoder_length=config.data.max_decoder_length, bytes_per_value=2, optimizer=optimizer,
        gradient_checkpointing=True, accumulates=True,
    )  # fmt: skip
    assert estimate["total_gb"] < 80 / 2


def test_every_key_is_one_of_the_tree_and_comes_back(tmp_path: Path):
    config = FullConfig.from_yaml(PRODUCTION)
    given = yaml.safe_load(PRODUCTION.read_text())
    for section, keys in given.items():
        if section != "phases":
            assert {OTHER_NAMES.get(key, key) for key in keys} <= set(type(getattr(config, section)).model_fields)
    config.to_yaml(tmp_path / "written.yaml")
    assert FullConfig.from_yaml(tmp_path / "written.yaml") == config


# ---- the other names


def write(folder: Path, training: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(f"{MICRO.read_text()}\n".replace("training:\n", f"training:\n  {training}\n", 1))
    return file


def test_other_names_are_read_and_own_ones_written(tmp_path: Path):
    config = FullConfig.from_mapping({"training": {"max_lr": 3e-4, "save_interval": 7}}, source="test")
    assert (config.training.learning_rate, config.training.save_steps) == (3e-4, 7)
    config.to_yaml(tmp_path / "written.yaml")
    written = yaml.safe_load((tmp_path / "written.yaml").read_text())["training"]
    assert not written.keys() & OTHER_NAMES.keys()
    assert FullConfig.from_yaml(tmp_path / "written.yaml") == config
    assert set(OTHER_NAMES.values()) <= set(TrainingConfig.model_fields)
    assert not set(OTHER_NAMES) & set(TrainingConfig.model_fields)


@pytest.mark.parametrize("setting", ["training.max_lr=0.5", "training.learning_rate=0.5"])
@pytest.mark.parametrize("name", ["max_lr", "learning_rate"])
def test_settings_lie_over_the_file_whatever_the_names(tmp_path: Path, name: str, setting: str):
    file = tmp_path / "config.yaml"
    file.write_text(MICRO.read_text().replace("learning_rate:", f"{name}:"))
    assert resolve_run(None, config_file=file).config.training.learning_rate == 1e-2
    assert resolve_run(None, config_file=file, settings=[setting]).config.training.learning_rate == 0.5


@pytest.mark.parametrize("key", ["save_interval", "save_steps"])
def test_setting_goes_before_the_phases_own_number(key: str):
    run = resolve_run(TrainingPhase.SANITY_CHECK, config_file=MICRO, settings=[f"training.{key}=7"])
    assert run.config.training.save_steps == 7


def test_both_names_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"training\.max_lr is another name of training\.learning_rate"):
        resolve_run(None, config_file=write(tmp_path, "max_lr: 1e-3"))


@pytest.mark.parametrize("flag", ["--resume", "--resume_from"])
def test_resume_has_two_names(flag: str):
    arguments = parse(["--config", str(PRODUCTION), flag, "runs/x/checkpoints/step-100"])
    assert arguments.resume_from == Path("runs/x/checkpoints/step-100")
    assert arguments.auto_resume is False
