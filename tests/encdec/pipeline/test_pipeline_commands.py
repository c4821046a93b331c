"""python -m encdec.pipeline: what it prints, and what it exits with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from encdec.pipeline.__main__ import main
from encdec.pipeline.scales import ModelScale, get_model_config
from tests.conftest import REPOSITORY

TINY = str(REPOSITORY / "configs" / "pipeline_tiny.yaml")


def test_scales(capsys: pytest.CaptureFixture[str]):
    assert main(["scales"]) == 0
    assert "flagship" in capsys.readouterr().out
    assert main(["scales", "--json", "--vocabulary", "1000"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["parameters"]["total"] for row in rows] == [
        get_model_config(scale).num_parameters(1000) for scale in ModelScale
    ]


def test_suite(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out = tmp_path / "a.jsonl"
    assert main(["suite", "arithmetic_accuracy", str(out), "--items", "3"]) == 0
    assert "3 questions for eval_benchmarks.arithmetic_accuracy" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 3


def test_validate(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    flags = ["--config", TINY, "--checkpoint-dir", str(tmp_path)]
    assert main(["validate", *flags, "--to", "tiny"]) == 0
    assert "all checks passed" in capsys.readouterr().out
    assert main(["validate", *flags, "--json", "--set", "training.data.dataset_name=/nowhere.txt"]) == 78
    checks = {check["name"]: check["passed"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["data"] is False and checks["disk small"] is True


def test_progressive_that_a_gate_ends(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    flags = ["--config", TINY, "--checkpoint-dir", str(tmp_path), "--set", f"training.data.packed_dir={tmp_path}/p"]
    gate = "{name: perplexity, metric_name: perplexity, threshold: 2}"
    settings = ["--set", "training.max_steps=4", "--set", f"training.validation_gates=[{gate}]"]
    assert main(["progressive", *flags, *settings, "--json"]) == 3
    done = json.loads(capsys.readouterr().out)
    assert done["success"] is False
    assert [(scale["scale"], scale["failures"]) for scale in done["scales"]] == [("tiny", ["perplexity"])]
    assert main(["run", *flags, *settings, "--through", "production"]) == 3
    shown = capsys.readouterr().out
    assert "gate not passed: perplexity" in shown and "success" not in shown.split("Scales")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--scale", "tony"], "Did you mean tiny"),
        (["run", "--config", "nowhere.yaml"], "must be readable"),
        (["run", "--config", TINY, "--set", "training.max_step=3"], "max_steps instead"),
        (["progressive", "--config", TINY, "--from", "small", "--to", "tiny"], "small to tiny"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_end_as_one_paragraph(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 78
    assert said in capsys.readouterr().err
