"""The operators against plain attention, sequence by sequence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from encdec.attention.kernels import flash_can, packed_attention, split_attention

HEADS, KV_HEADS, HEAD_DIM, SCALE = 4, 2, 16, 0.25
DECODER, ENCODER = [5, 9, 3, 1, 0], [7, 0, 4, 70, 2]
"""Tokens: sequences without an encoder, longer than a kernel's block, and without a decoder."""


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def heads(number: int, lengths: list[int], dtype=torch.float32) -> Tensor:
    return torch.randn(sum(lengths), number, HEAD_DIM).to(dtype).requires_grad_()


def tensors(dtype=torch.float32) -> list[Tensor]:
    sides = [(HEADS, DECODER), (KV_HEADS, DECODER), (KV_HEADS, DECODER), (KV_HEADS, ENCODER), (KV_HEADS, ENCODER)]
    return [heads(number, lengths, dtype) for number, lengths in sides]


def plain(query, key, value, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: [L, N, D] and log-sum-exp [N, L]."""
    query, key, value = (t.transpose(0, 1).repeat_interleave(HEADS // t.shape[1], 0) for t in (query, key, value))
    scores = (query @ key.transpose(1, 2) * SCALE).masked_fill(~allowed, -math.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1), scores.logsumexp(-1)


def plain_merged(query, key, value, encoder_key, encoder_value) -> tuple[Tensor, Tensor]:
    outs, sums = [], []
    parts = [part.split(DECODER) for part in (query, key, value)]
    parts += [part.split(ENCODER) for part in (encoder_key, encoder_value)]
    for own_query, own_key, own_value, other_key, other_value in zip(*parts, strict=True):
        length, others = len(own_key), len(other_key)
        allowed = torch.cat([torch.ones(length, length).tril(), torch.ones(length, others)], 1).bool()
        keys, values = torch.cat([own_key, other_key]), torch.cat([own_value, other_value])
        out, lse = plain(own_query, keys, values, allowed)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs), torch.cat(sums, 1)


def split(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return split_attention(*inputs, offsets(DECODER), offsets(ENCODER), max(DECODER), max(ENCODER), SCALE)


class TestSplit:
    def test_is_one_softmax_over_both_parts(self):
        inputs = tensors()
        torch.testing.assert_close(split(*inputs), plain_merged(*inputs), atol=1e-5, rtol=1e-5)

    def test_gradients_are_exact(self):
        inputs, gradient = tensors(), torch.randn(sum(DECODER), HEADS, HEAD_DIM)
        found, expected = (
            torch.autograd.grad(attend(*inputs)[0], inputs, gradient) for attend in (split, plain_merged)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_half_precision_is_as_near_as_plain_attention_in_it(self):
        inputs = tensors(torch.bfloat16)
        exact = plain_merged(*(tensor.float() for tensor in inputs))[0]
        found, rounded = split(*inputs)[0], plain_merged(*inputs)[0]
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).abs().max() <= 2 * (rounded.float() - exact).abs().max()

    def test_the_operators_keep_their_contract_with_torch(self):
        opcheck(split_attention, (*tensors(), offsets(DECODER), offsets(ENCODER), max(DECODER), max(ENCODER), SCALE))
        opcheck(packed_attention, (*tensors()[:3], offsets(DECODER), max(DECODER), True, SCALE))


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_attend_to_themselves(causal):
    inputs, gradient = tensors()[:3], torch.randn(sum(DECODER), HEADS, HEAD_DIM)
    pieces = zip(*(tensor.split(DECODER) for tensor in inputs), strict=True)
    masks = [torch.ones(length, length).tril(0 if causal else length).bool() for length in DECODER]
    expected = torch.cat([plain(*piece, mask)[0] for piece, mask in zip(pieces, masks, strict=True)])
    found = packed_attention(*inputs, offsets(DECODER), max(DECODER), causal, SCALE)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(out, inputs, gradient) for out in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_flash_knows_its_limits():
    assert flash_can(torch.device("cpu"), torch.float32, 128)
    assert not flash_can(torch.device("cuda"), torch.float32, 128)
    assert not flash_can(torch.device("cuda"), torch.bfloat16, 288)
    assert not flash_can(torch.device("cpu"), torch.int32, 128)
