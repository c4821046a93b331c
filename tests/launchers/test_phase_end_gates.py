"""Gates that are judged on the plain model at the end of a phase: FULL, PRODUCTION, and one's own by an evaluator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from encdec.errors import ConfigError
from encdec.files import RunPaths
from encdec.gates import END_METRICS, GateLevel
from encdec.pipeline.evaluators import EVALUATORS
from encdec.training.execution import PHASE_CONFIGS, TrainingPhase
from encdec.training.promotion import read_gate
from encdec.training.run_config import resolve_run
from tests.conftest import MICRO, Lab

SANITY = TrainingPhase.SANITY_CHECK


def config_with(folder: Path, **row: object) -> Path:
    values = yaml.safe_load(MICRO.read_text())
    values["phases"]["sanity_check"].update(row)
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def train(lab: Lab, config: Path, *extra: str) -> tuple[int, str, RunPaths]:
    paths = RunPaths(lab.root / "run")
    words = ("--config", str(config), "--set", f"data.packed_dir={lab.packed}", *extra)
    where = ("--phase", "sanity_check", "--cluster", "local", "--run-dir", str(paths.root))
    return *lab.run("launchers.submit", *where, *words), paths


def test_evaluators_measure_all_that_a_phase_may_ask_for():
    assert set(END_METRICS) <= EVALUATORS.keys()


def test_which_gates_are_judged_where():
    row = PHASE_CONFIGS[TrainingPhase.MEDIUM]
    assert row.gates_at_end == ()
    for levels, thresholds in (
        ((GateLevel.FULL,), {"no_nan": 0, "min_accuracy": 0.10, "tool_accuracy": 0.30}),
        ((GateLevel.FULL, GateLevel.PRODUCTION), {"tool_accuracy": 0.85, "latency_p99": 5.0}),
    ):
        gates = {gate.name: gate.threshold for gate in replace(row, gates=levels).gates_at_end}
        assert thresholds.items() <= gates.items()


def test_own_gate_by_an_evaluator_is_measured_on_the_checkpoint(lab: Lab):
    own = [{"name": "right", "metric_name": "accuracy", "threshold": 0.0, "comparison": ">="}]
    code, output, paths = train(lab, config_with(lab.root, custom_gates=own))
    assert code == 0, output
    gate = read_gate(paths, SANITY)
    assert gate is not None
    [item] = [item for item in gate.evidence if item.gate == "right"]
    assert item.passed and item.value is not None and 0 <= item.value <= 1
    assert "step 60" in item.measured


def test_level_with_a_metric_that_nobody_measured_closes_the_gate(lab: Lab):
    """No suite of tool calls is given: FULL cannot be passed."""
    code, output, paths = train(lab, config_with(lab.root, gates=["quick", "full"]))
    assert code == 3, output
    gate = read_gate(paths, SANITY)
    assert gate is not None and not gate.passed
    failed = {item.gate: item for item in gate.failures}
    assert failed["tool_accuracy"].value is None and "nobody measured it" in failed["tool_accuracy"].measured
    assert "tool_accuracy" in output


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.eval_benchmarks={tool_accuracy: /nowhere.jsonl}", "no file at /nowhere.jsonl"),
        ("data.eval_benchmarks={tool: x}", "names metrics: accuracy"),
    ],
)
def test_suites_must_be_there_before_anything_starts(setting: str, words: str):
    with pytest.raises(ConfigError, match=words):
        resolve_run(SANITY, config_file=MICRO, settings=[setting])
