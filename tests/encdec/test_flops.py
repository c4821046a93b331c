"""FLOPs by the formula against what torch counts in our own model; accelerators by name; widths of batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.estimates import LayerWidths, ModelSize
from encdec.flops import ACCELERATORS, accelerator_in, forward_flops, training_flops_per_sample, widest_sides
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.config import ModelConfig
from encdec.training.model_sizes import model_size

HIDDEN, HEADS, KEY_VALUE_HEADS, WIDTH, FEED_FORWARD, LAYERS, VOCABULARY = 64, 4, 2, 16, 192, 2, 512
BATCH, ENCODER, DECODER = 2, 48, 32


@pytest.fixture(scope="module")
def model() -> Qwen3ForSeq2SeqLM:
    shape = Qwen3EncoderDecoderConfig(
        vocab_size=VOCABULARY, num_sentinel_tokens=16, sentinel_start_id=VOCABULARY - 16, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, hidden_size=HIDDEN, intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEY_VALUE_HEADS, head_dim=WIDTH,
    )  # fmt: skip
    return Qwen3ForSeq2SeqLM._from_config(shape, attn_implementation="eager")


def size_of(model: torch.nn.Module) -> ModelSize:
    layers = [p for layer in model.transformer_layers() for p in layer.parameters()]  # type: ignore[operator]
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()), matrices=sum(p.numel() for p in layers if p.ndim == 2),
        embedding=VOCABULARY * HIDDEN, vocabulary=VOCABULARY, layers=LAYERS,
        widths=LayerWidths(HIDDEN, HEADS * WIDTH, KEY_VALUE_HEADS * WIDTH, FEED_FORWARD),
    )  # fmt: skip


def test_formula_counts_what_torch_counts(model: Qwen3ForSeq2SeqLM):
    inputs = torch.randint(2, 400, (BATCH, ENCODER))
    batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": inputs[:, :DECODER]}
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(**batch, use_cache=False, return_logits=False)
    formula = BATCH * forward_flops(size_of(model), ENCODER, DECODER)
    assert formula == pytest.approx(forward.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as both:  # not apart: the head's gradients are computed on the way forward
        model(**batch, use_cache=False, return_logits=False).loss.backward()
    assert 3 * formula == pytest.approx(both.get_total_flops(), rel=0.02)


def test_training_is_the_mixtures_mean(model: Qwen3ForSeq2SeqLM):
    size = size_of(model)
    prefix_lm = training_flops_per_sample(size, 64, 16, [0, 0, 0, 0, 1])
    assert prefix_lm == 3 * forward_flops(size, 64 - 48 + 2, 48 + 2)  # a quarter is read, three quarters are written
    alone = [training_flops_per_sample(size, 64, 16, [float(i == task) for i in range(5)]) for task in range(5)]
    assert training_flops_per_sample(size, 64, 16) == pytest.approx((sum(alone) + 3 * prefix_lm) / 8)


def test_a_billion_parameters_take_about_six_flops_each_and_token():
    size = model_size(ModelConfig(model_name_or_path="Qwen/Qwen3-0.6B"))
    assert size is not None and size.parameters == 1_036_517_376
    a_token = training_flops_per_sample(size, 2048, 100) / 2048
    # each token meets about half of the layers, written ones the vocabulary, too; attention comes on top
    assert 0.5 < a_token / (6 * size.parameters) < 1.0


def test_widest_batch_holds_every_task():
    encoder, decoder = widest_sides(96, 32)
    assert encoder % 8 == decoder % 8 == 0
    assert encoder >= 96 - 14 + 5 + 1 and decoder >= 72 + 2  # R1 keeps most, S writes most
    assert widest_sides(96, 32, [1, 0, 0, 0, 0])[1] < decoder


@pytest.mark.parametrize(
    ("text", "name"),
    [("gpu:h100:8(S:0-1)", "h100"), ("gres=gpu:a100_80gb:{n}", "a100-80gb"), ("gpu:a100:4", "a100"), ("gpu:8", None),
     ("NVIDIA H200", "h200"), ("", None), ("gpu:gh200:1", None), ("gpu:rtx_a1000:2", None), ("GB200", None),
     ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA A100 80GB PCIe", "a100-80gb"), ("NVIDIA A100-SXM4-40GB", "a100"),
     ("NVIDIA H100 80GB HBM3", "h100")],
)  # fmt: skip
def test_accelerators_are_found_in_slurms_names(text: str, name: str | None):
    assert accelerator_in(text) == name
    assert name is None or ACCELERATORS[name].memory_gb > 0
