"""What validate_infrastructure finds, on a place that is good and on places that are not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from encdec.errors import MissingPrerequisite
from encdec.gates import GateLevel, ValidationGate
from encdec.pipeline.config import PipelineConfig, create_quick_test_config
from encdec.pipeline.preflight import InfrastructureReport
from encdec.pipeline.runner import PipelineRunner
from encdec.pipeline.scales import ModelScale
from encdec.pipeline.seed_suites import write_seed_suite

CHECKS = {
    "process", "checkpoint_dir", "device", "tokenizer", "data", "suites", "gates", "wandb", "configuration", "disk",
    "memory",
}  # fmt: skip


def config_in(folder: Path, **changes: Any) -> PipelineConfig:
    training = create_quick_test_config()
    for key, value in changes.items():
        setattr(training, key, value)
    return PipelineConfig(training=training, checkpoint_dir=str(folder))


def failed(report: InfrastructureReport) -> dict[str, str]:
    return {check.name: check.message for check in report.checks if not check.passed}


def test_a_good_place_passes_every_check(tmp_path: Path):
    config = config_in(tmp_path / "new")
    config.eval_benchmarks = {"tool_accuracy": str(write_seed_suite("tool_accuracy", tmp_path / "t", items=3))}
    report = PipelineRunner(config).validate_infrastructure(levels=[GateLevel.STANDARD, GateLevel.FULL])
    assert failed(report) == {}
    assert report and {check.name for check in report.checks} == CHECKS
    said = {check.name: check.message for check in report.checks}
    assert said["suites"] == "tool_accuracy 3 items"
    assert said["configuration"] == "200 steps of 8 samples"
    assert list((tmp_path / "new" / "quick-test").iterdir()) == []
    report.require()


BAD = [
    ({"data": {"dataset_name": "/nowhere/text.jsonl"}}, "data", "/nowhere/text.jsonl"),
    ({"train_tokenizer_vocab_size": None, "tokenizer_name_or_path": "./no-tokenizer"}, "tokenizer", "no-tokenizer"),
    ({"settings": {"training.optimiser": "adamw"}}, "configuration", "optimizer instead"),
]


@pytest.mark.parametrize(("changes", "name", "said"), BAD)
def test_bad_configurations(changes: dict[str, Any], name: str, said: str, tmp_path: Path):
    if "data" in changes:
        changes = {"data": create_quick_test_config().data.model_copy(update=changes["data"])}
    report = PipelineRunner(config_in(tmp_path, **changes)).validate_infrastructure()
    assert name in failed(report), report.lines()
    assert said in failed(report)[name]
    with pytest.raises(MissingPrerequisite, match=f"{name}: "):
        report.require()


def test_a_folder_that_takes_no_files(tmp_path: Path):
    (tmp_path / "file").write_text("")
    report = PipelineRunner(config_in(tmp_path / "file")).validate_infrastructure()
    assert "Not a directory" in failed(report)["checkpoint_dir"]


def test_a_scale_beyond_this_machines_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_in(tmp_path, model_overrides=create_quick_test_config().model_overrides)
    overrides = config.training.model_overrides
    overrides.hidden_size = overrides.intermediate_size = 2**20
    overrides.num_hidden_layers = 1000
    report = PipelineRunner(config).validate_infrastructure()
    assert {"disk", "memory"} <= set(failed(report))
    assert "Weights, gradients and moments must fit" in failed(report)["memory"]
    assert "checkpoints and their average" in failed(report)["disk"]


def test_all_scales_of_a_progressive_run_are_looked_at_before_the_first(tmp_path: Path):
    config = config_in(tmp_path)
    config.training.scale_overrides[ModelScale.SMALL].num_key_value_heads = 7
    runner = PipelineRunner(config)
    with pytest.raises(MissingPrerequisite, match=r"configuration small: .*must divide"):
        runner.run_progressive("tiny", "small")
    assert not (config.experiment_dir / "tiny").exists()


def test_ranks_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config = config_in(tmp_path, device="cuda")
    assert "need a GPU" in failed(PipelineRunner(config).validate_infrastructure())["device"]
    launched = PipelineRunner(config, launch=lambda config_file, run_dir: 0).validate_infrastructure()
    assert "device" not in failed(launched) and "memory" not in failed(launched)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE=2" in failed(PipelineRunner(config_in(tmp_path)).validate_infrastructure())["process"]


def test_suites_are_read_to_their_last_line(tmp_path: Path):
    config = config_in(tmp_path)
    path = write_seed_suite("arithmetic_accuracy", tmp_path / "a.jsonl", items=5)
    path.write_text(path.read_text() + json.dumps({"question": "2 + 2 ="}) + "\n")
    config.eval_benchmarks = {"arithmetic_accuracy": str(path)}
    assert "line 6" in failed(PipelineRunner(config).validate_infrastructure())["suites"]
    config.eval_benchmarks = {"arithmetic": str(path)}
    assert "arithmetic_accuracy" in failed(PipelineRunner(config).validate_infrastructure())["suites"]


def test_gates_that_cannot_be_measured_are_told_and_end_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = config_in(tmp_path)
    levels = [GateLevel.STANDARD, GateLevel.FULL]
    report = PipelineRunner(config).validate_infrastructure(levels=levels)
    assert set(failed(report)) == {"gates"}
    assert "full: eval_benchmarks.tool_accuracy names no file" in failed(report)["gates"]
    report.require()
    assert "names no file" in caplog.text
    config.training.validation_gates = [ValidationGate("mine", "my_metric", 1.0)]
    report = PipelineRunner(config).validate_infrastructure(levels=levels)
    assert "full: no evaluator for my_metric" in failed(report)["gates"]
    report = PipelineRunner(config, evaluators={"my_metric": lambda _: 0.0}).validate_infrastructure(levels=levels)
    assert "my_metric" not in failed(report)["gates"]


@pytest.mark.parametrize(("environment", "passed"), [({}, False), ({"WANDB_MODE": "offline"}, True),
                                                     ({"WANDB_API_KEY": "x" * 40}, True)])  # fmt: skip
def test_wandb_login(environment: dict[str, str], passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    report = PipelineRunner(config_in(tmp_path, use_wandb=True)).validate_infrastructure()
    assert ("wandb" not in failed(report)) is passed
