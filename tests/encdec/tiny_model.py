"""A random model small enough for any test, its weights large enough for differences to show."""

from __future__ import annotations

import torch

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM

SHAPE = {
    "vocab_size": 256, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_encoder_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "sentinel_start_id": 246,
    "num_sentinel_tokens": 10, "initializer_range": 0.2,
}  # fmt: skip
PAD, FIRST_SENTINEL = 0, 246


def tiny_model(**changes) -> Qwen3ForSeq2SeqLM:
    """In evaluation mode."""
    torch.manual_seed(0)
    return Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig(**(SHAPE | changes))).eval()


def tokens(*shape: int) -> torch.Tensor:
    """Ids that are neither padding nor end nor sentinels."""
    return torch.randint(2, FIRST_SENTINEL, shape)


def padded(rows: list[torch.Tensor], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """[S] each -> ids and mask, each [B, longest S]."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side=side)
    masks = [torch.ones_like(row) for row in rows]
    return ids, torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_side=side)
