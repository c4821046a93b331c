"""The sizes in which the model is tried, from one that trains in minutes upward: one table, its arithmetic. No torch.

A scale's name is a label (50M, 7B, ...): about what one of the two stacks has together with the embedding. What the
encoder-decoder really has is computed (``num_parameters``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

from rich.console import Console
from rich.table import Table

from encdec.errors import ConfigError
from encdec.training.config import ArchitectureConfig
from encdec.training.rules import count_stack_parameters

VOCABULARY = 151_936
"""Rows of Qwen3's embedding, the tokenizer unless another is given."""


class ModelScale(StrEnum):
    """The scales, in the order in which they are earned."""

    TINY = "tiny"
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"
    XL = "xl"
    XXL = "xxl"
    FLAGSHIP = "flagship"


@dataclass(frozen=True)
class ScaleDefaults:
    """What training at a scale starts from, unless it is given."""

    learning_rate: float
    """Peak learning rate."""
    batch_size: int
    """Samples per optimizer step, all ranks."""
    micro_batch_size: int
    """Most samples of one micro-batch on one rank."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters, each counted once: the embedding is shared by both stacks and the head."""

    encoder: int
    decoder: int
    embedding: int

    @property
    def total(self) -> int:
        return self.encoder + self.decoder + self.embedding


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """One row of the table: a model of this scale, and what it takes."""

    name: str
    label: str
    """What people call the size."""
    hidden_size: int
    num_hidden_layers: int
    """Layers in the encoder, and again in the decoder."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the gated feed-forward."""
    max_position_embeddings: int
    """Longest sequence on either side, tokens."""
    memory_gb: int
    """Memory of one GPU that the scale is meant for, GB; how many it takes follows from the counts."""
    recommended_samples: int
    """Samples that one pass over the data should have at least."""
    defaults: ScaleDefaults

    @property
    def architecture(self) -> ArchitectureConfig:
        """The shape, as the configuration tree has it."""
        return ArchitectureConfig(**{name: getattr(self, name) for name in ArchitectureConfig.model_fields})

    def count(self, vocab_size: int = VOCABULARY) -> ParameterCounts:
        """The encoder-decoder's parameters by part.

        Args:
            vocab_size: rows of the embedding.
        """
        stack = count_stack_parameters(self.architecture)
        return ParameterCounts(stack, stack, vocab_size * self.hidden_size)

    def num_parameters(self, vocab_size: int = VOCABULARY) -> int:
        """All parameters of the encoder-decoder."""
        return self.count(vocab_size).total


def _row(
    scale: ModelScale, label: str, shape: tuple[int, int, int, int, int, int], context: int, memory: int, samples: int,
    defaults: tuple[float, int, int],
) -> ScaleConfig:  # fmt: skip
    hidden, layers, heads, kv_heads, head_dim, width = shape
    return ScaleConfig(
        name=scale.value, label=label, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=width, max_position_embeddings=context,
        memory_gb=memory, recommended_samples=samples, defaults=ScaleDefaults(*defaults),
    )  # fmt: skip


# Heads times head_dim is the hidden size; the feed-forward is three times as wide, as in Qwen3-0.6B and Qwen3-8B.
# Learning rates: GPT-3's for the nearest size (Brown et al., 2020, arXiv:2005.14165, table 2.1); TINY's is ours.
# scale, label, (hidden, layers, heads, kv heads, head_dim, feed-forward), context, GB, samples, (rate, batch, micro)
SCALES: Mapping[ModelScale, ScaleConfig] = {
    ModelScale(row.name): row
    for row in (
        _row(ModelScale.TINY, "50M", (512, 8, 8, 4, 64, 1536), 2048, 4, 1_000, (1e-3, 32, 8)),
        _row(ModelScale.SMALL, "125M", (768, 12, 12, 4, 64, 2304), 4096, 8, 5_000, (6e-4, 64, 8)),
        _row(ModelScale.MEDIUM, "500M", (1024, 24, 16, 8, 64, 3072), 4096, 16, 20_000, (3e-4, 128, 4)),
        _row(ModelScale.LARGE, "1B", (1536, 28, 12, 4, 128, 4608), 8192, 28, 50_000, (2e-4, 256, 4)),
        _row(ModelScale.XL, "3B", (2560, 32, 20, 4, 128, 7680), 8192, 45, 100_000, (1.6e-4, 256, 2)),
        _row(ModelScale.XXL, "7B", (4096, 32, 32, 8, 128, 12_288), 8192, 65, 150_000, (1.2e-4, 512, 1)),
        _row(ModelScale.FLAGSHIP, "13B", (5120, 40, 40, 8, 128, 15_360), 8192, 80, 200_000, (1e-4, 512, 1)),
    )
}  # fmt: skip


def scale_named(scale: ModelScale | str) -> ModelScale:
    """The scale of that name, in capitals or not.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(scale, str) and scale.lower() in set(ModelScale):
        return ModelScale(scale.lower())
    raise ConfigError(
        "A scale must be one of the table",
        found=repr(scale),
        remedy=f"Use one of {', '.join(ModelScale)}",
    )


def get_model_config(scale: ModelScale | str) -> ScaleConfig:
    """The row of a scale.

    Raises:
        ConfigError: there is no such scale.
    """
    return SCALES[scale_named(scale)]


def scales_between(start: ModelScale | str, end: ModelScale | str) -> tuple[ModelScale, ...]:
    """The scales from ``start`` up to ``end``, both included.

    Raises:
        ConfigError: ``end`` comes before ``start``.
    """
    ladder = list(ModelScale)
    first, last = ladder.index(scale_named(start)), ladder.index(scale_named(end))
    if last < first:
        raise ConfigError(
            "A progressive run goes from a scale to itself or to a larger one",
            found=f"{ladder[first]} to {ladder[last]}",
            remedy="Exchange them",
        )
    return tuple(ladder[first : last + 1])


def scale_table(vocab_size: int = VOCABULARY) -> Table:
    """All scales side by side; the counts are computed for an embedding of ``vocab_size`` rows."""
    table = Table(
        title="Scales of the encoder-decoder",
        caption=f"Counts are computed, for a vocabulary of {vocab_size:,}; layers are those of either stack.",
    )
    for name in (
        "scale", "label", "hidden", "layers", "heads (kv)", "head dim", "feed-forward", "context",
        "encoder", "decoder", "embedding", "total", "memory", "samples",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name in ("scale", "label") else "right")
    for row in SCALES.values():
        counts = row.count(vocab_size)
        table.add_row(
            row.name, row.label, f"{row.hidden_size:,}", str(row.num_hidden_layers),
            f"{row.num_attention_heads} ({row.num_key_value_heads})", str(row.head_dim), f"{row.intermediate_size:,}",
            f"{row.max_position_embeddings:,}", *map(in_short, (counts.encoder, counts.decoder, counts.embedding)),
            in_short(counts.total), f"{row.memory_gb} GB", f"{row.recommended_samples:,}",
        )  # fmt: skip
    return table


def in_short(count: int) -> str:
    """``count`` as a person says it: 34.4K, 128.2M, 12.97B."""
    if count < 1e6:
        return f"{count / 1e3:.1f}K"
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def scale_records(vocab_size: int = VOCABULARY) -> list[dict[str, object]]:
    """The same as plain values, for programs."""
    return [
        {**asdict(row), "parameters": {**asdict(row.count(vocab_size)), "total": row.num_parameters(vocab_size)}}
        for row in SCALES.values()
    ]


def print_scale_comparison(vocab_size: int = VOCABULARY, console: Console | None = None) -> None:
    """Show ``scale_table``; without a terminal every scale has its line, however long."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(scale_table(vocab_size))
