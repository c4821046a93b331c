"""python -m encdec.weight_initialization: sources of the wanted type, what --force spares, the card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Qwen3Config, Qwen3ForCausalLM

from encdec import weight_initialization
from encdec.initialization import folder
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.weight_initialization import main

TEXTS = ["def greet(name):\n    return name\n" * 9]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A bf16 Qwen3 in one file, with its tokenizer."""
    place = tmp_path / "qwen3"
    tokenizer = Qwen3EncoderDecoderTokenizer.train_from_texts(TEXTS, 264, 0)
    config = Qwen3Config(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def words(source: Any, out: Path, *more: str) -> list[str]:
    return ["--from", str(source), "--to", str(out), "--num-sentinel-tokens", "30", *more]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_single_file_of_the_type_that_is_wanted(source: Path, tmp_path: Path, dtype: str):
    if dtype == "fp32":
        Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(source)
    assert main(words(source, tmp_path / "out", "--dtype", dtype)) == 0


def test_force_spares_what_is_read_and_what_is_not_ours(source: Path, tmp_path: Path, capsys):
    def refusal(out: Path, *more: str, read: Path = source) -> str:
        assert main(words(read, out, "--force", *more)) == 78
        return capsys.readouterr().err

    assert "made from" in refusal(source)
    assert main(words(source, tmp_path / "out")) == 0
    assert "made from" in refusal(tmp_path / "out", "--tokenizer", str(tmp_path / "out"))
    inside = tmp_path / "out" / "qwen3"
    os.rename(source, inside)
    assert "made from" in refusal(tmp_path / "out", read=inside)
    os.rename(inside, source)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    assert "of model_type bert" in refusal(foreign)
    (foreign / "config.json").write_text("{")
    assert "cannot be read" in refusal(foreign)
    assert (foreign / "config.json").read_text() == "{" and (source / "config.json").is_file()


def test_the_old_one_comes_back_if_the_exchange_is_interrupted(tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    rename, calls = os.rename, []

    def interrupted(*names: Any) -> None:
        calls.append(names)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(*names)

    monkeypatch.setattr(folder.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), folder._replaced(out, True) as new:
        new.mkdir()
    assert (out / "old").exists() and list(tmp_path.iterdir()) == [out]


def test_the_card_names_a_base_model_of_the_hub(source: Path, tmp_path: Path, monkeypatch):
    assert main(words(source, tmp_path / "local")) == 0
    assert ModelCard.load(tmp_path / "local" / "README.md").data.base_model is None
    monkeypatch.setattr(weight_initialization, "checkpoint_directory", lambda name, files: source)
    assert main(words("Qwen/Qwen3-0.6B", tmp_path / "hub")) == 0
    data = ModelCard.load(tmp_path / "hub" / "README.md").data
    assert (data.base_model, data.license) == ("Qwen/Qwen3-0.6B", "apache-2.0")


def test_a_source_without_tokenizer(source: Path, tmp_path: Path, capsys):
    for path in source.glob("tokenizer*"):
        path.unlink()
    assert json.loads((source / "config.json").read_text())["model_type"] == "qwen3"
    assert main(words(source, tmp_path / "out")) == 78
    assert "with --tokenizer" in capsys.readouterr().err
