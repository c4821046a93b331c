"""Other programs read our payload folder and agree: torch's converter, Accelerate's merge-weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from encdec.files import RunPaths
from tests.encdec.checkpoints.conftest import load_model


@pytest.fixture
def parameters(twin: RunPaths) -> dict[str, torch.Tensor]:
    return dict(load_model(twin, 60).named_parameters())


def require_agreement(found: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> None:
    weights = {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith("model.")}
    assert weights.keys() == parameters.keys()
    assert all(torch.equal(weights[name], parameter) for name, parameter in parameters.items())


def test_torchs_converter(twin: RunPaths, parameters, tmp_path: Path):
    dcp_to_torch_save(twin.checkpoints / "step-60" / "fsdp2", tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    require_agreement(state, parameters)
    assert {f"optim.{name}.exp_avg" for name in parameters} <= state.keys()


def test_accelerate_merge_weights(twin: RunPaths, parameters, tmp_path: Path):
    payload = twin.checkpoints / "step-60" / "fsdp2"
    words = [Path(sys.executable).with_name("accelerate"), "merge-weights", payload, tmp_path / "merged"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    require_agreement(load_file(tmp_path / "merged" / "model.safetensors"), parameters)
