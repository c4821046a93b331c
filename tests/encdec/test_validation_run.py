"""The validation run as a program: trains, judges, leaves results for people and programs, keeps what passed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from tests.conftest import Lab


def validate(lab: Lab, out: Path, *extra: str) -> tuple[int, str]:
    here = ("--set", "infra.num_gpus=1", "--output-dir", str(out))
    return lab.run("encdec.validation_run", *lab.arguments(*here, *extra))


def read_strictly(path: Path) -> dict:
    """JSON as the standard has it: nan and infinity are none of it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def passed(session_folder: Path) -> Path:
    lab, out = Lab(session_folder, session_folder / "packed"), session_folder / "validated"
    code, output = validate(lab, out, "--num-steps", "40")
    assert code == 0, output
    assert "loss_decrease" in output and f"results: {out}" in output
    return out


def test_results_and_model_of_a_run_that_passed(passed: Path):
    results = read_strictly(passed / "validation_results.json")
    assert {"summary", "validation"} <= results.keys()
    assert results["validation"]["passed"] is True and results["gate"]["passed"] is True
    assert [check["name"] for check in results["validation"]["checks"]] == [
        "loss_after_warmup", "loss_decrease", "loss_spikes",
    ]  # fmt: skip
    assert results["summary"]["steps"] == 40
    assert results["summary"]["loss"]["decrease"] == pytest.approx(
        next(item["value"] for item in results["gate"]["evidence"] if item["metric"] == "loss_decrease"), abs=0.3
    )
    model = Qwen3ForSeq2SeqLM.from_pretrained(passed / "model")
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(passed / "model")
    tokenizer.assert_matches(model.config)


def test_given_model_is_what_is_validated(passed: Path, lab: Lab):
    """It begins where the one that passed has ended, so its loss cannot fall as much again: not passed, not kept."""
    out = lab.root / "again"
    code, output = validate(lab, out, "--num-steps", "10", "--model-path", str(passed / "model"))
    assert code == 3, output
    results = read_strictly(out / "validation_results.json")
    assert results["validation"]["passed"] is False
    [failed] = [item for item in results["gate"]["evidence"] if not item["passed"]]
    assert failed["gate"] == "loss_decreasing"
    before = read_strictly(passed / "validation_results.json")["summary"]["loss"]
    assert results["summary"]["loss"]["initial"] < before["initial"] - 0.5
    assert not list((out / "model").glob("*.safetensors"))


def test_model_that_is_not_there_is_refused(lab: Lab):
    code, output = validate(lab, lab.root / "out", "--model-path", "/nowhere/model")
    assert code == 78
    assert "model.model_name_or_path must be a folder" in output and not (lab.root / "out").exists()
