"""Models of one shape that do the same work in different ways, and the batches that all of them get."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    eager_attention_forward,
)

from encdec.attention.masks import encoder_attention_bias
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.data.collator import UL2DataCollator
from encdec.denoisers import raw_sample_length
from encdec.estimates import LayerWidths, ModelSize
from encdec.flops import training_flops_per_sample
from encdec.modeling_qwen3_encdec import Qwen3Encoder, Qwen3ForSeq2SeqLM, Qwen3Stack

Batch = dict[str, torch.Tensor]
Loss = Callable[[Batch], torch.Tensor]

SHAPES = {
    "small": Qwen3EncoderDecoderConfig(
        vocab_size=32_768, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sentinel_start_id=32_000, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    ),
    "1B": Qwen3EncoderDecoderConfig(),
}  # fmt: skip
"""small: what a CPU does in a second; 1B: Qwen3-0.6B's, merged and tied (1,036,517,376 parameters)."""
NUM_SENTINELS = 100


@dataclass(frozen=True)
class Peer:
    """A model and how it makes a loss of a batch."""

    model: nn.Module
    loss: Loss


def ours(config: Qwen3EncoderDecoderConfig, attention: str = "sdpa", *, checkpointing: bool = False) -> Peer:
    """Our model as it trains."""
    model = Qwen3ForSeq2SeqLM._from_config(config, attn_implementation=attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return Peer(model, lambda batch: model(**batch, use_cache=False).loss)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over labelled tokens, in float32, of logits [B, S_d, V] that are there as a whole."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def with_plain_loss(peer: Peer) -> Peer:
    """The same model with cross-entropy over whole logits."""
    model = peer.model
    assert isinstance(model, Qwen3ForSeq2SeqLM)

    def loss(batch: Batch) -> torch.Tensor:
        inputs = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        made = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=inputs,
            use_cache=False,
        )  # fmt: skip
        return cross_entropy(made.logits, batch["labels"])

    return Peer(model, loss)


def with_padding_computed(peer: Peer) -> Peer:
    """The same model with padded hidden states, as other models compute."""

    def loss(batch: Batch) -> torch.Tensor:
        with padding_computed():
            return peer.loss(batch)

    return Peer(peer.model, loss)


@contextlib.contextmanager
def padding_computed() -> Iterator[None]:
    """Inside, hidden states stay padded [B, S, H] and masks are tensors, as under torch.compile of a whole model."""
    real = torch.compiler.is_compiling
    torch.compiler.is_compiling = lambda: True
    try:
        yield
    finally:
        torch.compiler.is_compiling = real


def t5gemma2(config: Qwen3EncoderDecoderConfig, attention: str = "sdpa") -> Peer:
    """transformers' T5Gemma 2 of the same shape: full attention in every layer, and no image is ever given."""
    text = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim, "layer_types": ["full_attention"] * config.num_hidden_layers,
        "pad_token_id": config.pad_token_id, "eos_token_id": config.eos_token_id,
        "bos_token_id": config.decoder_start_token_id,
    }  # fmt: skip
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 64, "patch_size": 16}  # fmt: skip
    model = T5Gemma2ForConditionalGeneration._from_config(
        T5Gemma2Config(
            encoder={"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}, decoder=text,
            image_token_index=config.vocab_size - 1,
        ),
        attn_implementation=attention,
    )  # fmt: skip
    model.train()
    return Peer(model, lambda batch: model(**batch, use_cache=False).loss)


class CrossAttention(Qwen3Attention):
    """Attention of the decoder's tokens to the encoder's, with projections of its own and no RoPE."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, S_d, H] and [B, S_e, H] -> [B, S_d, H]; mask [B, 1, 1, S_e], added to the scores."""
        shape = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(encoder_hidden_states).unflatten(-1, shape)).transpose(1, 2)
        value = self.v_proj(encoder_hidden_states).unflatten(-1, shape).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.o_proj(attended.flatten(2))


class SeparateDecoderLayer(nn.Module):
    """A decoder layer as in T5: self-attention, then cross-attention, then the MLP, each after a norm."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Qwen3Attention(config, 0), CrossAttention(config, 0)
        self.mlp = Qwen3MLP(config)
        norms = (Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3))
        self.norms = nn.ModuleList(norms)

    def forward(
        self,
        hidden: torch.Tensor,
        encoded: torch.Tensor,
        mask: torch.Tensor | None,
        positions: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """[B, S_d, H] and [B, S_e, H] -> [B, S_d, H]. Without a mask transformers' attention is causal."""
        hidden = hidden + self.self_attn(self.norms[0](hidden), position_embeddings=positions, attention_mask=None)[0]
        hidden = hidden + self.cross_attn(self.norms[1](hidden), encoded, mask)
        return hidden + self.mlp(self.norms[2](hidden))


class SeparateCrossAttention(Qwen3Stack):
    """Our encoder, and a decoder with separate cross-attention: 4 more matrices a layer, and another softmax."""

    def __init__(self, config: Qwen3EncoderDecoderConfig) -> None:
        super().__init__(config, SeparateDecoderLayer, config.num_hidden_layers, None)
        self.encoder = Qwen3Encoder(config, self.embed_tokens)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Ids [B, S_e], mask [B, S_e], labels [B, S_d] -> loss, over whole logits."""
        encoded = self.encoder(input_ids, attention_mask)[0]
        inputs = torch.full_like(labels, self.config.decoder_start_token_id)
        inputs[:, 1:] = labels[:, :-1].clamp(min=0)
        hidden = self.embed_tokens(inputs)
        positions = self.rotary_emb(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
        bias = encoder_attention_bias(attention_mask, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, encoded, bias, positions)
        return cross_entropy(self.norm(hidden) @ self.embed_tokens.weight.T, labels)


def separate_cross_attention(config: Qwen3EncoderDecoderConfig, attention: str = "sdpa") -> Peer:
    """The same blocks with cross-attention of its own."""
    model = SeparateCrossAttention._from_config(config, attn_implementation=attention)
    model.train()
    return Peer(model, lambda batch: model(**batch))


def batches(
    config: Qwen3EncoderDecoderConfig, *, encoder_tokens: int, size: int, count: int, device: str, seed: int = 0
) -> Iterator[Batch]:
    """Batches of random tokens, corrupted and padded as in training.

    Args:
        encoder_tokens: limit of S_e; S_d's is half of it, as in the default configuration.
        size: samples of a batch.
        count: batches.
        device: where they are put.
    """
    tokenizer = SimpleNamespace(
        sentinel_ids=list(config.sentinel_ids), eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    length = sample_length(encoder_tokens)
    collate = UL2DataCollator(tokenizer, encoder_tokens, encoder_tokens // 2, seed=seed)
    random = np.random.default_rng(seed)
    for number in range(count):
        tokens = random.integers(2, config.sentinel_start_id, (size, length))
        keys = ((0, number * size + row) for row in range(size))
        batch = collate([{"key": key, "tokens": row} for key, row in zip(keys, tokens, strict=True)])
        yield {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}


def sample_length(encoder_tokens: int) -> int:
    """Raw tokens of a sample, so that both sides fit."""
    return raw_sample_length(encoder_tokens, encoder_tokens // 2, 2 * encoder_tokens, NUM_SENTINELS)


def size_of(config: Qwen3EncoderDecoderConfig, model: nn.Module) -> ModelSize:
    """For the arithmetic of FLOPs."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding = config.vocab_size * config.hidden_size
    assert config.num_key_value_heads is not None
    widths = LayerWidths(
        config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim,
        config.intermediate_size,
    )  # fmt: skip
    return ModelSize(
        parameters=parameters, matrices=parameters - embedding, embedding=embedding, vocabulary=config.vocab_size,
        layers=config.num_hidden_layers, widths=widths,
    )  # fmt: skip


def flops_of(config: Qwen3EncoderDecoderConfig, encoder_tokens: int) -> float:
    """FLOPs of a sample's forward and backward pass in our model, padding not counted, mean of the mixture."""
    with torch.device("meta"):
        size = size_of(config, Qwen3ForSeq2SeqLM(config))
    return training_flops_per_sample(size, sample_length(encoder_tokens), NUM_SENTINELS)
