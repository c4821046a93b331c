"""FlexAttention over packed sequences: a kernel made for the mask, which skips the blocks in which nothing is allowed.

Shape legend:
    T_q, T_k  tokens of all sequences (queries; keys)     N_q, N_k  query heads; key and value heads
    B         sequences                                   D         head size
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from encdec.attention.sequences import Sequences


def packed_block_mask(queries: Sequences, encoder: Sequences | None, *, causal: bool) -> BlockMask:
    """Which blocks of scores exist: a token sees its own sequence, and its encoder's sequence if there are such.

    Args:
        queries: of the T_q queries, and of the first T_q keys.
        encoder: of the other keys, where queries attend to an encoder's output, too.
        causal: whether a token sees no later one of its own sequence.
    """
    own = queries.owners
    of_key = own if encoder is None else torch.cat([own, encoder.owners])
    first_encoder_key = own.shape[0]

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        together = own[query] == of_key[key]
        return together & ((key <= query) | (key >= first_encoder_key)) if causal else together

    compiled = own.is_cuda  # without, every single score is looked at, in memory
    return create_block_mask(allowed, None, None, len(own), len(of_key), device=own.device, _compile=compiled)


def attend_by_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """[1, N_q, T_q, D] and twice [1, N_k, T_k, D] -> [1, T_q, N_q, D]."""
    attend_compiled = query.is_cuda and not torch.compiler.is_compiling()
    attend: Any = _compiled() if attend_compiled else flex_attention
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """One kernel for all numbers of tokens."""
    return torch.compile(flex_attention, dynamic=True)
