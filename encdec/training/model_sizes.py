"""How large a configured model will be, known without torch, hub or weights: for plans and checks before a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from encdec.estimates import LayerWidths, ModelSize
from encdec.training.config import ArchitectureConfig, ModelConfig
from encdec.training.model_options import LoraConfig
from encdec.training.rules import count_feed_forward_parameters, count_parameters
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


class Shape(NamedTuple):
    """Of an encoder-decoder: either stack's, rows of the embedding, experts."""

    stack: ArchitectureConfig
    rows: int
    n_experts: int | None
    top_k: int


def model_size(model: ModelConfig) -> ModelSize | None:
    """The encoder-decoder that ``model`` describes; None where its sizes cannot be known from here."""
    known = _shape_of(model)
    if known is None:
        return None
    shape, rows, n_experts, top_k = known
    layers = 2 * shape.num_hidden_layers
    parameters = count_parameters(shape, rows, n_experts)
    norms = layers * (2 * shape.hidden_size + 2 * shape.head_dim) + 2 * shape.hidden_size
    embedding = rows * shape.hidden_size
    passed = top_k if n_experts else 1
    whole = ModelSize(
        parameters=parameters, matrices=parameters - embedding - norms, embedding=embedding, vocabulary=rows,
        layers=shape.num_hidden_layers,
        inactive=layers * ((n_experts or 1) - passed) * count_feed_forward_parameters(shape),
        widths=LayerWidths(
            shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim,
            passed * shape.intermediate_size, passed if n_experts else 0,
        ),
    )  # fmt: skip
    return whole if model.lora is None else _with_adapters(whole, shape, model.lora)


def _with_adapters(base: ModelSize, shape: ArchitectureConfig, lora: LoraConfig) -> ModelSize:
    """All of ``base`` frozen but what ``lora`` adds and names."""
    heads, kv_heads = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    hidden, feed_forward = shape.hidden_size, shape.intermediate_size
    sides = {
        "q_proj": (hidden, heads), "k_proj": (hidden, kv_heads), "v_proj": (hidden, kv_heads),
        "o_proj": (heads, hidden), "gate_proj": (hidden, feed_forward), "up_proj": (hidden, feed_forward),
        "down_proj": (feed_forward, hidden),
    }  # fmt: skip
    layers = 2 * (shape.num_hidden_layers if lora.layers is None else len(lora.layers))
    adapters = layers * lora.rank * sum(sum(sides[name]) for name in lora.target_modules)
    per_layer = {"input_layernorm": hidden, "post_attention_layernorm": hidden, "q_norm": shape.head_dim}
    per_layer["k_norm"] = shape.head_dim
    named = [name for name in per_layer if name.endswith(tuple(lora.modules_to_save))]
    norms = 2 * shape.num_hidden_layers * sum(per_layer[name] for name in named)
    norms += 2 * hidden * ("norm" in lora.modules_to_save)
    return dataclasses.replace(
        base, parameters=base.parameters + adapters, matrices=adapters, frozen=base.parameters - norms
    )


def _shape_of(model: ModelConfig) -> Shape | None:
    if model.from_scratch:
        rows = model.train_tokenizer_vocab_size or _rows_of_tokenizer(model)
        return Shape(model.from_scratch, rows, model.n_experts, model.top_k) if rows else None
    if Path(model.model_name_or_path, "config.json").is_file():
        return _read_shape(Path(model.model_name_or_path, "config.json"), model)
    name = model.model_name_or_path.rpartition("/")[2].removesuffix("-Base")
    if name not in QWEN3_SHAPES:
        return None
    return Shape(QWEN3_SHAPES[name], _grown(QWEN3_ROWS, _added(model)), model.n_experts, model.top_k)


def _rows_of_tokenizer(model: ModelConfig) -> int | None:
    """Entries of a tokenizer that is named; Qwen3's are known, and its sentinels come on top."""
    name = (model.tokenizer_name_or_path or model.model_name_or_path).rpartition("/")[2].removesuffix("-Base")
    return QWEN3_USED_ROWS + _added(model) if name in QWEN3_SHAPES else None


def _added(model: ModelConfig) -> int:
    """Tokens that a tokenizer gets beside its own: sentinels, mode tokens."""
    return model.num_sentinel_tokens + len(MODE_TOKENS) * model.use_mode_tokens


def _read_shape(path: Path, model: ModelConfig) -> Shape | None:
    """What a saved Qwen3's config.json says; None if it is not one's."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shape = ArchitectureConfig(**{key: values[key] for key in ArchitectureConfig.model_fields})
        own, rows = values.get("model_type") == "qwen3_encdec", int(values["vocab_size"])
        rows = rows if own else _grown(rows, _added(model))  # ours has its sentinels already
        if values.get("num_encoder_layers") not in (None, shape.num_hidden_layers):
            return None  # stacks that differ
        if values.get("num_experts") is not None:
            width = values.get("moe_intermediate_size") or shape.intermediate_size
            shape = shape.model_copy(update={"intermediate_size": int(width)})
            return Shape(shape, rows, int(values["num_experts"]), int(values["num_experts_per_tok"]))
        return Shape(shape, rows, model.n_experts, model.top_k)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _grown(rows: int, added: int) -> int:
    """Rows with room for added tokens: Qwen3's own embedding has some that its tokenizer leaves unused."""
    needed = (QWEN3_USED_ROWS if rows == QWEN3_ROWS else rows) + added
    return rows if needed <= rows else -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
