"""The encoder alone: sentence-transformers loads the folder as it is and computes what our encoder does."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from encdec.checkpoints import __main__ as command
from encdec.files import RunPaths
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from tests.encdec.checkpoints.conftest import load_model

TEXTS = ["def f(x):\n    return x", "a", "one much longer text, of many more words than the others have: é \U0001f600"]
POOLINGS = ["mean", "cls", "last"]
ELSEWHERE = """
import json, sys
from sentence_transformers import SentenceTransformer
folders, texts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
vectors = {}
for name, folder in folders.items():
    model = SentenceTransformer(folder, device="cpu")
    vectors[name] = {"batch": model.encode(texts).tolist(), "single": [model.encode(text).tolist() for text in texts]}
    model.tokenizer.padding_side = "left"
    vectors[name]["left"] = model.encode(texts).tolist()
assert not any(name == "encdec" or name.startswith("encdec.") for name in sys.modules)
print(json.dumps(vectors))
"""


@pytest.fixture(scope="module")
def folders(twin: RunPaths, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("encoders")
    for name in POOLINGS:
        words = ["export", str(twin.root), str(place / name), "--encoder", "--pooling", name, "--shard-mb", "1"]
        assert command.main(words) == 0
    return {name: place / name for name in POOLINGS}


@pytest.fixture(scope="module")
def vectors(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """Of each pooling, made in a process that has never heard of us."""
    given = [json.dumps({name: str(folder) for name, folder in folders.items()}), json.dumps(TEXTS)]
    place = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *given], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: {how: np.array(rows) for how, rows in of.items()} for name, of in found.items()}


def expected(twin: RunPaths, pooling: str) -> np.ndarray:
    """By our own encoder, each text alone, as training has it: the end behind it."""
    model, tokenizer = load_model(twin, 60), Qwen3EncoderDecoderTokenizer.from_pretrained(twin.model)
    rows = []
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            states = model.encoder(ids).last_hidden_state[0]
        rows.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_our_encoder(twin: RunPaths, vectors: dict, pooling: str):
    wanted = expected(twin, pooling)
    assert wanted.std() > 0.1
    for how in ("batch", "single", "left"):  # the same alone, beside longer texts, and padded on the other side
        np.testing.assert_allclose(vectors[pooling][how], wanted, atol=2e-5, rtol=0, err_msg=how)


def test_folder_holds_the_encoder_and_nothing_else(folders: dict[str, Path], twin: RunPaths):
    folder, model = folders["mean"], load_model(twin, 60)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["is_causal"] is False and "auto_map" not in config
    assert [module["path"] for module in json.loads((folder / "modules.json").read_text())] == ["", "1_Pooling"]
    bytes_ = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    numbers = model.shared.weight.numel() + sum(p.numel() for p in model.encoder.layers.parameters()) + 32
    assert 4 * numbers <= bytes_ < 4 * numbers + 20_000
    assert not list(folder.glob("*.py"))
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o044, path


def test_pooling_goes_with_the_encoder(twin: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main(["export", str(twin.root), str(tmp_path / "out"), "--pooling", "cls"]) == 78
    assert "--pooling goes with --encoder" in capsys.readouterr().err
