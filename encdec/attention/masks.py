"""Who may attend to whom, as additive masks.

Shape legend:
    B    sequences                       P    decoder tokens in the cache
    S_e  encoder tokens                  S_d  decoder tokens of this call
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask (True: may attend) into the additive one that eager and SDPA attention both take.

    Blocked positions get the lowest number that bfloat16 still holds, not -inf: a row without a single allowed key (a
    padded query of an empty input) then stays finite, where a NaN would spread through masked values (0 * NaN = NaN).
    """
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, lowest)


def encoder_attention_bias(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, S_e] of ones and zeros -> [B, 1, 1, S_e]. None (no padding) stays None, for SDPA's flash kernel."""
    return None if attention_mask is None else attention_bias(attention_mask.bool()[:, None, None, :], dtype)


def merged_attention_bias(
    num_queries: int,
    num_encoder_keys: int,
    decoder_attention_mask: Tensor | None,
    encoder_attention_mask: Tensor | None,
    num_cached: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Mask of the merged attention: causal over decoder keys, padding only over encoder keys.

    Args:
        num_queries: S_d.
        num_encoder_keys: S_e; may be 0.
        decoder_attention_mask: [B, P + S_d], 1 for tokens and 0 for padding, or None.
        encoder_attention_mask: [B, S_e], likewise.
        num_cached: P.

    Returns:
        [B or 1, 1, S_d, P + S_d + S_e], to be added to the attention scores.
    """
    decoder_keys = torch.ones(1, num_queries, num_cached + num_queries, dtype=torch.bool, device=device)
    decoder_keys = decoder_keys.tril(diagonal=num_cached)  # query i sees the cache and the new tokens up to itself
    encoder_keys = torch.ones(1, num_queries, num_encoder_keys, dtype=torch.bool, device=device)
    if decoder_attention_mask is not None:
        decoder_keys = decoder_keys & decoder_attention_mask.bool()[:, None, :]
    if encoder_attention_mask is not None:
        encoder_keys = encoder_keys & encoder_attention_mask.bool()[:, None, :]
    batch = max(decoder_keys.shape[0], encoder_keys.shape[0])
    allowed = torch.cat([decoder_keys.expand(batch, -1, -1), encoder_keys.expand(batch, -1, -1)], dim=-1)
    return attention_bias(allowed[:, None], dtype)


def positions_of(attention_mask: Tensor | None, num_cached: int, num_queries: int, device: torch.device) -> Tensor:
    """Places of the new tokens in their sequences, padding not counted: the same whichever side it is on.

    Args:
        attention_mask: [B, P + S_d] of the cached and the new tokens, or None where none is padding.
        num_cached, num_queries: P and S_d.

    Returns:
        [B or 1, S_d] int64; padding has some place, which nothing depends on.
    """
    if attention_mask is None:
        return torch.arange(num_cached, num_cached + num_queries, device=device)[None]
    return (attention_mask.bool().cumsum(-1) - 1).clamp(min=0)[:, num_cached:]
