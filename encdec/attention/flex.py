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
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from encdec.attention.sequences import Sequences

BLOCK = 128
"""Queries, and keys, of one block of scores; FlexAttention's default."""


def packed_block_mask(queries: Sequences, encoder: Sequences | None, *, causal: bool) -> BlockMask:
    """Which blocks of scores exist: a token sees its own sequence, and its encoder's sequence if there are such.

    Made from the sequences' bounds, block by block: ``create_block_mask`` would look at every single score.

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

    some, every = _blocks(own, of_key, first_encoder_key, causal=causal)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=allowed,
        seq_lengths=(len(own), len(of_key)),
    )  # fmt: skip


def _blocks(own: Tensor, of_key: Tensor, first_encoder_key: int, *, causal: bool) -> tuple[Tensor, Tensor]:
    """[blocks of queries, blocks of keys] bool: where some score may be allowed, and where all are for certain.

    Args:
        own, of_key: [T_q] and [T_k], the sequence of each query and key.
    """
    (query_least, query_most), (key_least, key_most) = _bounds(own), _bounds(of_key)
    query_first, key_first = (torch.arange(len(b), device=own.device) * BLOCK for b in (query_least, key_least))
    query_end, key_end = query_first + BLOCK, key_first + BLOCK
    some = (query_least[:, None] <= key_most) & (key_least <= query_most[:, None])
    one = (query_least == query_most)[:, None] & (key_least == key_most) & (query_least[:, None] == key_least)
    every = one & (query_end <= len(own))[:, None] & (key_end <= len(of_key))
    if causal:
        crossed, past = key_first >= first_encoder_key, key_end <= query_first[:, None] + 1
        some &= (key_first < query_end[:, None]) | (key_end > first_encoder_key)
        every &= crossed | (past & (key_end <= first_encoder_key))
    return some, every


def _bounds(owners: Tensor) -> tuple[Tensor, Tensor]:
    """Of each block, the first and the last sequence that it holds tokens of."""
    padding = -len(owners) % BLOCK
    blocks = F.pad(owners[None].float(), (0, padding), mode="replicate").view(-1, BLOCK)
    return blocks.amin(1), blocks.amax(1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] bool -> how many in each row, and which, these first: as BlockMask has them."""
    numbers = blocks.sum(1, dtype=torch.int32)
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True).int()
    return numbers[None, None], order[None, None]


def attend_by_flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """[1, N_q, T_q, D] and twice [1, N_k, T_k, D] -> [1, T_q, N_q, D]."""
    attend_compiled = query.is_cuda and not torch.compiler.is_compiling()
    attend: Any = _compiled() if attend_compiled else flex_attention
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """One kernel for all numbers of tokens."""
    return torch.compile(flex_attention, dynamic=True)
