"""The table of scales: pinned rows, and counts that are those of the real model."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from encdec.adapters import add_adapters
from encdec.configuration_qwen3_encdec import QWEN3_VOCAB_SIZE, Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.pipeline.scales import (
    SCALES,
    VOCABULARY,
    ModelScale,
    get_model_config,
    in_short,
    print_scale_comparison,
    scale_records,
    scales_between,
)
from encdec.training.config import ModelConfig
from encdec.training.model_options import LoraConfig
from encdec.training.model_sizes import model_size
from encdec.upcycling import expert_fields

# scale: label, hidden, layers, heads, context, GB, samples; then kv heads, head_dim, feed-forward, which are ours
PINNED = {
    "tiny": ("50M", 512, 8, 8, 2048, 4, 1_000, 4, 64, 1536),
    "small": ("125M", 768, 12, 12, 4096, 8, 5_000, 4, 64, 2304),
    "medium": ("500M", 1024, 24, 16, 4096, 16, 20_000, 8, 64, 3072),
    "large": ("1B", 1536, 28, 12, 8192, 28, 50_000, 4, 128, 4608),
    "xl": ("3B", 2560, 32, 20, 8192, 45, 100_000, 4, 128, 7680),
    "xxl": ("7B", 4096, 32, 32, 8192, 65, 150_000, 8, 128, 12_288),
    "flagship": ("13B", 5120, 40, 40, 8192, 80, 200_000, 8, 128, 15_360),
}
LABELS = {"500M": 500e6, "1B": 1e9, "3B": 3e9, "7B": 7e9, "13B": 13e9}


def test_the_table_is_pinned_and_in_order():
    assert list(ModelScale) == list(PINNED) == list(SCALES)
    for name, row in PINNED.items():
        c = get_model_config(name)
        assert row == (
            c.label, c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.max_position_embeddings, c.memory_gb,
            c.recommended_samples, c.num_key_value_heads, c.head_dim, c.intermediate_size,
        )  # fmt: skip
        assert c.name == name


@pytest.mark.parametrize("scale", ModelScale)
def test_counts_are_those_of_the_real_model(scale: ModelScale):
    row = get_model_config(scale)
    with torch.device("meta"):
        model = Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig(vocab_size=VOCABULARY, **row.architecture.model_dump()))
    counts, real = row.count(), {"encoder": 0, "decoder": 0, "shared": 0}
    for name, parameter in model.named_parameters():
        real[name.partition(".")[0]] += parameter.numel()
    assert (counts.encoder, counts.decoder, counts.embedding) == (real["encoder"], real["decoder"], real["shared"])
    assert row.num_parameters() == counts.total == sum(real.values())
    assert row.num_parameters(1000) == counts.total - (VOCABULARY - 1000) * row.hidden_size


@pytest.mark.parametrize("scale", ModelScale)
@pytest.mark.parametrize(
    "option", [{"n_experts": 8}, {"lora": LoraConfig(rank=8, target_modules=["q_proj", "up_proj"])}]
)
def test_sizes_with_experts_or_adapters_are_those_of_the_real_model(scale: ModelScale, option: dict[str, Any]):
    shape = get_model_config(scale).architecture
    settings = ModelConfig(from_scratch=shape, train_tokenizer_vocab_size=VOCABULARY, **option)
    with torch.device("meta"):
        model = Qwen3ForSeq2SeqLM(
            Qwen3EncoderDecoderConfig(vocab_size=VOCABULARY, **shape.model_dump(), **expert_fields(settings))
        )
        if settings.lora is not None:
            add_adapters(model, settings.lora, seed=0)
    size = model_size(settings)
    assert size is not None
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    assert size.active == size.parameters - experts * 6 // 8  # two of eight


@pytest.mark.parametrize("scale", list(ModelScale)[2:])
def test_label_is_about_one_stack_with_the_embedding(scale: ModelScale):
    counts = get_model_config(scale).count()
    assert counts.decoder + counts.embedding == pytest.approx(LABELS[get_model_config(scale).label], rel=0.1)


def test_qwen3_06b_s_shape_needs_no_weights():
    """Merged and tied; heads wider than the hidden size together; theta of a million in the rotary frequencies."""
    with torch.device("meta"):
        model = Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == 1_036_517_376
    attention = model.decoder.layers[0].self_attn
    assert attention.head_dim == 128 and attention.q_proj.weight.shape == (2048, 1024)
    rotary = Qwen3RotaryEmbedding(model.config)
    assert rotary.inv_freq[1].item() == pytest.approx(1e6 ** (-2 / 128))


def test_default_vocabulary_is_qwen3s():
    assert VOCABULARY == QWEN3_VOCAB_SIZE


def test_every_scale_is_larger_than_the_one_before():
    totals = [get_model_config(scale).num_parameters() for scale in ModelScale]
    assert totals == sorted(totals)


def test_comparison_shows_labels_beside_our_counts():
    out = io.StringIO()
    print_scale_comparison(console=Console(file=out))
    lines = {line.split()[1]: line for line in out.getvalue().splitlines() if line.startswith("│")}
    assert list(lines) == list(ModelScale)
    for scale, line in lines.items():
        counts = get_model_config(scale).count()
        for shown in (get_model_config(scale).label, in_short(counts.encoder), in_short(counts.total)):
            assert f" {shown} " in line
    assert [record["parameters"]["total"] for record in scale_records()] == [
        get_model_config(scale).num_parameters() for scale in ModelScale
    ]


@pytest.mark.parametrize(("count", "shown"), [(34_432, "34.4K"), (128_139_264, "128.1M"), (24_690_000_000, "24.69B")])
def test_short_counts(count: int, shown: str):
    assert in_short(count) == shown


def test_unknown_scale_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"gigantic.*tiny, small"):
        get_model_config("gigantic")
    assert get_model_config("TINY") is get_model_config(ModelScale.TINY)


def test_between():
    assert scales_between("small", "large") == (ModelScale.SMALL, ModelScale.MEDIUM, ModelScale.LARGE)
    assert scales_between("xl", "xl") == (ModelScale.XL,)
    with pytest.raises(ConfigError, match="small to tiny"):
        scales_between("small", "tiny")


def test_tables_and_configuration_load_no_torch():
    modules = ("scales", "config", "suites", "seed_suites", "results")
    code = "; ".join([*(f"import encdec.pipeline.{m}" for m in modules), "import sys; print('torch' in sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
