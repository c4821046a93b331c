"""Merged attention: the decoder's self- and cross-attention as one attention over the keys of both.

From T5Gemma 2 (transformers, `models/t5gemma2`), on Qwen3's projections. It has no parameter that a decoder-only Qwen3
lacks, which is what lets a decoder start from its weights.

Shape legend:
    B    examples                        H    hidden size
    S_e  encoder tokens                  D    head size
    S_d  decoder tokens of this call     N_q  query heads
    P    decoder tokens in the cache     N_k  key and value heads
    T    tokens of all examples, where they are packed without padding
"""

from __future__ import annotations

import torch
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb

from encdec.attention.plan import AttentionPlan, attend, attend_merged

KeysAndValues = tuple[torch.Tensor, torch.Tensor]  # each [B, N_k, S, D]


class Qwen3EncoderAttention(Qwen3Attention):
    """Qwen3's attention, every token of a sequence to every other."""

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.is_causal = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: AttentionPlan,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, H] -> [B, S, H], or packed [1, T, H] -> [1, T, H], as `plan` says.

        Beside it, of eager attention over padded tokens alone, the weights [B, N_q, S, S].
        """
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key, value = (
            heads.transpose(1, 2) for heads in (self.q_norm(query), self.k_norm(key), value)
        )  # [B, N, S, D]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attended, weights = attend(self, plan, query, key, value)
        return self.o_proj(attended.flatten(2)), weights


class Qwen3MergedAttention(Qwen3Attention):
    """Self- and cross-attention of a decoder layer with one set of projections and one softmax.

    Encoder keys pass k_proj and k_norm like decoder keys but get no RoPE: their positions live on another axis.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        plan: AttentionPlan,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """[B, S_d, H] and [B, S_e, H] -> [B, S_d, H], or all of them packed [1, T, H], as `plan` says.

        Beside it, of eager attention over padded tokens alone, the weights of the decoder keys [B, N_q, S_d, P + S_d]
        and of the encoder keys [B, N_q, S_d, S_e] for each query; both together sum to 1.
        """
        query = self.q_norm(self._split_heads(self.q_proj(hidden_states))).transpose(1, 2)  # [B, N_q, S_d, D]
        key, value = self._keys_and_values(hidden_states)  # [B, N_k, S_d, D]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.self_attention_cache.update(key, value, self.layer_idx)  # [B, N_k, P + S_d, D]
        encoder = self._encoder_keys_and_values(encoder_hidden_states, past_key_values)
        attended, weights = attend_merged(self, plan, query, (key, value), encoder)  # [B, S_d, N_q, D]
        output = self.o_proj(attended.flatten(2))
        if weights is None:
            return output, None, None
        return output, weights[..., : key.shape[2]], weights[..., key.shape[2] :]

    def _encoder_keys_and_values(
        self, encoder_hidden_states: torch.Tensor, past_key_values: EncoderDecoderCache | None
    ) -> KeysAndValues:
        """The encoder's keys and values; with a cache they are computed at the first step only."""
        if past_key_values is None:
            return self._keys_and_values(encoder_hidden_states)
        cross_cache = past_key_values.cross_attention_cache
        if not past_key_values.is_updated.get(self.layer_idx):
            past_key_values.is_updated[self.layer_idx] = True
            return cross_cache.update(*self._keys_and_values(encoder_hidden_states), self.layer_idx)
        return cross_cache.layers[self.layer_idx].keys, cross_cache.layers[self.layer_idx].values

    def _keys_and_values(self, hidden_states: torch.Tensor) -> KeysAndValues:
        key = self.k_norm(self._split_heads(self.k_proj(hidden_states)))
        return key.transpose(1, 2), self._split_heads(self.v_proj(hidden_states)).transpose(1, 2)

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))  # [B, S, N * D] -> [B, S, N, D], also when S is 0
