"""The blocks of scores that FlexAttention visits, against those that torch finds by looking at every score."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from encdec.attention.flex import BLOCK, packed_block_mask
from encdec.attention.sequences import Sequences

LENGTHS = {
    "long and short": ([300, 5, 400, 1], [20, 700, 0, 130]),
    "whole blocks": ([256, 256], [128, 384]),
    "shorter than a block": ([3, 4], [5, 1]),
    "no encoder token": ([200, 100], [0, 0]),
}


def sequences(lengths: list[int]) -> Sequences:
    return Sequences.from_mask(torch.arange(max(*lengths, 1)) < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize(("own", "others"), LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("merged", [True, False])
def test_no_block_is_missing_and_whole_ones_are_whole(own, others, merged):
    queries, encoder = sequences(own), sequences(others) if merged else None
    found = packed_block_mask(queries, encoder, causal=merged)
    expected = create_block_mask(found.mask_mod, None, None, *found.seq_lengths, device="cpu", BLOCK_SIZE=BLOCK)
    visited, needed = found.to_dense()[0, 0].bool(), expected.to_dense()[0, 0].bool()
    assert (visited | ~needed).all()
    if not merged or sum(own) % BLOCK == 0:  # else one block holds keys of both kinds, and is visited too often
        assert torch.equal(visited, needed)
    assert visited.sum() <= needed.sum() + len(needed)
    assert (found.full_kv_num_blocks <= expected.full_kv_num_blocks).all()
    rows = zip(found.full_kv_num_blocks[0, 0], found.full_kv_indices[0, 0], strict=True)
    whole = create_block_mask(found.mask_mod, None, None, *found.seq_lengths, device="cpu", BLOCK_SIZE=1).to_dense()[
        0, 0
    ]
    for row, (number, columns) in enumerate(rows):
        for column in columns[:number].tolist():
            assert whole[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK].all()
    if own == [256, 256]:
        assert found.full_kv_num_blocks.sum() > 0
