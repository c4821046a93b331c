"""FLOPs of the encoder-decoder, and what devices can do: arithmetic, without torch.

Symbols: S_e encoder and S_d decoder tokens of an example, L layers of either stack, d hidden width, a query heads
together, V rows of the embedding, which is the head as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from encdec.denoisers import UL2_DENOISERS, checked_task_weights
from encdec.estimates import ModelSize

BACKWARD_AND_FORWARD = 3
"""A training step in forward passes: a backward pass takes two. Layers that are computed again count for nothing."""


@dataclass(frozen=True)
class Accelerator:
    """What one GPU has."""

    memory_gb: float
    """GB of 10**9 bytes, as its maker calls it."""
    bf16_flops: float
    """Peak of dense matrix products in bfloat16, FLOP/s."""


ACCELERATORS: Mapping[str, Accelerator] = {
    "a100": Accelerator(40, 312e12),
    "a100-80gb": Accelerator(80, 312e12),
    "l40s": Accelerator(48, 362e12),
    "h100": Accelerator(80, 989e12),
    "h200": Accelerator(141, 989e12),
    "b200": Accelerator(180, 2250e12),
}
"""By name; from NVIDIA's data sheets, of the SXM modules where there are several."""


def accelerator_in(text: str) -> str | None:
    """The name of an accelerator that ``text`` holds, such as a Slurm GRES ("gpu:h100:8"); None where there is none.

    Only as a whole word, for a GH200 is no H200 and an A1000 no A100. Of several that fit the longest: "a100-80gb"
    before "a100". What stands between a name and its memory is left out: NVIDIA's drivers say "A100-SXM4-80GB".
    """
    plain = re.sub(r"-(sxm\d*|pcie|nvl)(?![a-z0-9])", "", re.sub(r"[_ ]", "-", text.lower()))
    found = (name for name in ACCELERATORS if re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", plain))
    return max(found, key=len, default=None)


def forward_flops(size: ModelSize, encoder_tokens: int, decoder_tokens: int) -> float:
    """FLOPs of the forward pass of one example, padding not counted.

    2 [N_e S_e + N_x S_e + N_d S_d + V d S_d] + 4 a L [S_e^2 + S_d^2 + S_e S_d], with N_e and N_d the parameters of
    either stack's layers and N_x those of the decoder's key and value projections, which also run on the encoder's
    output (merged attention). Of experts those count that a token passes. Two FLOPs a parameter and token: Kaplan et
    al. 2020 (arXiv:2001.08361, section 2.1); attention's scores and their sums of values besides: Chowdhery et al. 2022
    (arXiv:2204.02311, appendix B), whose full square is counted also where the mask is causal.
    """
    stack = (size.active - size.embedding) / 2
    shared = size.layers * 2 * size.widths.hidden * size.widths.key_value
    products = stack * encoder_tokens + shared * encoder_tokens + (stack + size.embedding) * decoder_tokens
    pairs = encoder_tokens**2 + decoder_tokens**2 + encoder_tokens * decoder_tokens
    return 2.0 * products + 4.0 * size.widths.query * size.layers * pairs


def training_flops_per_sample(
    size: ModelSize, sample_length: int, num_sentinels: int, task_weights: Sequence[float] = (1, 1, 1, 1, 4)
) -> float:
    """FLOPs of training on one sample, the mean over the denoisers by their weights.

    A backward pass takes two forward passes, one for the gradients of weights: frozen ones have none.

    Args:
        sample_length: raw tokens.
        num_sentinels: of the tokenizer.
        task_weights: of UL2_DENOISERS, in that order.
    """
    weights = checked_task_weights(task_weights)
    sides = [denoiser.side_lengths(sample_length, num_sentinels) for denoiser in UL2_DENOISERS]
    forward = sum(weight * forward_flops(size, *side) for weight, side in zip(weights, sides, strict=True))
    return (BACKWARD_AND_FORWARD - size.frozen / size.parameters) * forward / sum(weights)


def widest_sides(
    sample_length: int, num_sentinels: int, task_weights: Sequence[float] = (1, 1, 1, 1, 4), *, multiple: int = 8
) -> tuple[int, int]:
    """(S_e, S_d) of the widest batch that the mixture makes, padded to ``multiple``."""
    weights = checked_task_weights(task_weights)
    used = [denoiser for denoiser, weight in zip(UL2_DENOISERS, weights, strict=True) if weight > 0]
    sides = [denoiser.side_lengths(sample_length, num_sentinels) for denoiser in used]
    widest = (max(side[which] for side in sides) for which in (0, 1))
    encoder, decoder = (-(-width // multiple) * multiple for width in widest)
    return encoder, decoder
