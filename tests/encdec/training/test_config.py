"""The configuration tree, the phase table, and how they become a resolved run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from encdec.errors import ConfigError, RunDirectoryError
from encdec.files import RunPaths
from encdec.pipeline.config import PipelineConfig
from encdec.training.config import FullConfig
from encdec.training.execution import (
    PHASE_CONFIGS,
    PhaseConfig,
    TrainingPhase,
    estimate_steps_for_tokens,
    estimate_training_time,
)
from encdec.training.run_config import divide_global_batch, read_run_config, require_same_run, resolve_run

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = REPOSITORY / "configs" / "tiny.yaml"


def resolved(*settings: str, phase: TrainingPhase | None = TrainingPhase.SANITY_CHECK, **place):
    return resolve_run(phase, config_file=TINY, settings=settings, **place)


def test_published_defaults():
    config = FullConfig()
    assert config.model.model_name_or_path == "Qwen/Qwen3-0.6B"
    assert config.model.num_sentinel_tokens == 100
    assert config.data.ul2_task_weights == [1, 1, 1, 1, 4]
    assert (config.data.max_seq_length, config.data.max_encoder_length, config.data.max_decoder_length) == (
        8192,
        4096,
        2048,
    )
    assert (config.training.learning_rate, config.training.weight_decay, config.training.adam_beta2) == (
        2e-4,
        0.01,
        0.999,
    )
    assert (config.training.save_total_limit, config.training.eval_steps, config.training.seed) == (5, 500, 42)
    assert (config.infra.distributed_type, config.infra.fsdp_sharding_strategy) == ("fsdp", "FULL_SHARD")


def test_parts_are_assignable_and_checked_on_assignment():
    config = FullConfig()
    config.infra.output_dir = "elsewhere"
    with pytest.raises(ValidationError):
        config.training.learning_rate = -1.0
    assert config.training.learning_rate == 2e-4  # a refused value leaves the old one


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "training": st.fixed_dictionaries(
                {"learning_rate": st.floats(1e-9, 10), "seed": st.integers(0, 2**64 - 1), "bf16": st.booleans()}
            ),
            "data": st.fixed_dictionaries(
                {
                    "text_column": st.text(st.characters(exclude_characters="\0"), min_size=1),
                    "max_examples": st.none() | st.integers(1, 9),
                }
            ),
        }
    )
)
def test_yaml_round_trip_loses_nothing(tmp_path_factory, values):
    config = FullConfig.from_mapping(values, source="test")
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    config.to_yaml(path)
    assert FullConfig.from_yaml(path) == config


def test_text_that_no_path_can_hold_is_refused():
    with pytest.raises(ConfigError, match=r"data\.packed_dir breaks the rule .*no NUL character"):
        FullConfig.from_mapping({"data": {"packed_dir": "a\0b"}}, source="test")


def test_exponent_without_a_dot_is_a_number(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("training: {learning_rate: 2e-4, adam_epsilon: 1E-9}")
    assert FullConfig.from_yaml(path).training.learning_rate == 2e-4


def test_text_is_utf_8_in_any_locale(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("infra: {wandb_project: Größe}  # ½\n", encoding="utf-8")
    read = (
        "import sys; from encdec.training.config import FullConfig;"
        "assert FullConfig.from_yaml(sys.argv[1]).infra.wandb_project == 'Gr\\xf6\\xdfe'"
    )
    ascii_locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", read, str(path)], env=ascii_locale, cwd=REPOSITORY, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_section_with_nothing_under_it_is_as_one_left_out(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("model:\ndata:\ntraining:\ninfra:\nphases:\n")
    assert FullConfig.from_yaml(path) == FullConfig()
    path.write_text("phases:\n  sanity_check:\n  full: {num_train_steps: 7}\n")
    assert FullConfig.from_yaml(path).phases["full"].num_train_steps == 7
    path.write_text("training:\n  seed:\n")  # a key with nothing behind it is a slip
    with pytest.raises(ConfigError, match=r"training\.seed"):
        FullConfig.from_yaml(path)


@pytest.mark.parametrize("text", ["infra: 3", "infra: [device, cpu]", "infra: cpu", "phases: 3", "phases: {full: 3}"])
def test_section_that_is_a_value_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="must be a section of keys and values, found"):
        FullConfig.from_yaml(path)


@pytest.mark.parametrize("text", ["at: 2020-13-45", "1: 2", "null: 3", "{a: 1}: 2", "n: " + "9" * 5000])
def test_odd_yaml_is_refused_in_one_paragraph(tmp_path: Path, text: str):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        FullConfig.from_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_valid(file: Path):
    if file.name.startswith("accelerate"):
        values = yaml.safe_load(file.read_text())
        assert values["use_cpu"] is False  # true would collapse to one process
    else:
        (PipelineConfig.load if file.name.startswith("pipeline") else FullConfig.from_yaml)(file)


def test_phase_table():
    rows = {
        str(p.phase): (p.num_tokens, p.num_train_steps, p.eval_steps, p.save_steps, p.logging_steps)
        for p in PHASE_CONFIGS.values()
    }
    assert rows == {
        "sanity_check": (10**7, 100, 50, 100, 1),
        "validation": (10**9, 5_000, 500, 1_000, 10),
        "medium": (10**11, 50_000, 1_000, 5_000, 10),
        "full": (5 * 10**11, 100_000, 500, 10_000, 10),
    }
    assert [(p.max_loss_after_warmup, p.min_loss_decrease) for p in PHASE_CONFIGS.values()] == [
        (15.0, 0.1), (8.0, 0.5), (5.0, 1.0), (4.0, 1.5),
    ]  # fmt: skip
    bare = PhaseConfig(TrainingPhase.FULL, 1, "x")
    assert (bare.num_train_steps, bare.eval_steps, bare.save_steps, bare.logging_steps) == (None,) * 4
    assert (bare.max_loss_after_warmup, bare.min_loss_decrease) == (10.0, 0.1)


def test_estimates():
    assert estimate_steps_for_tokens(1_000, 2, 10, 3, 4) == 1_000 // 240
    assert estimate_training_time(7200, 0.5) == {"seconds": 3600, "minutes": 60, "hours": 1, "days": 1 / 24}


def test_precedence_default_table_file_setting(tmp_path: Path):
    base = yaml.safe_load(TINY.read_text())
    base["training"]["num_train_steps"] = 7  # the training section gives way to the table
    base["phases"] = {}
    path = tmp_path / "c.yaml"

    def steps(*settings: str) -> int:
        path.write_text(yaml.safe_dump(base))
        run = resolve_run(TrainingPhase.SANITY_CHECK, config_file=path, settings=settings)
        return run.config.training.num_train_steps

    assert steps() == 100
    base["phases"] = {"sanity_check": {"num_train_steps": 50}}
    assert steps() == 50
    assert steps("training.num_train_steps=20") == 20


def test_whichever_of_steps_and_tokens_comes_first_binds():
    run = resolved()
    assert (run.bound_by, run.num_train_steps) == ("steps", 100)
    few = resolved(f"training.total_tokens={run.tokens_per_step * 30 + 5}")
    assert (few.bound_by, few.num_train_steps) == ("tokens", 30)


def test_warm_up_is_at_most_a_tenth_of_the_phase():
    assert resolved().warmup_steps == 10
    assert resolved("training.warmup_steps=3").warmup_steps == 3


def test_global_batch_follows_the_ranks_unless_it_is_given():
    free = ("training.global_batch_size=null", "training.gradient_accumulation_steps=3")
    assert resolved(*free, ranks_per_node=4).global_batch_size == 8 * 3 * 4
    assert resolved(ranks_per_node=4).global_batch_size == 16
    assert resolved(ranks_per_node=4).micro_batches(4) == (4, 1)


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 16))
def test_division_of_the_global_batch(share: int, largest: int, world: int):
    micro, accumulation = divide_global_batch(share * world, largest, world)
    assert micro * accumulation * world == share * world
    assert 1 <= micro <= largest


def test_identity_is_what_is_computed_not_where():
    run = resolved()
    assert resolved(name="other", ranks_per_node=1).identity == run.identity
    assert resolved("infra.output_dir=there", "infra.logging_dir=elsewhere").identity == run.identity
    assert resolved("training.seed=1").identity != run.identity
    assert resolved(phase=TrainingPhase.VALIDATION).identity != run.identity
    assert run.name == f"sanity_check-{run.identity[:8]}"


@pytest.mark.parametrize("phase", [None, *TrainingPhase])
def test_run_yaml_round_trip(tmp_path: Path, phase: TrainingPhase | None):
    run = resolved(phase=phase)
    paths = RunPaths(tmp_path)
    run.write(paths.run_yaml)
    assert read_run_config(paths) == run
    require_same_run(paths, run)
    with pytest.raises(RunDirectoryError, match=r"config\.training\.seed: 42 there, 9 now"):
        require_same_run(paths, resolved("training.seed=9", phase=phase))


def test_indivisible_global_batch_is_refused():
    with pytest.raises(ConfigError, match="global_batch_size=16 on 3 ranks"):
        resolved(ranks_per_node=3)
