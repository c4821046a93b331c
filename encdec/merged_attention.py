"""Merged attention: the decoder's self- and cross-attention as one attention over the keys of both.

From T5Gemma 2 (transformers, `models/t5gemma2`), on Qwen3's projections. It has no parameter that a decoder-only Qwen3
lacks, which is what lets a decoder start from its weights.

Shape legend:
    B    examples                        H    hidden size
    S_e  encoder tokens                  D    head size
    S_d  decoder tokens of this call     N_q  query heads
    P    decoder tokens in the cache     N_k  key and value heads
"""

from __future__ import annotations

import torch
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb, eager_attention_forward

KeysAndValues = tuple[torch.Tensor, torch.Tensor]  # each [B, N_k, S, D]


def attention_bias(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a boolean mask (True: may attend) into the additive one that eager and SDPA attention both take.

    Blocked positions get the lowest number that bfloat16 still holds, not -inf: a row without a single allowed key (a
    padded query of an empty input) then stays finite, where a NaN would spread through masked values (0 * NaN = NaN).
    """
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, lowest)


def encoder_attention_bias(attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """[B, S_e] of ones and zeros -> [B, 1, 1, S_e]. None (no padding) stays None, for SDPA's flash kernel."""
    return None if attention_mask is None else attention_bias(attention_mask.bool()[:, None, None, :], dtype)


def merged_attention_bias(
    decoder_hidden: torch.Tensor,
    encoder_hidden: torch.Tensor,
    decoder_attention_mask: torch.Tensor | None,
    encoder_attention_mask: torch.Tensor | None,
    num_cached: int,
) -> torch.Tensor:
    """Mask of the merged attention: causal over decoder keys, padding only over encoder keys.

    Args:
        decoder_hidden: [B, S_d, H]; gives sizes, dtype and device.
        encoder_hidden: [B, S_e, H]; S_e may be 0.
        decoder_attention_mask: [B, P + S_d], 1 for tokens and 0 for padding, or None.
        encoder_attention_mask: [B, S_e], likewise.
        num_cached: P.

    Returns:
        [B or 1, 1, S_d, P + S_d + S_e], to be added to the attention scores.
    """
    num_queries, num_encoder_keys, device = decoder_hidden.shape[1], encoder_hidden.shape[1], decoder_hidden.device
    decoder_keys = torch.ones(1, num_queries, num_cached + num_queries, dtype=torch.bool, device=device)
    decoder_keys = decoder_keys.tril(diagonal=num_cached)  # query i sees the cache and the new tokens up to itself
    encoder_keys = torch.ones(1, num_queries, num_encoder_keys, dtype=torch.bool, device=device)
    if decoder_attention_mask is not None:
        decoder_keys = decoder_keys & decoder_attention_mask.bool()[:, None, :]
    if encoder_attention_mask is not None:
        encoder_keys = encoder_keys & encoder_attention_mask.bool()[:, None, :]
    batch = max(decoder_keys.shape[0], encoder_keys.shape[0])
    allowed = torch.cat([decoder_keys.expand(batch, -1, -1), encoder_keys.expand(batch, -1, -1)], dim=-1)
    return attention_bias(allowed[:, None], decoder_hidden.dtype)


class Qwen3MergedAttention(Qwen3Attention):
    """Self- and cross-attention of a decoder layer with one set of projections and one softmax.

    Encoder keys pass k_proj and k_norm like decoder keys but get no RoPE: their positions live on another axis. The
    mask always is a tensor, which is what keeps SDPA from adding a causal one of its own.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """[B, S_d, H] and [B, S_e, H] -> [B, S_d, H]; `attention_mask` is `merged_attention_bias`'s.

        Beside it, of eager attention alone, the weights of the decoder keys [B, N_q, S_d, P + S_d] and of the encoder
        keys [B, N_q, S_d, S_e] for each query; both together sum to 1.
        """
        query = self.q_norm(self._split_heads(self.q_proj(hidden_states))).transpose(1, 2)  # [B, N_q, S_d, D]
        key, value = self._keys_and_values(hidden_states)  # [B, N_k, S_d, D]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.self_attention_cache.update(key, value, self.layer_idx)  # [B, N_k, P + S_d, D]
        encoder_key, encoder_value = self._encoder_keys_and_values(encoder_hidden_states, past_key_values)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(
            self,
            query,
            torch.cat([key, encoder_key], dim=2),  # [B, N_k, P + S_d + S_e, D]
            torch.cat([value, encoder_value], dim=2),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        output = self.o_proj(attended.flatten(2))  # attended: [B, S_d, N_q, D]
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
