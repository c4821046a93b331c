"""How large a configured model will be, known without torch, hub or weights: for plans and checks before a run."""

from __future__ import annotations

import json
from pathlib import Path

from encdec.estimates import LayerWidths, ModelSize
from encdec.training.config import ArchitectureConfig, ModelConfig
from encdec.training.rules import count_parameters
from encdec.vocabulary import MODE_TOKENS

QWEN3_ROWS, QWEN3_USED_ROWS = 151_936, 151_669
"""Of the embedding that all Qwen3 models have, and of that those that its tokenizer uses."""
VOCABULARY_MULTIPLE = 64
"""An embedding that has to grow does so to a multiple of this."""


def _qwen3(hidden: int, feed_forward: int, layers: int, heads: int) -> ArchitectureConfig:
    return ArchitectureConfig(
        hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960,
    )  # fmt: skip


QWEN3_SHAPES = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32),
    "Qwen3-8B": _qwen3(4096, 12_288, 36, 32),
    "Qwen3-14B": _qwen3(5120, 17_408, 40, 40),
    "Qwen3-32B": _qwen3(5120, 25_600, 64, 64),
}
"""Qwen3's dense models, by the name that theirs on the hub ends in (with -Base or without), from their config.json."""


def model_size(model: ModelConfig) -> ModelSize | None:
    """The encoder-decoder that ``model`` describes; None where its sizes cannot be known from here."""
    known = _shape_of(model)
    if known is None:
        return None
    shape, rows = known
    layers = 2 * shape.num_hidden_layers
    parameters = count_parameters(shape, rows)
    norms = layers * (2 * shape.hidden_size + 2 * shape.head_dim) + 2 * shape.hidden_size
    embedding = rows * shape.hidden_size
    return ModelSize(
        parameters=parameters, matrices=parameters - embedding - norms, embedding=embedding, vocabulary=rows,
        layers=shape.num_hidden_layers,
        widths=LayerWidths(
            shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim,
            shape.intermediate_size,
        ),
    )  # fmt: skip


def _shape_of(model: ModelConfig) -> tuple[ArchitectureConfig, int] | None:
    """Shape of either stack, and rows of the embedding."""
    if model.from_scratch:
        rows = model.train_tokenizer_vocab_size or _rows_of_tokenizer(model)
        return (model.from_scratch, rows) if rows else None
    if Path(model.model_name_or_path, "config.json").is_file():
        return _read_shape(Path(model.model_name_or_path, "config.json"), _added(model))
    name = model.model_name_or_path.rpartition("/")[2].removesuffix("-Base")
    return (QWEN3_SHAPES[name], _grown(QWEN3_ROWS, _added(model))) if name in QWEN3_SHAPES else None


def _rows_of_tokenizer(model: ModelConfig) -> int | None:
    """Entries of a tokenizer that is named; Qwen3's are known, and its sentinels come on top."""
    name = (model.tokenizer_name_or_path or model.model_name_or_path).rpartition("/")[2].removesuffix("-Base")
    return QWEN3_USED_ROWS + _added(model) if name in QWEN3_SHAPES else None


def _added(model: ModelConfig) -> int:
    """Tokens that a tokenizer gets beside its own: sentinels, mode tokens."""
    return model.num_sentinel_tokens + len(MODE_TOKENS) * model.use_mode_tokens


def _read_shape(path: Path, added: int) -> tuple[ArchitectureConfig, int] | None:
    """What a saved Qwen3's config.json says; None if it is not one's."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shape = ArchitectureConfig(**{key: values[key] for key in ArchitectureConfig.model_fields})
        return shape, _grown(int(values["vocab_size"]), added)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _grown(rows: int, added: int) -> int:
    """Rows with room for added tokens: Qwen3's own embedding has some that its tokenizer leaves unused."""
    needed = (QWEN3_USED_ROWS if rows == QWEN3_ROWS else rows) + added
    return rows if needed <= rows else -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
