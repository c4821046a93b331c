"""The pipeline for real, in small: scales trained on real text, here and by torchrun, judged by real gates."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError, RunDirectoryError
from encdec.files import RunPaths
from encdec.gates import GateLevel, ValidationGate
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.pipeline.config import PipelineConfig, create_quick_test_config
from encdec.pipeline.facts import RunFacts
from encdec.pipeline.results import ScaleResult, print_results
from encdec.pipeline.runner import PipelineRunner
from encdec.pipeline.scales import ModelScale, ScaleConfig
from encdec.pipeline.seed_suites import write_seed_suite
from encdec.records import read_json_lines
from encdec.weight_initialization import build_from_scratch

TOLD = ValidationGate("tool_accuracy", "tool_accuracy", 0.30, ">", required=False)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


def config_in(folder: Path, packed: Path, *gates: ValidationGate, **changes: Any) -> PipelineConfig:
    training = create_quick_test_config()
    training.data.packed_dir = str(packed)
    training.validation_gates = list(gates)
    for key, value in changes.items():
        setattr(training, key, value)
    return PipelineConfig(training=training, checkpoint_dir=str(folder), eval_generations=2)


def refuse_constant(constant: str) -> NoReturn:
    raise ValueError(constant)


def strict_records(path: Path) -> list[dict[str, Any]]:
    """As jq reads them: no NaN."""
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()]


class Progressive:
    """TINY, then SMALL, both shrunk, with real gates; the tool calls that nothing here teaches are told only."""

    def __init__(self, folder: Path, packed: Path) -> None:
        self.config = config_in(folder, packed, TOLD)
        suite = write_seed_suite("tool_accuracy", folder / "tools.jsonl", items=2)
        self.config.eval_benchmarks = {"tool_accuracy": str(suite)}
        self.runner = PipelineRunner(self.config)
        self.handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        self.results = self.runner.run_progressive("tiny", "small")


@pytest.fixture(scope="module")
def progressive(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Progressive:
    return Progressive(tmp_path_factory.mktemp("progressive"), packed)


def test_progressive_earns_each_scale(progressive: Progressive):
    assert [(result.scale, result.success) for result in progressive.results] == [("tiny", True), ("small", True)]
    tiny, small = progressive.results
    assert list(tiny.gates) == [GateLevel.QUICK, GateLevel.STANDARD, GateLevel.FULL]
    assert list(small.gates) == [GateLevel.QUICK, GateLevel.STANDARD]
    assert (tiny.step, small.step) == (200, 200)
    assert tiny.parameters < small.parameters
    for result in progressive.results:
        records = list(read_json_lines(RunPaths(Path(result.run_dir)).attempt(0).steps))
        assert result.final_loss == pytest.approx(sum(r["loss"] for r in records[-20:]) / 20)
        assert result.training_time_seconds == pytest.approx(sum(r["step_seconds"] for r in records))
        assert 0 < result.final_loss < records[0]["loss"]


def test_evidence_is_measured_and_written(progressive: Progressive):
    tiny = progressive.results[0]
    full = {item.gate: item for item in tiny.gates[GateLevel.FULL].evidence}
    assert full["min_accuracy"].value > 0.10 and "held-out samples, step 200" in full["min_accuracy"].measured
    assert full["tool_accuracy"].value == 0.0 and "0 of 2 of" in full["tool_accuracy"].measured
    for level in (GateLevel.STANDARD, GateLevel.FULL):
        written = strict_json_file(RunPaths(Path(tiny.run_dir)).gates / f"pipeline-{level}.json")
        assert written["evidence"] == tiny.gates[level].to_json()["evidence"]
        assert (written["passed"], written["step"], written["checkpoint"]) == (True, 200, "step-200")


def strict_json_file(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(), parse_constant=refuse_constant)


def test_results_are_one_strict_json_line_a_scale(progressive: Progressive):
    records = strict_records(progressive.config.experiment_dir / "results.jsonl")[:2]
    assert [(r["scale"], r["success"], r["failures"]) for r in records] == [("tiny", True, []), ("small", True, [])]
    assert records[0]["gates"]["standard"]["passed"] is True


def test_production_is_asked_for_on_demand_and_lacks_what_nobody_supplied(progressive: Progressive):
    config = progressive.config.model_copy(deep=True)
    config.strict_validation = False
    result = PipelineRunner(config).run(GateLevel.PRODUCTION)
    assert list(result.gates) == list(GateLevel)
    production = {item.gate: item for item in result.gates[GateLevel.PRODUCTION].evidence}
    assert result.failures == ["gsm8k_accuracy", "safety_accuracy"]
    assert "eval_benchmarks.gsm8k_accuracy names no file" in production["gsm8k_accuracy"].measured
    assert production["latency_p99"].passed and "2 answers of 64 tokens" in production["latency_p99"].measured


def test_signal_handlers_are_left_as_they_were(progressive: Progressive):
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == progressive.handlers


def test_the_same_call_again_trains_nothing_and_judges_anew(progressive: Progressive):
    again = PipelineRunner(progressive.config).run()
    assert again.success and again.final_loss == progressive.results[0].final_loss
    assert RunFacts.read(RunPaths(Path(again.run_dir)), 200).last_step == 200
    first = {item.gate: item.value for item in progressive.results[0].gates[GateLevel.STANDARD].evidence}
    assert {item.gate: item.value for item in again.gates[GateLevel.STANDARD].evidence} == first


FAILING = [
    # gates laid over the table's, the gate that stops, scales that were trained
    ([], "tool_accuracy", GateLevel.FULL),  # no suite is given: nobody measured it
    ([TOLD, ValidationGate("min_accuracy", "accuracy", 0.99, ">")], "min_accuracy", GateLevel.FULL),
    ([TOLD, ValidationGate("perplexity", "perplexity", 1.5)], "perplexity", GateLevel.STANDARD),
    ([TOLD, ValidationGate("loss_decreasing", "loss_decrease", 50.0, ">=")], "loss_decreasing", GateLevel.STANDARD),
]


@pytest.mark.parametrize(("gates", "name", "level"), FAILING)
def test_a_failed_gate_stops_before_the_next_scale(
    gates: list[ValidationGate], name: str, level: GateLevel, progressive: Progressive, packed: Path, tmp_path: Path
):
    config = config_in(Path(progressive.config.checkpoint_dir), packed, *gates)
    runner = PipelineRunner(config)
    results = runner.run_progressive("tiny", "medium")
    assert [(result.scale, result.success, result.cause) for result in results] == [("tiny", False, "gate")]
    assert results[0].failures == [name] and results[0].exit_code == 3
    assert list(results[0].gates)[-1] == level
    assert not (config.experiment_dir / "medium").exists()
    out = io.StringIO()
    print_results(results, list(ModelScale)[:3], Console(file=out))
    lines = out.getvalue().splitlines()
    assert name in next(line for line in lines if line.startswith("tiny")) and "FAILED" in out.getvalue()
    assert sum("not begun" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("cause", "verdict"),
    [("complete", "success"), ("gate", "FAILED"), ("crash", "FAILED"), ("refused", "FAILED"), ("signalled", "stopped"),
     ("stop_requested", "stopped")],
)  # fmt: skip
def test_a_clean_stop_is_no_failure(cause: str, verdict: str):
    result = ScaleResult(
        experiment="x", scale=ModelScale.TINY, success=cause == "complete", cause=cause, reason="why", final_loss=1.0,
        training_time_seconds=1.0, step=3, parameters=9, run_dir="x", checkpoint=None,
    )  # fmt: skip
    assert result.summary() == f"tiny: {verdict}, why"


def test_not_strict_reports_and_goes_on(progressive: Progressive, packed: Path):
    config = config_in(Path(progressive.config.checkpoint_dir), packed)
    config.strict_validation = False
    results = PipelineRunner(config).run_progressive("tiny", "small")
    assert [result.success for result in results] == [True, True]
    assert results[0].failures == ["tool_accuracy"] and "tool_accuracy" in results[0].reason


def test_another_configuration_keeps_out_of_an_old_runs_directory(progressive: Progressive, packed: Path):
    config = config_in(Path(progressive.config.checkpoint_dir), packed, learning_rate=1e-3)
    with pytest.raises(RunDirectoryError, match=r"training\.learning_rate: 0.005 there, 0.001 now"):
        PipelineRunner(config).run()


def test_quick_ends_a_run_that_is_none(packed: Path, tmp_path: Path):
    """A bound that no loss keeps: the first look after warm-up, at step 300, ends it."""
    gate = ValidationGate("loss_reasonable", "loss", 0.5)
    result = PipelineRunner(config_in(tmp_path, packed, gate, max_steps=2_000)).run()
    assert (result.success, result.cause, result.exit_code) == (False, "gate", 3)
    assert result.failures == ["loss_reasonable"] and list(result.gates) == [GateLevel.QUICK]
    assert result.step == 300
    assert "mean training loss" in result.gates[GateLevel.QUICK].evidence[0].measured


def test_only_reported_gates_end_no_run(packed: Path, tmp_path: Path):
    gate = ValidationGate("loss_reasonable", "loss", 0.5)
    config = config_in(tmp_path, packed, gate, max_steps=150)
    config.strict_validation = False
    result = PipelineRunner(config).run()
    assert result.step == 150 and result.cause == "complete"
    assert "loss_reasonable" in result.failures


def test_a_diverged_run_names_its_gate(packed: Path, tmp_path: Path):
    settings = create_quick_test_config().settings | {"training.max_grad_norm": 1e30, "training.warmup_steps": 0}
    result = PipelineRunner(config_in(tmp_path, packed, learning_rate=1e30, settings=settings)).run()
    assert (result.success, result.cause, result.exit_code) == (False, "gate", 3)
    assert "no_nan" in result.failures
    json.loads(json.dumps(result.to_json()), parse_constant=refuse_constant)


def wide_model(sizes: ScaleConfig, tokenizer: Any) -> Qwen3ForSeq2SeqLM:
    """Another shape than the scale's: two encoder layers more."""
    config = Qwen3EncoderDecoderConfig(
        **sizes.architecture.model_dump(), num_encoder_layers=sizes.num_hidden_layers + 2, vocab_size=len(tokenizer),
        num_sentinel_tokens=16, sentinel_start_id=tokenizer.sentinel_ids[0], pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.decoder_start_token_id,
    )  # fmt: skip
    return build_from_scratch(config, 7)


def test_a_model_of_ones_own(packed: Path, tmp_path: Path):
    runner = PipelineRunner(config_in(tmp_path, packed, max_steps=4), wide_model)
    result = runner.run()
    assert result.cause == "complete", result.reason
    described = json.loads((Path(result.run_dir) / "model" / "config.json").read_text())
    assert (described["num_encoder_layers"], described["num_hidden_layers"]) == (3, 1)
    assert "step 4" in result.gates[GateLevel.STANDARD].evidence[3].measured


def test_a_factory_must_return_a_model_that_can_be_sharded(packed: Path, tmp_path: Path):
    from torch import nn

    with pytest.raises(ConfigError, match=r"transformer_layers.*found Linear"):
        PipelineRunner(config_in(tmp_path, packed, max_steps=4), lambda sizes, tokenizer: nn.Linear(2, 2)).run()
    with pytest.raises(ConfigError, match="known to this process alone"):
        PipelineRunner(config_in(tmp_path, packed, num_gpus=2), wide_model)


def test_two_ranks_by_torchrun_train_as_one(packed: Path, tmp_path: Path):
    """Launched elsewhere, the run is read from its directory, and comes to the same."""
    here = PipelineRunner(config_in(tmp_path / "here", packed, max_steps=6, micro_batch_size=4)).run()
    there = PipelineRunner(config_in(tmp_path / "there", packed, max_steps=6, micro_batch_size=4, num_gpus=2)).run()
    assert here.cause == there.cause == "complete"
    assert there.final_loss == pytest.approx(here.final_loss, rel=1e-4)
    assert there.step == 6 and GateLevel.STANDARD in there.gates


@pytest.mark.parametrize(
    ("code", "cause", "exit_code"),
    [(1, "crash", 1), (3, "gate", 3), (75, "stop_requested", 75), (78, "refused", 78)],
)
def test_a_launch_that_fails(code: int, cause: str, exit_code: int, packed: Path, tmp_path: Path):
    asked: list[tuple[Path, Path]] = []

    def launch(config_file: Path, run_dir: Path) -> int:
        asked.append((config_file, run_dir))
        return code

    config = config_in(tmp_path, packed)
    result: ScaleResult = PipelineRunner(config, launch=launch).run()
    assert (result.success, result.cause, result.exit_code) == (False, cause, exit_code)
    assert f"exit code {code}" in result.reason and result.step == 0
    assert asked == [(config.experiment_dir / "tiny.yaml", config.experiment_dir / "tiny")]
    assert strict_records(config.experiment_dir / "results.jsonl")[0]["final_loss"] is None
