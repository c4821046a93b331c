"""python -m encdec.sanity_check on all that it can be given: ten verdicts each time, and an exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from encdec.checkpoints import __main__ as checkpoints
from encdec.files import RunPaths
from encdec.model_checks import CHECKS, LOADING
from encdec.sanity_check import main
from tests.conftest import MICRO, Lab

TEN = [*LOADING, *CHECKS]


@pytest.fixture(scope="module")
def exported(twin: RunPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert checkpoints.main(["export", str(twin.root), str(out)]) == 0
    return out


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def verdicts(capsys: pytest.CaptureFixture[str], *argv: str, code: int) -> dict[str, tuple[bool, str]]:
    assert main([*argv, "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in document["checks"]] == TEN
    assert document["passed"] == (code == 0)
    return {check["name"]: (check["passed"], check["message"]) for check in document["checks"]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_saved_model(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str):
    report = tmp_path / "report.json"
    found = verdicts(capsys, "--model-path", str(exported), "--dtype", dtype, "--report", str(report), code=0)
    assert dtype in found["model_loads"][1]
    document = json.loads(report.read_text())
    assert document["passed"] and document["model"] == str(exported) and document["dtype"] == dtype


def test_a_run_and_a_runs_configuration(lab: Lab, twin: RunPaths, capsys: pytest.CaptureFixture[str]):
    verdicts(capsys, "--model-path", str(twin.root), code=0)
    verdicts(capsys, "--config", str(MICRO), "--set", f"data.packed_dir={lab.packed}", code=0)
    modes = ["--set", "model.use_mode_tokens=true", "--set", f"data.packed_dir={lab.packed}"]
    verdicts(capsys, "--config", str(MICRO), *modes, code=0)
    seen = capsys.readouterr()
    assert main(["--config", str(MICRO), "--set", "model.from_scratch.head_dim=3"]) == 78
    assert seen.err == "" and "head_dim" in capsys.readouterr().err


def test_a_name_that_is_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "absent"), "nobody/no-such-model"):
        found = verdicts(capsys, "--model-path", name, code=1)
        assert not any(passed for passed, _ in found.values())


def test_a_missing_tensor_is_not_drawn_at_random(copied: Path, capsys: pytest.CaptureFixture[str]):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    found = verdicts(capsys, "--model-path", str(copied), code=1)
    assert "1 missing keys, encoder.layers.0.mlp.up_proj.weight" in found["model_loads"][1]


def test_numbers_that_are_none(copied: Path, capsys: pytest.CaptureFixture[str]):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors["decoder.norm.weight"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    found = verdicts(capsys, "--model-path", str(copied), code=1)
    assert not found["loss_in_range"][0] and not found["gradient_norm"][0]


def test_a_damaged_file_and_a_foreign_tokenizer(copied: Path, exported: Path, capsys: pytest.CaptureFixture[str]):
    config = json.loads((copied / "config.json").read_text())
    ids = {"num_sentinel_tokens": config["num_sentinel_tokens"] - 1}
    (copied / "config.json").write_text(json.dumps(config | ids))
    found = verdicts(capsys, "--model-path", str(copied), code=1)
    assert found["model_loads"][0] and "num_sentinel_tokens" in found["tokenizer_loads"][1]
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:5_000])
    assert not verdicts(capsys, "--model-path", str(copied), code=1)["model_loads"][0]


def test_command_lines_that_are_not_understood(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for argv in (
        [], ["--model-path", "a", "--config", "b"], ["--model-path", "a", "--set", "model.num_sentinel_tokens=1"],
        ["--model-path", str(exported), "--device", "abacus"],
    ):  # fmt: skip
        assert main(argv) == 78, argv
        assert capsys.readouterr().err.startswith("error: ")


def test_paths_that_are_no_models(twin: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = next(path for path in twin.checkpoints.iterdir() if (path / "manifest.json").is_file())
    said = verdicts(capsys, "--model-path", str(checkpoint), code=1)["model_loads"][1]
    assert "a run's checkpoint" in said and "encdec.checkpoints export" in said
    said = verdicts(capsys, "--model-path", str(tmp_path / "absent"), code=1)["model_loads"][1]
    assert "no such folder" in said and "Correct the path" in said


def test_verdicts_come_before_a_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    absent = str(tmp_path / "absent")
    assert main(["--model-path", absent, "--report", str(tmp_path / "no" / "report.json")]) == 78
    seen = capsys.readouterr()
    assert seen.out == "" and "no such folder" in seen.err
    assert main(["--model-path", absent, "--report", str(tmp_path)]) == 78
    seen = capsys.readouterr()
    assert "FAIL" in seen.out and "--report must name a file" in seen.err
