"""The UL2 mixture as a table, and the arithmetic of its lengths. No numpy: the plan needs it too.

Symbols: L raw tokens per sample, N noise tokens, s spans; S_e = L - N + s + 1 encoder tokens and S_d = N + s + 1
decoder tokens (the + 1 is EOS on either side).

Sources: UL2 (Tay et al., 2022, arXiv:2205.05131) and the five-task mixture of T5Gemma (Zhang et al., 2025,
arXiv:2504.06225).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from encdec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One task of the mixture."""

    name: str
    """Name used in tables and logs."""
    mean_span: float
    """Mean length of a noise span, in tokens; below 1 it is a fraction of the sample length L."""
    noise_rate: float
    """Share of the L raw tokens that is noise."""
    weight: float
    """Default share of samples that get this task, relative to the other weights."""

    @property
    def mode_token(self) -> str:
        """UL2's name of its kind, which may open the encoder input."""
        return f"[{self.name[0]}]"

    def counts(self, sample_length: int, num_sentinels: int) -> tuple[int, int]:
        """(N noise tokens, s spans) of a sample of L tokens, with L >= 2.

        Too few sentinels make the spans fewer and longer; the noise count stays.
        """
        noise = min(max(round(sample_length * self.noise_rate), 1), sample_length - 1)
        mean_span = self.mean_span * sample_length if self.mean_span < 1 else self.mean_span
        spans = max(1, round(noise / mean_span))
        return noise, min(spans, noise, sample_length - noise, num_sentinels)

    def side_lengths(self, sample_length: int, num_sentinels: int) -> tuple[int, int]:
        """(S_e, S_d): tokens on the encoder and the decoder side, sentinels and EOS included."""
        noise, spans = self.counts(sample_length, num_sentinels)
        return sample_length - noise + spans + 1, noise + spans + 1


UL2_DENOISERS: tuple[Denoiser, ...] = (
    Denoiser(name="R1", mean_span=3, noise_rate=0.15, weight=1),
    Denoiser(name="R2", mean_span=12, noise_rate=0.50, weight=1),
    Denoiser(name="X1", mean_span=32, noise_rate=0.15, weight=1),
    Denoiser(name="X2", mean_span=32, noise_rate=0.50, weight=1),
    Denoiser(name="S", mean_span=0.75, noise_rate=0.75, weight=4),  # prefix LM: one span, the last 3/4 of the sample
)
"""The five tasks: regular (R), extreme (X), sequential (S)."""


def checked_task_weights(task_weights: Sequence[float]) -> tuple[float, ...]:
    """The weights as floats, one per task of UL2_DENOISERS.

    Raises:
        ConfigError: not five weights, one is negative, all are zero, or their sum is not finite.
    """
    weights = tuple(float(weight) for weight in task_weights)
    if len(weights) != len(UL2_DENOISERS) or not all(w >= 0 for w in weights) or not 0 < sum(weights) < math.inf:
        names = ", ".join(denoiser.name for denoiser in UL2_DENOISERS)
        raise ConfigError(
            f"data.ul2_task_weights must be {len(UL2_DENOISERS)} numbers >= 0, not all zero, in the order {names}",
            found=list(task_weights),
            remedy="Use [1, 1, 1, 1, 4], the default mixture",
        )
    return weights


def raw_sample_length(
    max_encoder_length: int,
    max_decoder_length: int,
    max_seq_length: int,
    num_sentinels: int,
    task_weights: Sequence[float] = (1, 1, 1, 1, 4),
) -> int:
    """The largest L <= `max_seq_length` of which every task in use fits both sides, sentinels and EOS included.

    Args:
        max_encoder_length, max_decoder_length: limits of S_e and S_d, in tokens.
        max_seq_length: limit of L, in raw tokens.
        num_sentinels: sentinels of the tokenizer, which cap the number of spans.
        task_weights: tasks of weight 0 are never drawn, so they need not fit.

    Raises:
        ConfigError: not even two raw tokens fit.
    """
    used = [d for d, weight in zip(UL2_DENOISERS, checked_task_weights(task_weights), strict=True) if weight > 0]

    def fits(length: int) -> bool:
        sides = [denoiser.side_lengths(length, num_sentinels) for denoiser in used]
        return all(enc <= max_encoder_length and dec <= max_decoder_length for enc, dec in sides)

    low, high = 1, max_seq_length  # no side shrinks when L grows, so bisection finds the last L that fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if low < 2 or num_sentinels < 1:
        raise ConfigError(
            "Two raw tokens, a sentinel and EOS must fit data.max_encoder_length, data.max_decoder_length and"
            " data.max_seq_length",
            found=f"{max_encoder_length}, {max_decoder_length} and {max_seq_length} with {num_sentinels} sentinels",
            remedy="Raise the limits; 4096, 2048 and 8192 with 100 sentinels are the defaults",
        )
    return low
