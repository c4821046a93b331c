"""The layers of both stacks: Qwen3's (pre-norm attention, pre-norm gated MLP or experts), parameter by parameter.

Shape legend:
    B    examples                        H    hidden size
    S_e  encoder tokens                  T    tokens of all examples, packed without padding
    S_d  decoder tokens of this call
"""

from __future__ import annotations

import torch
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from encdec.attention.plan import AttentionPlan
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.merged_attention import Qwen3EncoderAttention, Qwen3MergedAttention
from encdec.mixture_of_experts import feed_forward


class Qwen3EncoderLayer(GradientCheckpointingLayer):
    """Qwen3's layer without the causal mask: every token sees every token."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int) -> None:
        # Qwen3 looks its index up in `layer_types` and in a cache. The first has one entry per DECODER layer, all of
        # them alike, and an encoder has no cache: so the index of every encoder layer is 0.
        super().__init__()
        self.self_attn = Qwen3EncoderAttention(config, layer_idx=0)
        self.mlp = feed_forward(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: AttentionPlan,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """[B, S_e, H] -> [B, S_e, H], or packed [1, T, H] -> [1, T, H], as `plan` says."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), plan, position_embeddings)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Qwen3DecoderLayer(GradientCheckpointingLayer):
    """Qwen3's layer (pre-norm attention, pre-norm gated MLP) with merged attention; the parameters are the same."""

    def __init__(self, config: Qwen3EncoderDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Qwen3MergedAttention(config, layer_idx)
        self.mlp = feed_forward(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        plan: AttentionPlan,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: EncoderDecoderCache | None = None,
    ) -> torch.Tensor:
        """[B, S_d, H] and [B, S_e, H] -> [B, S_d, H], or all of them packed [1, T, H], as `plan` says.

        Hidden states are positional: re-entrant checkpointing needs it so.
        """
        attended, *_ = self.self_attn(
            self.input_layernorm(hidden_states),
            encoder_hidden_states,
            plan,
            position_embeddings,
            past_key_values,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
