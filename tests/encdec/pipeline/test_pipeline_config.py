"""The pipeline's configuration: scale defaults, the tree it comes to, files without loss, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from encdec.errors import ConfigError
from encdec.gates import GateLevel, ValidationGate
from encdec.pipeline.config import (
    GateConfig,
    ModelOverrides,
    PipelineConfig,
    PipelineTrainingConfig,
    apply_scale_defaults,
    create_quick_test_config,
    create_scale_test_config,
)
from encdec.pipeline.scales import ModelScale, get_model_config
from encdec.training.config import DataConfig, FullConfig
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import resolve_run
from tests.conftest import REPOSITORY


def rich_config() -> PipelineConfig:
    training = create_quick_test_config()
    training.validation_gates = [
        ValidationGate("tool_accuracy", "tool_accuracy", 0.5, ">", required=False),
        GateConfig(name="short", metric_name="latency_p50", threshold=1e-05, levels=[GateLevel.PRODUCTION]),
    ]
    training.learning_rate = 3e-05
    return PipelineConfig(
        training=training, strict_validation=False, eval_benchmarks={"gsm8k_accuracy": "a: b.jsonl"}, checkpoint_dir="x"
    )


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
def test_files_keep_everything(name: str, tmp_path: Path):
    config = rich_config()
    config.save(tmp_path / name)
    assert PipelineConfig.load(tmp_path / name) == config
    config.training.save(tmp_path / f"t{name}")
    assert PipelineTrainingConfig.load(tmp_path / f"t{name}") == config.training
    if name.endswith("json"):
        assert json.loads((tmp_path / name).read_text())["training"]["model_scale"] == "tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {max_step: 3}", "training.max_step.*max_steps instead"),
        ("training: {model_scale: gigantic}", "tiny, small"),
        ("training: {validation_gates: [{name: a, metric_name: b, threshold: .nan}]}", "threshold"),
        ("training: {validation_gates: [{name: a, metric_name: b, threshold: 1, levels: [later]}]}", "quick, standard"),
        ("training: {experiment_name: ../up}", "experiment_name"),
        ("training: {settings: {seed: 3}}", "section.key"),
        ("eval_benchmark: {}", "eval_benchmarks instead"),
    ],
)
def test_mistakes_are_refused_by_path(text: str, message: str, tmp_path: Path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        PipelineConfig.load(tmp_path / "p.yaml")


def test_assignment_is_checked():
    with pytest.raises(ValidationError):
        PipelineTrainingConfig().max_steps = 0


@pytest.mark.parametrize("scale", ModelScale)
def test_scale_defaults_fill_what_is_left_open(scale: ModelScale):
    row = get_model_config(scale)
    filled = apply_scale_defaults(PipelineTrainingConfig(num_epochs=3), scale)
    assert filled.model_scale == scale
    assert (filled.batch_size, filled.learning_rate) == (row.defaults.batch_size, row.defaults.learning_rate)
    assert filled.max_steps == 3 * row.recommended_samples // row.defaults.batch_size
    given = PipelineTrainingConfig(model_scale=scale, batch_size=2, learning_rate=1.0, max_steps=7)
    given.apply_scale_defaults()
    assert (given.batch_size, given.learning_rate, given.max_steps, given.micro_batch_size) == (
        2, 1.0, 7, min(2, row.defaults.micro_batch_size),
    )  # fmt: skip


@pytest.mark.parametrize("scale", ModelScale)
def test_tree_has_the_scales_sizes_and_lengths_within_its_context(scale: ModelScale):
    row, full = get_model_config(scale), create_scale_test_config(scale).full_config()
    assert full.model.from_scratch == row.architecture
    assert full.data.max_seq_length == row.max_position_embeddings
    assert max(full.data.max_encoder_length, full.data.max_decoder_length) <= row.max_position_embeddings
    assert (full.training.num_train_steps, full.training.global_batch_size) == (100, row.defaults.batch_size)


def test_overrides_apply_at_every_scale_and_by_scale():
    training = PipelineTrainingConfig(
        model_overrides=ModelOverrides(hidden_size=64), scale_overrides={ModelScale.SMALL: ModelOverrides(head_dim=8)}
    )
    tiny, small = training.scale_config, training.at_scale(ModelScale.SMALL).scale_config
    assert (tiny.hidden_size, tiny.head_dim, small.hidden_size, small.head_dim) == (64, 64, 64, 8)
    assert training.model_scale == ModelScale.TINY


def test_settings_reach_every_key_and_go_before_all_else():
    training = PipelineTrainingConfig(
        max_steps=5,
        settings={"training.weight_decay": 1e-05, "training.num_train_steps": 9, "data.text_column": "a: b"},
    )
    full = training.full_config()
    assert (full.training.weight_decay, full.training.num_train_steps) == (1e-05, 9)
    assert full.data.text_column == "a: b"
    training.settings = {"training.weight_decoy": 1}
    with pytest.raises(ConfigError, match=r"weight_decoy.*weight_decay instead"):
        training.full_config()


def test_impossible_sizes_are_refused():
    training = PipelineTrainingConfig(model_overrides=ModelOverrides(num_key_value_heads=3))
    with pytest.raises(ConfigError, match="must divide num_attention_heads, found 3 and 8"):
        training.full_config()


@pytest.mark.parametrize("phase", [None, *TrainingPhase])
def test_run_is_the_same_in_whichever_phase_a_launcher_trains_it(phase: TrainingPhase | None, tmp_path: Path):
    create_quick_test_config().full_config().to_yaml(tmp_path / "full.yaml")
    run = resolve_run(phase, config_file=tmp_path / "full.yaml", ranks_per_node=1)
    assert (run.num_train_steps, run.global_batch_size, run.config.training.save_steps) == (200, 8, 50)
    assert run.config.data == FullConfig.from_yaml(tmp_path / "full.yaml").data.model_copy(
        update={"packed_dir": run.config.data.packed_dir}
    )


def test_embedded_configuration_is_the_quick_test():
    config = PipelineConfig.load(REPOSITORY / "configs" / "pipeline_tiny.yaml")
    quick = create_quick_test_config().full_config()
    assert config.training.full_config() == quick
    assert DataConfig(**quick.data.model_dump()).dataset_name == "python-stdlib"
