"""Parts of the model's section that have keys of their own: sizes, low-rank adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from encdec.training.config_section import Fraction, NonNegativeInt, PositiveFloat, Section, Size

AttentionMatrix = Literal["q_proj", "k_proj", "v_proj", "o_proj"]
FeedForwardMatrix = Literal["gate_proj", "up_proj", "down_proj"]
FEED_FORWARD_MATRICES: tuple[FeedForwardMatrix, ...] = ("gate_proj", "up_proj", "down_proj")


class ArchitectureConfig(Section):
    """Sizes of a model that starts from random weights. Encoder and decoder are alike."""

    hidden_size: Size
    """Width of the residual stream."""
    intermediate_size: Size
    """Width of the gated feed-forward."""
    num_hidden_layers: Size
    """Layers in the encoder, and again in the decoder."""
    num_attention_heads: Size
    """Query heads."""
    num_key_value_heads: Size
    """Key and value heads; divides the query heads."""
    head_dim: Size
    """Width of one head; not derived from hidden_size (Qwen3 keeps it explicit)."""
    max_position_embeddings: Size = 8192
    """Longest sequence, tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ArchitectureConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, found {self.num_key_value_heads} "
                f"and {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, found {self.head_dim}")
        return self


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): they are trained, the model's own weights stay as they are.

    A matrix W of ``target_modules`` becomes W + alpha / rank B A. Names and meanings are peft's.
    """

    rank: Annotated[int, Field(gt=0, le=2**16)] = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """What adapters are multiplied by, times rank."""
    dropout: Fraction = 0.0
    """Share of an adapter's inputs that is dropped. Above 0 what is trained depends on the number of ranks."""
    target_modules: Annotated[list[AttentionMatrix | FeedForwardMatrix], Field(min_length=1)] = [
        "q_proj", "k_proj", "v_proj", "o_proj",
    ]  # fmt: skip
    """Matrices that get adapters, in encoder and decoder: also gate_proj, up_proj, down_proj, where there are no
    experts."""
    layers: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """Layers of either stack whose matrices get adapters, from 0; all unless given."""
    modules_to_save: list[Literal["norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"]] = []
    """Modules that are trained whole besides, and saved with the adapters: all whose names end so ("norm": all norms).
    The embedding cannot be one: both stacks and the head share it, and an adapter's folder would tear them apart."""

    @field_validator("target_modules", "layers", "modules_to_save")
    @classmethod
    def _each_once(cls, value: list[object] | None) -> list[object] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("each must be named once")
        return value
