"""Every gate of every level: what passes, what nearly does, what nobody measured, what is no number."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from encdec.errors import ExitCode, GateNotPassed
from encdec.gates import (
    GATES,
    LOSS_DECREASING,
    NOT_MEASURED,
    GateLevel,
    GateReport,
    Measurement,
    ValidationGate,
    judge,
)
from encdec.pipeline.config import GateConfig
from encdec.pipeline.runner import gates_by_level
from encdec.pipeline.validator import PipelineValidator, asked_at, gates_at

# level, gate, metric, passes, nearly passes
TABLE = [
    ("quick", "loss_reasonable", "loss", 99.99, 100.0),
    ("quick", "no_nan", "nan_count", 0, 1),
    ("standard", "loss_reasonable", "loss", 9.999, 10.0),
    ("standard", "no_nan", "nan_count", 0, 1),
    ("standard", "gradient_norm", "grad_norm", 99.9, 100.0),
    ("standard", "perplexity", "perplexity", 999.9, 1000.0),
    ("full", "no_nan", "nan_count", 0, 1),
    ("full", "min_accuracy", "accuracy", 0.101, 0.10),
    ("full", "tool_accuracy", "tool_accuracy", 0.301, 0.30),
    ("production", "gsm8k_accuracy", "gsm8k_accuracy", 0.501, 0.50),
    ("production", "tool_accuracy", "tool_accuracy", 0.851, 0.85),
    ("production", "safety_accuracy", "safety_accuracy", 0.951, 0.95),
    ("production", "latency_p99", "latency_p99", 4.99, 5.0),
]
GOOD = {(level, metric): good for level, _, metric, good, _ in TABLE}


def test_the_table_has_these_rows_and_no_others():
    assert [(level, gate.name, gate.metric_name) for level, gates in GATES.items() for gate in gates] == [
        row[:3] for row in TABLE
    ]
    assert LOSS_DECREASING.name == "loss_decreasing"


def measured(level: str, **others: float | None) -> dict[str, Measurement]:
    values = {metric: value for (at, metric), value in GOOD.items() if at == level} | others
    return {metric: Measurement(value, "here") for metric, value in values.items() if value is not None}


@pytest.mark.parametrize(("level", "name", "metric", "good", "near"), TABLE)
def test_gate(level: str, name: str, metric: str, good: float, near: float):
    validator = PipelineValidator(strict=False)
    report = validator.judge(GateLevel(level), None, measured(level))
    assert report.passed and report.failures == []
    for value, said in (
        (near, f"{near:.4g}"),
        (None, NOT_MEASURED),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
    ):
        report = validator.judge(GateLevel(level), None, measured(level, **{metric: value}))
        assert [item.gate for item in report.failures] == [name]
        assert not report.passed
        assert name in report.summary() and said in report.summary()
        json.loads(json.dumps(report.to_json(), allow_nan=False))


def test_no_evidence_passes_nothing():
    assert not GateReport(()).passed


def test_strict_raises_with_exit_code_3_and_keeps_the_verdict():
    validator = PipelineValidator(strict=True)
    assert validator.validate_quick(None, 99.0, 100).passed
    with pytest.raises(GateNotPassed, match=r"level quick.*loss_reasonable: loss 150, must be < 100") as caught:
        validator.validate_quick(None, 150.0, 200)
    assert caught.value.exit_code == ExitCode.GATE_NOT_PASSED == 3
    assert [(v.step, v.report.passed) for v in validator.results] == [(100, True), (200, False)]


def test_a_gate_that_is_not_required_is_told_and_stops_nobody():
    gate = ValidationGate("perplexity", "perplexity", 5.0, "<", required=False)
    report = PipelineValidator(True, [gate]).judge(GateLevel.STANDARD, None, measured("standard"))
    assert report.passed and [item.gate for item in report.evidence if not item.passed] == ["perplexity"]


@pytest.mark.parametrize(
    ("loss", "poison", "failed"),
    [
        (2.0, None, []),
        (math.nan, None, ["loss_reasonable", "no_nan"]),
        (math.inf, None, ["loss_reasonable", "no_nan"]),
        (2.0, "weight", ["no_nan"]),
        (2.0, "gradient", ["no_nan"]),
        (100.0, None, ["loss_reasonable"]),
    ],
)
def test_quick_looks_at_loss_weights_and_gradients(loss: float, poison: str | None, failed: list[str]):
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    if poison == "weight":
        model.weight.data[0, 0] = math.nan
    if poison == "gradient":
        model.bias.grad[0] = math.inf
    report = PipelineValidator(strict=False).validate_quick(model, loss, 100)
    assert [item.gate for item in report.failures] == failed
    assert model.training


ASKED = [
    (ValidationGate("perplexity", "perplexity", 1.0), ["standard"]),  # a name of the table: where it stands
    (ValidationGate("tool_accuracy", "tool_accuracy", 0.9, ">"), ["full", "production"]),
    (ValidationGate("mine", "loss", 1.0), ["quick", "standard", "full", "production"]),
    (ValidationGate("mine", "grad_norm", 1.0), ["standard", "full", "production"]),
    (ValidationGate("mine", "my_metric", 1.0), ["full", "production"]),
]


@pytest.mark.parametrize(("gate", "levels"), ASKED)
def test_where_a_custom_gate_is_asked_for(gate: ValidationGate, levels: list[str]):
    assert [level for level in GateLevel if asked_at(level, gate)] == levels
    for level in GateLevel:
        names = [row.name for row in gates_at(level, [gate])]
        assert (gate in gates_at(level, [gate])) is (level in levels)
        assert len(names) == len(set(names))


def test_gates_of_a_configuration_by_level():
    rows = [
        GateConfig(name="perplexity", metric_name="perplexity", threshold=50.0),
        GateConfig(name="fast", metric_name="latency_p50", threshold=1.0, levels=[GateLevel.PRODUCTION]),
        GateConfig(name="loss_decreasing", metric_name="loss_decrease", threshold=0.5, comparison=">="),
    ]
    custom = gates_by_level(rows)
    at = {level: {gate.name: gate.threshold for gate in gates_at(level, custom)} for level in GateLevel}
    assert at[GateLevel.STANDARD]["perplexity"] == 50.0
    assert at[GateLevel.STANDARD]["loss_decreasing"] == 0.5  # the user's, not the default's 0
    assert "fast" in at[GateLevel.PRODUCTION] and "fast" not in at[GateLevel.FULL]
    assert gates_at(GateLevel.STANDARD, gates_by_level([]))[-1] == LOSS_DECREASING


@pytest.mark.parametrize(("first", "last", "passed"), [(5.0, 4.9, True), (5.0, 5.0, True), (5.0, 5.1, False)])
def test_loss_decreasing(first: float, last: float, passed: bool):
    report = judge([LOSS_DECREASING], {"loss_decrease": Measurement(first - last, "here")})
    assert report.passed is passed


def test_summary_has_a_line_a_gate():
    validator = PipelineValidator(strict=False)
    validator.judge(GateLevel.FULL, None, measured("full", tool_accuracy=None), step=7)
    out = io.StringIO()
    validator.print_summary(Console(file=out))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["full", "7", "min_accuracy", "0.101", ">", "0.1", "passed", "here"] in lines
    assert ["full", "7", "tool_accuracy", "none", ">", "0.3", "FAILED", *NOT_MEASURED.split()] in lines
