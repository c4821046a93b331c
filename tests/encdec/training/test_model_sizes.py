"""Sizes of models that nobody has loaded: known by name, by config.json, by the configuration itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.config import ModelConfig
from encdec.training.model_sizes import QWEN3_SHAPES, model_size
from encdec.training.run_config import resolve_run
from tests.conftest import MICRO


@pytest.mark.parametrize("name", QWEN3_SHAPES)
def test_names_of_qwen3_are_known(name: str):
    """Their own labels count a decoder with one or two embeddings; ours has two stacks and one."""
    known = model_size(ModelConfig(model_name_or_path=f"Qwen/{name}-Base"))
    assert known is not None
    billions = float(name.removeprefix("Qwen3-").removesuffix("B"))
    own = known.parameters - known.embedding
    assert 0.7 * billions < own / 2e9 < 1.1 * billions
    assert known.matrices < own


def test_sizes_of_a_saved_model_are_those_of_its_config(tmp_path: Path):
    shape = {**QWEN3_SHAPES["Qwen3-0.6B"].model_dump(), "vocab_size": 151_936}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    known, saved = (model_size(ModelConfig(model_name_or_path=n)) for n in ("Qwen/Qwen3-0.6B", str(tmp_path)))
    assert known == saved
    more = model_size(ModelConfig(model_name_or_path=str(tmp_path), num_sentinel_tokens=300))
    assert more is not None
    assert more.vocabulary == 152_000  # 151,669 + 300, to a multiple of 64
    (tmp_path / "config.json").write_text("{}")
    assert model_size(ModelConfig(model_name_or_path=str(tmp_path))) is None


def test_sizes_of_a_saved_mixture_of_experts_are_those_of_its_config(tmp_path: Path):
    shape = {
        "vocab_size": 512, "num_sentinel_tokens": 16, "sentinel_start_id": 496, "pad_token_id": 0, "eos_token_id": 1,
        "decoder_start_token_id": 0, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4,
        "moe_intermediate_size": 32, "max_position_embeddings": 128,
    }  # fmt: skip
    config = Qwen3EncoderDecoderConfig(**shape)
    config.save_pretrained(tmp_path)
    known = model_size(ModelConfig(model_name_or_path=str(tmp_path)))
    with torch.device("meta"):
        model = Qwen3ForSeq2SeqLM(config)
    assert known is not None and known.parameters == sum(p.numel() for p in model.parameters())
    config.num_encoder_layers = 3
    config.save_pretrained(tmp_path)
    assert model_size(ModelConfig(model_name_or_path=str(tmp_path))) is None  # stacks that differ are not known


def test_size_of_the_tests_model_is_what_it_has():
    size = model_size(resolve_run(None, config_file=MICRO).config.model)
    assert size is not None
    assert size.parameters == 35_072  # tests/encdec/training/test_rules.py
