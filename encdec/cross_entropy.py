"""Cross-entropy of a language-model head, without ever holding the logits of all tokens at once.

At Qwen3's vocabulary one token's logits are 151,936 numbers: 0.6 MB in float32, 2.5 GB for 4,096 tokens, and a plain
loss holds them three times. Here the head is applied to a piece of the labelled tokens at a time, and while a piece's
logits are there, its part of both gradients is computed from them: the backward pass only scales what is there already.
That costs no product more than a plain loss does, where computing each piece again in the backward pass (activation
checkpointing) costs a third of the head. torch's own `linear_cross_entropy` goes the same way, but returns the loss and
the matrix's gradient rounded to bfloat16 where the inputs are.

Shape legend:
    N  labelled tokens    H  hidden size    V  vocabulary, rows of the head    C  tokens of a piece
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100  # torch's and transformers' mark for label positions without loss
MAX_LOGITS_BYTES = 512 * 10**6
"""Default bound of one piece's logits in float32: 842 tokens at Qwen3's vocabulary, enough to keep a GPU busy."""


def chunked_cross_entropy(
    hidden_states: Tensor,
    head: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    labelled: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of `hidden_states @ head.T` in nats, summed in float32 over labelled tokens, over their number.

    Tokens without a label are dropped before the product. Gradients are those of the plain loss, the matrix's summed in
    float32 over all pieces. They are computed in the forward pass, if gradients are asked for; once differentiable.

    Inside torch.compile, where numbers of tokens must not depend on data, tokens without a label pass through as well,
    and each piece is computed again in the backward pass: one graph, in the same memory.

    Args:
        hidden_states: [..., H].
        head: [V, H]; of the same type, or float32 under autocast.
        labels: [...], -100 where there is no loss. Without any label the loss is 0.
        num_items_in_batch: the divisor, in tokens; default: the labelled ones.
        max_logits_bytes: what the [C, V] float32 logits of one piece may take. A piece has one token at least.
        labelled: `labelled_places` of the labels, where the host has waited for them before; not in torch.compile.

    Returns:
        A float32 scalar.
    """
    flat_labels, piece = labels.flatten(), tokens_per_piece(head.shape[0], max_logits_bytes)
    if torch.compiler.is_compiling():
        total = _recomputed_cross_entropy(hidden_states.flatten(0, -2), head, flat_labels, piece)
        if num_items_in_batch is None:
            return total / (flat_labels != IGNORED_LABEL).sum().clamp(min=1)
        return total / num_items_in_batch
    if labelled is None:
        labelled = labelled_places(labels)
    kept, targets = hidden_states.flatten(0, -2)[labelled], flat_labels[labelled]
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        kept, head = kept.to(dtype), head.to(dtype)
    with torch.autocast(device, enabled=False):
        total = _SummedCrossEntropy.apply(kept, head, targets, piece, torch.is_grad_enabled())
    return total / (max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch)


def labelled_places(labels: Tensor) -> Tensor:
    """[N] places of the labels that count among all; their number is data, for which the host waits."""
    return (labels.flatten() != IGNORED_LABEL).nonzero().squeeze(1)


def tokens_per_piece(vocabulary: int, max_logits_bytes: int) -> int:
    """C: tokens whose float32 logits fit the bound; one at least."""
    return max(1, max_logits_bytes // (vocabulary * torch.float32.itemsize))


def _recomputed_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, piece: int) -> Tensor:
    """Sum over labelled tokens, float32; [T, H], [V, H] and [T] -> []. All pieces in a graph, none of them kept."""

    def of_piece(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, head).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")

    if len(hidden) <= piece:
        return of_piece(hidden, head, labels)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for first in range(0, len(hidden), piece):
        here = slice(first, first + piece)
        total = total + checkpoint(of_piece, hidden[here], head, labels[here], use_reentrant=False)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum over tokens, float32; both gradients are made beside it, piece by piece."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, piece: int, with_gradients: bool) -> Tensor:
        """[N, H], [V, H] and [N] -> []."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_hidden, wants_head = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        head_gradient = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if wants_head else None
        for first in range(0, len(hidden), piece):
            here = slice(first, first + piece)
            target = targets[here, None]  # [C, 1]
            scores = F.log_softmax(F.linear(hidden[here], head), dim=-1, dtype=torch.float32)  # [C, V]
            of_target = scores.gather(1, target)
            total -= of_target.sum()
            if not (wants_hidden or wants_head):
                continue
            # d loss / d logits = softmax - one-hot, in place of the scores
            gradient = scores.exp_().scatter_(1, target, of_target.exp() - 1).to(head.dtype)
            if hidden_gradient is not None:
                torch.mm(gradient, head, out=hidden_gradient[here])
            if head_gradient is not None:
                _add_product(head_gradient, gradient, hidden[here])
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, of_total: Tensor):  # type: ignore[override]
        """Scaled copies, so that the graph may be kept and gone through again."""
        hidden_gradient, head_gradient = ctx.saved_tensors
        scaled_hidden = None if hidden_gradient is None else hidden_gradient * of_total
        scaled_head = None
        if head_gradient is not None:  # into the head's own type, without another copy in float32
            scaled_head = torch.empty_like(head_gradient, dtype=ctx.head_dtype)
            torch.mul(head_gradient, of_total, out=scaled_head)
        return scaled_hidden, scaled_head, None, None, None


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [V, H] += gradient [C, V] transposed @ hidden [C, H], summed in float32."""
    if hidden.dtype == total.dtype:
        torch.addmm(total, gradient.t(), hidden, out=total)  # which torch's counter of FLOPs sees, unlike addmm_
    elif hidden.is_cuda:
        total += torch.mm(gradient.t(), hidden, out_dtype=total.dtype)  # tensor cores sum in float32 anyhow
    else:
        total += gradient.t() @ hidden
