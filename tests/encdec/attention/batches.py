"""A small random model and padded batches for it."""

from __future__ import annotations

import torch
from torch import Tensor

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM

SHAPE = {
    "vocab_size": 256, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}  # fmt: skip
IDS = {"decoder_start_token_id": 0, "sentinel_start_id": 246, "num_sentinel_tokens": 10}
UNEVEN = [[1] * 9, [1] * 5 + [0] * 4, [0] * 3 + [1] * 6, [1, 0, 1, 1, 0, 1, 1, 1, 0]]
"""Masks of nothing padded, padded on the right, on the left, and here and there."""


def tiny_model(attention: str = "sdpa", **changes) -> Qwen3ForSeq2SeqLM:
    """Its weights are large enough for differences to show."""
    model = Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig(**(SHAPE | IDS | {"initializer_range": 0.2} | changes)))
    model.set_attn_implementation(attention)
    return model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, IDS["sentinel_start_id"], shape)


def uneven_batch() -> dict[str, Tensor]:
    """Four examples: masks as UNEVEN on the encoder's side; labels that end early, begin late, and are missing."""
    labels = tokens(4, 7)
    labels[1, 3:] = labels[2, :4] = labels[3] = -100
    return {"input_ids": tokens(4, 9), "attention_mask": torch.tensor(UNEVEN), "labels": labels}


def loss_and_gradients(model, batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.train().zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
