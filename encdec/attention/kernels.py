"""Flash attention over packed sequences, and merged attention as two of them under one softmax.

The mask of merged attention (causal over the decoder's keys, full over the encoder's) is none that a flash kernel
knows. But softmax attention over two sets of keys is a mean of the attentions over each, weighted by their sums of
exponentials: with outputs o_1, o_2 and log-sum-exps l_1, l_2

    l = log(exp(l_1) + exp(l_2)),    o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2.

So each part goes through the kernel that knows its mask. The flash backward pass makes the probabilities anew from the
log-sum-exp that it is given, and takes dO * O from the output that it is given: with the COMBINED ones it gives the
exact gradient of the whole for each part's keys, and the queries' gradient is the sum of both (as in ring attention's
backward pass, Liu et al. 2023, arXiv:2310.01889). No mask exists, no merged key tensor, no repeated key or value head.

Operators of their own, so that torch.compile sees one node and a checkpointing policy can name it.

Shape legend:
    T_d  decoder tokens of all sequences     N_q  query heads
    T_e  encoder tokens of all sequences     N_k  key and value heads; divides N_q
    B    sequences                           D    head size
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

aten = torch.ops.aten
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_HEAD_DIM, FLASH_HEAD_DIM_MULTIPLE = 256, 8


def flash_can(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this torch's flash kernels compute with such tensors."""
    if device.type == "cuda":
        fits = head_dim <= FLASH_HEAD_DIM and head_dim % FLASH_HEAD_DIM_MULTIPLE == 0
        if not (fits and dtype in FLASH_DTYPES and torch.backends.cuda.is_flash_attention_available()):
            return False
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type in ("cpu", "meta") and dtype in (torch.float32, *FLASH_DTYPES)


# ---- operators


@custom_op("encdec::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Each sequence attends to itself.

    Args:
        query: [T, N_q, D].
        key, value: [T, N_k, D].
        offsets: [B + 1] int32, where sequences begin and end.
        longest: tokens of the longest one.
        causal: whether a token sees no later one.
        scale: of the scores.

    Returns:
        [T, N_q, D], and the log-sum-exp of the scores [N_q, T], float32.
    """
    return _forward(query, key, value, offsets, offsets, longest, longest, causal, scale)


@custom_op("encdec::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, longest: int,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    return _backward(grad, query, key, value, out, lse, offsets, offsets, longest, longest, causal, scale)


@custom_op("encdec::split_attention", mutates_args=())
def split_attention(
    query: Tensor, key: Tensor, value: Tensor, encoder_key: Tensor, encoder_value: Tensor, offsets: Tensor,
    encoder_offsets: Tensor, longest: int, encoder_longest: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Merged attention: each decoder token sees its sequence up to itself, and all of the encoder's tokens.

    Args:
        query: [T_d, N_q, D].
        key, value: [T_d, N_k, D].
        encoder_key, encoder_value: [T_e, N_k, D].
        offsets, encoder_offsets: [B + 1] int32, where sequences begin and end.
        longest, encoder_longest: tokens of the longest ones.
        scale: of the scores.

    Returns:
        [T_d, N_q, D], and the log-sum-exp of all of a query's scores [N_q, T_d], float32.
    """
    out, lse = _forward(query, key, value, offsets, offsets, longest, longest, True, scale)
    if encoder_longest == 0:
        return out, lse
    crossed, cross_lse = _forward(
        query, encoder_key, encoder_value, offsets, encoder_offsets, longest, encoder_longest, False, scale
    )
    merged_lse = torch.logaddexp(lse, cross_lse)
    own, other = (torch.exp(part - merged_lse).T.contiguous()[..., None] for part in (lse, cross_lse))
    return (own * out + other * crossed).to(query.dtype), merged_lse


@custom_op("encdec::split_attention_backward", mutates_args=())
def split_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, encoder_key: Tensor, encoder_value: Tensor, out: Tensor,
    lse: Tensor, offsets: Tensor, encoder_offsets: Tensor, longest: int, encoder_longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, encoder_key and encoder_value; ``out`` and ``lse`` are the combined ones."""
    to_query, to_key, to_value = _backward(
        grad, query, key, value, out, lse, offsets, offsets, longest, longest, True, scale
    )
    if encoder_longest == 0:
        return to_query, to_key, to_value, torch.zeros_like(encoder_key), torch.zeros_like(encoder_value)
    crossed, to_encoder_key, to_encoder_value = _backward(
        grad, query, encoder_key, encoder_value, out, lse, offsets, encoder_offsets, longest, encoder_longest, False,
        scale,
    )  # fmt: skip
    return to_query + crossed, to_key, to_value, to_encoder_key, to_encoder_value


# ---- what autograd and torch.compile know of them


def _out_and_lse(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        query.shape[1], query.shape[0], dtype=torch.float32
    )


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


packed_attention.register_fake(_out_and_lse)
split_attention.register_fake(_out_and_lse)
packed_attention_backward.register_fake(lambda grad, query, key, value, *_: _like(query, key, value))
split_attention_backward.register_fake(
    lambda grad, query, key, value, encoder_key, encoder_value, *_: _like(query, key, value, encoder_key, encoder_value)
)


def _keep(tensors: int) -> Any:
    """Save the first ``tensors`` inputs and the outputs for the backward pass, and the other inputs as they are."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.rest = inputs[tensors:]

    return setup_context


def _packed_backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, offsets, out, lse = ctx.saved_tensors
    return *packed_attention_backward(grad, query, key, value, out, lse, offsets, *ctx.rest), None, None, None, None


def _split_backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, offsets, encoder_offsets, out, lse = ctx.saved_tensors
    gradients = split_attention_backward(grad, *inputs, out, lse, offsets, encoder_offsets, *ctx.rest)
    return *gradients, None, None, None, None, None


packed_attention.register_autograd(_packed_backward, setup_context=_keep(4))
split_attention.register_autograd(_split_backward, setup_context=_keep(7))


# ---- the kernels


def _forward(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor, longest_query: int,
    longest_key: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[T_q, N_q, D] and [T_k, N_k, D] -> [T_q, N_q, D] and [N_q, T_q]; -inf and 0 where a sequence has no key."""
    if not query.is_cuda:
        return _forward_on_cpu(query, key, value, query_offsets, key_offsets, causal, scale)
    if query.shape[0] == 0:
        return torch.empty_like(query), query.new_empty(query.shape[1], 0, dtype=torch.float32)
    out, lse, *_ = aten._flash_attention_forward(
        query, key, value, query_offsets, key_offsets, longest_query, longest_key, 0.0, causal, False, scale=scale
    )
    return out, torch.where(lse == torch.inf, -torch.inf, lse)  # the kernel's mark of a row without keys


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, query_offsets: Tensor,
    key_offsets: Tensor, longest_query: int, longest_key: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not query.is_cuda:
        return _backward_on_cpu(grad, query, key, value, out, lse, query_offsets, key_offsets, causal, scale)
    if query.shape[0] == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    randomness = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, of which there is none
    return aten._flash_attention_backward(
        grad.contiguous(), query, key, value, out, lse, query_offsets, key_offsets, longest_query, longest_key, 0.0,
        causal, randomness, query.new_empty(0), scale=scale,
    )  # fmt: skip


def _forward_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """One sequence after the other: the kernel takes no offsets, and no example has padding this way."""
    out = query.new_zeros(query.shape)
    lse = query.new_full((query.shape[1], query.shape[0]), -torch.inf, dtype=torch.float32)
    for queries, keys in _pairs(query_offsets, key_offsets):
        attended, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(query[queries]), _heads_first(key[keys]), _heads_first(value[keys]), 0.0, causal, scale=scale
        )
        out[queries], lse[:, queries] = attended[0].transpose(0, 1), sums[0]
    return out, lse


def _backward_on_cpu(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, query_offsets: Tensor,
    key_offsets: Tensor, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    for queries, keys in _pairs(query_offsets, key_offsets):
        parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(grad[queries]), _heads_first(query[queries]), _heads_first(key[keys]),
            _heads_first(value[keys]), _heads_first(out[queries]), _lse_of(lse, queries), 0.0, causal, scale=scale,
        )  # fmt: skip
        for gradient, part, where in zip(gradients, parts, (queries, keys, keys), strict=True):
            gradient[where] = part[0].transpose(0, 1)
    return gradients


def _pairs(query_offsets: Tensor, key_offsets: Tensor) -> list[tuple[slice, slice]]:
    """Where each sequence's queries and keys lie, for those that have both."""
    queries, keys = query_offsets.tolist(), key_offsets.tolist()
    spans = zip(queries, queries[1:], keys, keys[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in spans if a < b and c < d]


def _heads_first(tokens: Tensor) -> Tensor:
    """[L, N, D] -> [1, N, L, D]."""
    return tokens.transpose(0, 1)[None]


def _lse_of(lse: Tensor, queries: slice) -> Tensor:
    """[N, T] -> [1, N, L], laid out as the kernel's own: tokens first."""
    return lse[:, queries].transpose(0, 1).contiguous().transpose(0, 1)[None]
