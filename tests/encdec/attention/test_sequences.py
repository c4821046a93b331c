"""Packing: every token where it belongs, and back."""

from __future__ import annotations

import pytest
import torch

from encdec.attention.masks import positions_of
from encdec.attention.plan import lay_out, plan_decoder, plan_encoder
from encdec.attention.sequences import Sequences, tokens_before_the_end
from tests.encdec.attention.batches import UNEVEN, tiny_model

MASKS = {
    "uneven": UNEVEN,
    "one is empty": [[1, 1, 0], [0, 0, 0]],
    "all are empty": [[0, 0], [0, 0]],
    "alike and padded": [[0, 1, 1], [0, 1, 1]],
    "not padded": [[1, 1], [1, 1]],
}


@pytest.mark.parametrize("mask", [torch.tensor(rows) for rows in MASKS.values()], ids=list(MASKS))
class TestFromMask:
    def test_packs_the_tokens_in_order_and_unpacks_them(self, mask):
        batch = torch.arange(1, mask.numel() + 1).view(mask.shape)
        sequences = Sequences.from_mask(mask)
        assert sequences.pack(batch).tolist() == [batch[mask.bool()].tolist()]
        assert sequences.unpack(sequences.pack(batch)).tolist() == (batch * mask).tolist()

    def test_offsets_positions_and_owners(self, mask):
        sequences, lengths = Sequences.from_mask(mask), mask.sum(1).tolist()
        assert sequences.lengths.tolist() == lengths
        assert (sequences.longest, sequences.batch) == (max(lengths), len(lengths))
        assert sequences.positions.tolist() == [[place for length in lengths for place in range(length)]]
        assert sequences.owners.tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]

    def test_spreads_each_sequence_to_the_left(self, mask):
        sequences = Sequences.from_mask(mask)
        packed = torch.randn(1, 3, int(mask.sum()), 2)  # [1, N, T, D]
        spread = sequences.spread(packed)
        for row, (start, end) in enumerate(sequences.offsets.unfold(0, 2, 1).tolist()):
            assert torch.equal(spread[row, :, : end - start], packed[0, :, start:end])
            assert not spread[row, :, end - start :].any()
        assert torch.equal(sequences.gather(spread.transpose(1, 2)), packed.transpose(1, 2))

    def test_positions_of_padded_tokens_are_the_same(self, mask):
        padded = positions_of(mask, 0, mask.shape[1], mask.device)
        assert padded[mask.bool()].tolist() == Sequences.from_mask(mask).positions[0].tolist()


def test_nothing_is_moved_where_nothing_is_padded():
    sequences = Sequences.from_mask(torch.ones(2, 3))
    batch = torch.randn(2, 3, 4)
    assert sequences.source is None and sequences.slots is None
    assert sequences.pack(batch).data_ptr() == batch.data_ptr()


def test_labels_end_at_the_last_one_that_counts():
    labels = torch.tensor([[5, 6, -100, -100], [-100, 6, -100, 7], [-100] * 4])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert tokens_before_the_end(labels, -100).int().tolist() == expected


@pytest.mark.parametrize("mask", [torch.ones(2, 4), Sequences.from_mask(torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]))])
def test_a_mask_of_another_shape_is_refused(mask):
    with pytest.raises(ValueError, match=r"\(2, 3\): \(2, 4\)"):
        lay_out(mask, torch.Size((2, 3)), torch.device("cpu"))


class TestPlans:
    """Which masks exist at all."""

    EVEN, PADDED = torch.ones(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])

    @staticmethod
    def masks(attention: str, mask: torch.Tensor) -> list[torch.Size | None]:
        model, sequences, like = tiny_model(attention), Sequences.from_mask(mask), torch.zeros(1)
        plans = (
            plan_encoder(model.encoder, sequences, sequences, mask.shape, like),
            plan_decoder(model.decoder, sequences, sequences, (sequences, sequences), (0, 0), 0, like),
        )
        assert [plan.implementation for plan in plans] == [attention] * 2
        return [None if plan.mask is None else plan.mask.shape for plan in plans]

    def test_split_needs_none(self):
        assert self.masks("split", self.PADDED) == self.masks("split", self.EVEN) == [None, None]

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_an_encoder_without_padding_needs_none(self, attention):
        assert self.masks(attention, self.EVEN) == [None, (1, 1, 4, 8)]
        assert self.masks(attention, self.PADDED) == [(2, 1, 1, 4), (2, 1, 4, 8)]
