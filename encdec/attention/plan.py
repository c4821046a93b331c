"""How a stack's layers attend in one forward pass: by which implementation, over tokens that lie how.

| implementation | hidden states        | mask                                | inside attention          |
|----------------|----------------------|-------------------------------------|---------------------------|
| split          | packed               | none                                | packed                    |
| flex_attention | packed               | of blocks                           | packed                    |
| sdpa, eager    | packed               | additive, of the padded batch       | padded for the time       |
| any            | padded: with a cache | additive, of the padded batch       | padded; sdpa unless eager |

With a cache (generation), and where torch.compile takes in the whole of a model with masks, hidden states stay padded.

Shape legend:
    B    sequences                       N_q  query heads
    S    their padded width              N_k  key and value heads
    T    tokens of all sequences         D    head size
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from encdec.attention.flex import attend_by_flex, packed_block_mask
from encdec.attention.kernels import flash_can, packed_attention, split_attention
from encdec.attention.masks import encoder_attention_bias, merged_attention_bias, positions_of
from encdec.attention.sequences import Sequences

SPLIT, FLEX, SDPA, EAGER = "split", "flex_attention", "sdpa", "eager"
IMPLEMENTATIONS = (SPLIT, FLEX, SDPA, EAGER)
AttentionMask = Tensor | Sequences | None
"""[B, S], 1 for tokens and 0 for padding; or what that comes to; None where nothing is padded."""

AttentionInterface.register(SPLIT, sdpa_attention_forward)  # what transformers may call it for: tensors with a mask


class Attending(Protocol):
    """What attention needs of the module that it is the attention of; Qwen3Attention has it."""

    scaling: float
    is_causal: bool
    attention_dropout: float
    training: bool


class AttentionPlan(NamedTuple):
    """What all layers of a stack share in one forward pass. A tuple, as ``Sequences`` is, and for the same reasons."""

    implementation: str
    positions: Tensor
    """[B or 1, S], or [1, T]: places of the queries in their sequences."""
    queries: Sequences | None
    """How hidden states are packed; None: [B, S]."""
    encoder: Sequences | None
    """How the encoder's output is packed, for merged attention over packed queries."""
    mask: Any
    """[B or 1, 1, S or 1, keys] to be added to the scores, a BlockMask, or None where every key is allowed."""


def lay_out(mask: AttentionMask, shape: torch.Size, device: torch.device) -> Sequences | None:
    """The tokens of sequences that fill or are padded to ``shape`` [B, S]; None where they have to stay padded.

    Raises:
        ValueError: the mask is of another shape.
    """
    given = shape if mask is None else (mask.batch, mask.width) if isinstance(mask, Sequences) else mask.shape
    if tuple(given) != tuple(shape):
        raise ValueError(f"an attention mask must have the shape of its tokens, {tuple(shape)}: {tuple(given)}")
    if mask is None:
        return Sequences.whole(shape[0], shape[1], device)
    if isinstance(mask, Sequences):
        return mask
    return None if torch.compiler.is_compiling() else Sequences.from_mask(mask)  # how many tokens is data


def without_padding(mask: AttentionMask) -> AttentionMask:
    """A mask as the sequences that it leaves, where tokens can be packed by it."""
    if mask is None or isinstance(mask, Sequences) or torch.compiler.is_compiling():
        return mask
    return Sequences.from_mask(mask)


def legal(implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float = 0.0) -> bool:
    """Whether the implementation computes with such tensors."""
    if implementation == SPLIT:
        return not dropout and flash_can(device, dtype, head_dim)
    if implementation == FLEX:  # torch's has no backward pass on CPU
        place = (device.type == "cuda" and head_dim >= 16) or (device.type == "cpu" and not torch.is_grad_enabled())
        return not dropout and place
    return implementation in (SDPA, EAGER)


def plan_encoder(
    stack: nn.Module, queries: Sequences | None, mask: AttentionMask, shape: torch.Size, like: Tensor
) -> AttentionPlan:
    """Full attention of an encoder.

    Args:
        stack: has the configuration.
        queries: the tokens, or None where they stay padded.
        mask: in that case [B, S], None where nothing is padded.
        shape: in that case (B, S).
        like: has the dtype and device of the computation.
    """
    if queries is None:
        mask = _tensor(mask)
        positions = positions_of(mask, 0, shape[1], like.device)
        return AttentionPlan(_with_masks(stack), positions, None, None, encoder_attention_bias(mask, like.dtype))
    name = _with_packing(stack, like)
    allowed: Any = None
    if name == FLEX and queries.positions.numel():
        allowed = packed_block_mask(queries, None, causal=False)
    elif name in (SDPA, EAGER) and queries.slots is not None:
        allowed = encoder_attention_bias(_within(queries), like.dtype)
    return AttentionPlan(name, queries.positions, queries, None, allowed)


def plan_decoder(
    stack: nn.Module, queries: Sequences | None, encoder: Sequences | None,
    masks: tuple[AttentionMask, AttentionMask], widths: tuple[int, int], num_cached: int, like: Tensor,
) -> AttentionPlan:  # fmt: skip
    """Merged attention of a decoder.

    Args:
        stack: has the configuration.
        queries, encoder: the tokens of both, or None where they stay padded.
        masks: in that case [B, cached + new tokens] of the decoder and [B, S] of the encoder; None: nothing is padded.
        widths: in that case new tokens of the decoder, and tokens of the encoder.
        num_cached: tokens in the cache.
        like: has the dtype and device of the computation.
    """
    dtype, device = like.dtype, like.device
    if queries is None or encoder is None:
        own, crossed = map(_tensor, masks)
        positions = positions_of(own, num_cached, widths[0], device)
        bias = merged_attention_bias(*widths, own, crossed, num_cached, dtype=dtype, device=device)
        return AttentionPlan(_with_masks(stack), positions, None, None, bias)
    name = _with_packing(stack, like)
    allowed: Any = None
    if name == FLEX:
        allowed = packed_block_mask(queries, encoder, causal=True)
    elif name in (SDPA, EAGER):  # sequences stand at the left: causality hides what is behind them
        padded = None if encoder.slots is None else _within(encoder)
        lengths = queries.longest, encoder.longest
        allowed = merged_attention_bias(*lengths, None, padded, 0, dtype=dtype, device=device)
    return AttentionPlan(name, queries.positions, queries, encoder, allowed)


def attend(
    module: Attending, plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Attention of sequences to themselves.

    Args:
        query: [B, N_q, S, D] or [1, N_q, T, D].
        key, value: [B, N_k, S, D] or [1, N_k, T, D].

    Returns:
        [B, S, N_q, D] or [1, T, N_q, D]; and the weights [B, N_q, S, S] where tokens are padded and attention is eager.
    """
    queries = plan.queries
    if queries is None:
        return _attend_with_mask(module, plan, query, key, value)
    return _attend_packed(module, plan, queries, query, key, value), None


def _attend_packed(
    module: Attending, plan: AttentionPlan, queries: Sequences, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    if query.shape[2] == 0:
        return _nothing(query, key, value)
    if plan.implementation == SPLIT:
        tensors = _tokens_first(query.to(value.dtype), key.to(value.dtype), value)
        return packed_attention(*tensors, queries.offsets, queries.longest, module.is_causal, module.scaling)[0][None]
    if plan.implementation == FLEX:
        return attend_by_flex(query, key, value, plan.mask, module.scaling)
    return queries.gather(_attend_with_mask(module, plan, *map(queries.spread, (query, key, value)))[0])


def attend_merged(
    module: Attending, plan: AttentionPlan, query: Tensor, own: tuple[Tensor, Tensor], encoder: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Attention of a decoder to its own past and to an encoder's output, under one softmax.

    Args:
        query: [B, N_q, S, D] or [1, N_q, T, D].
        own, encoder: keys and values of both, [B, N_k, tokens, D] or [1, N_k, tokens, D].

    Returns:
        [B, S, N_q, D] or [1, T, N_q, D]; and the weights [B, N_q, S, keys] where tokens are padded and attention is
        eager.
    """
    queries, crossed = plan.queries, plan.encoder
    if queries is None or crossed is None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(own, encoder, strict=True))
        return _attend_with_mask(module, plan, query, key, value)
    return _attend_merged_packed(module, plan, (queries, crossed), query, own, encoder), None


def _attend_merged_packed(
    module: Attending, plan: AttentionPlan, sequences: tuple[Sequences, Sequences], query: Tensor,
    own: tuple[Tensor, Tensor], encoder: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    queries, crossed = sequences
    if query.shape[2] == 0:
        return _nothing(query, *own, *encoder)
    if plan.implementation == SPLIT:
        dtype = own[1].dtype
        tensors = _tokens_first(*(tensor.to(dtype) for tensor in (query, *own, *encoder)))
        return split_attention(
            *tensors, queries.offsets, crossed.offsets, queries.longest, crossed.longest, module.scaling
        )[0][None]
    if plan.implementation != FLEX:
        query, own = queries.spread(query), (queries.spread(own[0]), queries.spread(own[1]))
        encoder = crossed.spread(encoder[0]), crossed.spread(encoder[1])
    key, value = (torch.cat(pair, dim=2) for pair in zip(own, encoder, strict=True))
    if plan.implementation == FLEX:
        return attend_by_flex(query, key, value, plan.mask, module.scaling)
    return queries.gather(_attend_with_mask(module, plan, query, key, value)[0])


def _attend_with_mask(
    module: Attending, plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor | None]:
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(plan.implementation, eager_attention_forward)
    dropout = module.attention_dropout if module.training else 0.0
    return attention(module, query, key, value, plan.mask, dropout=dropout, scaling=module.scaling)


def _nothing(query: Tensor, *others: Tensor) -> Tensor:
    """No token, but a gradient (zero) for all: sharded training waits for each parameter's."""
    return (query + sum(other.sum() for other in others)).transpose(1, 2)


def _with_packing(stack: nn.Module, like: Tensor) -> str:
    """What is configured, or sdpa where these tensors are not for it (say, float32 on a GPU)."""
    config: Any = stack.config
    dropout = config.attention_dropout if stack.training else 0.0
    name = config._attn_implementation
    return name if legal(name, like.device, like.dtype, config.head_dim, dropout) else SDPA


def _with_masks(stack: nn.Module) -> str:
    config: Any = stack.config
    return EAGER if config._attn_implementation == EAGER else SDPA


def _tensor(mask: AttentionMask) -> Tensor | None:
    """Of tokens that stay padded.

    Raises:
        TypeError: it is given as sequences.
    """
    if isinstance(mask, Sequences):
        raise TypeError("with a cache, and inside torch.compile, an attention mask must be a tensor of ones and zeros")
    return mask


def _within(sequences: Sequences) -> Tensor:
    """[B, L] bool: where a token of the sequence stands, all of them at the left."""
    return torch.arange(sequences.longest, device=sequences.offsets.device) < sequences.lengths[:, None]


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    """Each [1, N, T, D] -> [T, N, D], as the kernels want them in memory."""
    return [tensor[0].transpose(0, 1).contiguous() for tensor in tensors]
