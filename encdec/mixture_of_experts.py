"""Mixture of experts: several feed-forwards a layer, of which a router picks a few for each token.

The blocks are transformers' own (`models/qwen3_moe`): expert weights stacked in one tensor, multiplied by one grouped
product, whose sums have a fixed order (`grouped_mm`; the eager loop adds with atomics, which no resumption repeats to
the last bit on a GPU). Their load-balancing loss is not: it is taken over a micro-batch, so that what is trained would
depend on how a step is cut into micro-batches and ranks. Ours is DeepSeek-V3's, taken over each sequence
(arXiv:2412.19437, equations 17 to 20): a sum over samples, as the cross-entropy is.

Shape legend:
    B  examples     S  tokens of an example, padding included     H  hidden size
    E  experts      K  experts that a token passes                I  width of an expert
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)
from transformers.utils.output_capturing import CompileableContextVar

from encdec.attention.plan import AttentionMask
from encdec.attention.sequences import Sequences
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError


class Routing(NamedTuple):
    """What one layer's router decided."""

    logits: Tensor
    """[B, S, E]"""
    chosen: Tensor
    """[B, S, K] indices of experts."""


_recorder = CompileableContextVar("router_recorder")
"""The list that routings join, and whether they have gradients; None where nobody listens."""


class Qwen3MoeFeedForward(Qwen3MoeSparseMoeBlock):
    """transformers' block, which also says how it routed to whoever listens (`recorded_routing`).

    Its parameters: `gate.weight` [E, H], `experts.gate_up_proj` [E, 2 I, H], `experts.down_proj` [E, H, I].
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, weights, chosen = self.gate(flat)
        leading = hidden_states.shape[:-1]
        _record(Routing(logits.view(*leading, logits.shape[-1]), chosen.view(*leading, chosen.shape[-1])))
        return self.experts(flat, chosen, weights).view_as(hidden_states)


def feed_forward(config: Qwen3EncoderDecoderConfig) -> nn.Module:
    """A layer's feed-forward: Qwen3's gated one, or experts where `config.num_experts` says so."""
    return Qwen3MLP(config) if config.num_experts is None else Qwen3MoeFeedForward(config)


def initialize_experts(module: nn.Module, std: float) -> None:
    """Random first weights of what transformers' general rule does not know: stacked experts, routers."""
    if isinstance(module, Qwen3MoeExperts):
        init.normal_(module.gate_up_proj, mean=0.0, std=std)
        init.normal_(module.down_proj, mean=0.0, std=std)
    elif isinstance(module, Qwen3MoeTopKRouter):
        init.normal_(module.weight, mean=0.0, std=std)


# ---- the load-balancing loss


@contextmanager
def recorded_routing() -> Iterator[list[Routing]]:
    """Inside, each layer's routing joins the list that this yields, in order.

    Layers that are computed again in the backward pass are not inside any more, and are not recorded twice.
    """
    routings: list[Routing] = []
    token = _recorder.set((routings, torch.is_grad_enabled()))
    try:
        yield routings
    finally:
        _recorder.reset(token)


def routing_where(wanted: bool) -> AbstractContextManager[list[Routing]]:
    """``recorded_routing`` where it is wanted; else nobody listens, and the list stays empty."""
    return recorded_routing() if wanted else nullcontext([])


def _record(routing: Routing) -> None:
    recorder = _recorder.get()
    if recorder is None:
        return
    routings, with_gradient = recorder
    if with_gradient and not torch.is_grad_enabled():
        raise ConfigError(
            "gradient checkpointing of a mixture of experts must not be re-entrant: its load-balancing loss would have "
            "no gradient",
            found="use_reentrant=True",
            remedy='Call gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})',
        )
    routings.append(routing)


def spread_routing(
    routings: Sequence[Routing], mask: AttentionMask, shape: torch.Size | tuple[int, int]
) -> list[Routing]:
    """The routing of packed tokens [1, T, ...] where they stand in a batch [B, S, ...]; of padded tokens as it is.

    Args:
        mask: what the tokens were packed by.
        shape: (B, S).
    """

    def spread(routing: Routing) -> Routing:
        if routing.logits.shape[:2] == shape:
            return routing
        place = mask if isinstance(mask, Sequences) else Sequences.whole(shape[0], shape[1], routing.logits.device)
        return Routing(place.unpack(routing.logits), place.unpack(routing.chosen))

    return [spread(routing) for routing in routings]


def sequence_balance(routing: Routing, mask: Tensor | None) -> Tensor:
    """How unevenly one layer routed each sequence: 1 where its tokens are spread evenly, up to E / K.

    E times the sum over experts of the share of routes that went to it and its mean probability; the gradient is that
    of the probabilities.

    Args:
        mask: [B, S], true for tokens and false for padding, which does not count; None where nothing is padded.

    Returns:
        [B], float32; 0 for an example without tokens.
    """
    experts, per_token = routing.logits.shape[-1], routing.chosen.shape[-1]
    counted = torch.ones_like(routing.logits[..., 0], dtype=torch.float32) if mask is None else mask.float()
    share = (counted / counted.sum(dim=1, keepdim=True).clamp(min=1))[..., None]  # [B, S, 1], each row's sum is 1
    routed = F.one_hot(routing.chosen, experts).sum(dim=2).float() / per_token  # [B, S, E]; no atomics, unlike scatter
    probabilities = routing.logits.float().softmax(dim=-1)
    return experts * ((share * routed).sum(dim=1) * (share * probabilities).sum(dim=1)).sum(dim=-1)


def balancing_loss(
    stacks: Sequence[tuple[Sequence[Routing], Tensor | None]],
    targets: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The load-balancing loss of a batch: the mean over layers, averaged over examples by their target tokens.

    Weighted and divided as the cross-entropy is, so that of a global batch it is the same however that is cut.

    Args:
        stacks: of encoder and decoder, the routing of each layer and the mask [B, S].
        targets: [B], the target tokens of each example.
        num_items_in_batch: the divisor, in target tokens; by default their number.
    """
    rows = [sequence_balance(routing, mask) for routings, mask in stacks for routing in routings]
    items = targets.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return (torch.stack(rows).mean(dim=0) * targets).sum() / items


@dataclass
class Seq2SeqMoeLMOutput(Seq2SeqLMOutput):
    """A model's output with the parts of its loss: `loss` is `lm_loss` + `router_aux_loss_coef` * `aux_loss`."""

    lm_loss: Tensor | None = None
    """Cross-entropy alone, scalar; None without labels."""
    aux_loss: Tensor | None = None
    """Load-balancing loss, scalar, divided as the cross-entropy is; None without labels or without experts."""
