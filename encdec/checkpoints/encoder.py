"""The encoder of a checkpoint alone, as a folder that sentence-transformers loads: text -> one vector.

    OUT/modules.json  sentence_bert_config.json  config_sentence_transformers.json  1_Pooling/config.json
    OUT/config.json  tokenizer...  README.md
    OUT/model.safetensors, or model-00001-of-0000N.safetensors and their index

The encoder has the parameters of a Qwen3 without a head. So it is saved as transformers' own `Qwen3Model` with
`is_causal: false`, which computes the same: no code of ours and no `trust_remote_code` is needed to load it.

Memory: one safetensors shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from encdec.checkpoints.export import (
    DEFAULT_SHARD_MB,
    DTYPES,
    open_as_umask_says,
    open_model,
    require_absent,
    write_shards,
)
from encdec.checkpoints.manifest import Manifest
from encdec.checkpoints.weights import Piece, Weights
from encdec.errors import CheckpointError
from encdec.files import atomic_write_json, atomic_write_text, staged_directory

Pooling = Literal["mean", "cls", "last"]
POOLINGS: Mapping[Pooling, tuple[str, str]] = {
    "mean": ("pooling_mode_mean_tokens", "the mean over all tokens"),
    "cls": ("pooling_mode_cls_token", "the first token's vector"),
    "last": ("pooling_mode_lasttoken", "the vector of the last token, the end of the sequence"),
}
"""How token vectors become one vector: sentence-transformers' key, and the same in words."""
ALL_KEYS = (
    "pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken",
)  # fmt: skip
CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---

# Text encoder

The bidirectional encoder of a Qwen3 encoder-decoder, {parameters:,} parameters. A text's vector, {width} numbers, is
{pooling}; the tokenizer ends each text as the model's training did.

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("DIRECTORY").encode(["one text", "another one"])
```

It is transformers' own `Qwen3Model` with `is_causal: false` in its configuration, which transformers {version}
honours. One that does not know this field loads it without a word and computes other vectors: use this version or a
newer one.
"""


class EncoderWeights:
    """The encoder's share of a model's weights, under `Qwen3Model`'s names; a Weights."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        names = {"embed_tokens.weight": "shared.weight"}
        names |= {name.removeprefix("encoder."): name for name in weights.tensors if name.startswith("encoder.")}
        self._names = names
        self.tensors: Mapping[str, Tensor] = {name: weights.tensors[there] for name, there in names.items()}

    def pieces(self, name: str) -> Sequence[Piece]:
        return self._weights.pieces(self._names[name])

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        return self._weights.read(self._names[name], piece)


def export_encoder(
    checkpoint: Path,
    manifest: Manifest,
    out: Path,
    *,
    pooling: Pooling = "mean",
    dtype: Literal["fp32", "bf16"] = "fp32",
    shard_mb: int = DEFAULT_SHARD_MB,
    files_from: Path | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Path]:
    """Write ``out``, which is there whole or not at all; returns its weight files. As ``export.export``.

    Args:
        pooling: how token vectors become one.

    Raises:
        ConfigError: ``out`` exists.
        CheckpointError: there are no model files, they are of another model, or the encoder is no plain Qwen3.
        OSError: it cannot be written.
    """
    from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig  # slow to import

    require_absent(out)
    files, whole_model = open_model(checkpoint, manifest, files_from)
    weights, ours = EncoderWeights(whole_model), Qwen3EncoderDecoderConfig.from_pretrained(files)
    config = encoder_config(ours, DTYPES[dtype])
    _require_qwen3(weights.tensors, config)
    try:
        with staged_directory(out) as staging:
            config.save_pretrained(staging)
            _save_tokenizer(files, staging, ours.max_position_embeddings)
            written = write_shards(staging, weights, DTYPES[dtype], shard_mb * 10**6, progress)
            _describe(staging, config, pooling, sum(tensor.numel() for tensor in weights.tensors.values()))
            for folder in (staging, staging / "1_Pooling"):
                open_as_umask_says(folder)
    except FileExistsError:
        require_absent(out)
        raise
    return [out / path.name for path in written]


def encoder_config(ours: Any, dtype: torch.dtype) -> Any:
    """The configuration of a ``Qwen3Model`` that computes what the encoder of a ``Qwen3EncoderDecoderConfig`` does."""
    from transformers import Qwen3Config

    shared = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
        "attention_bias", "attention_dropout", "pad_token_id", "eos_token_id",
    )  # fmt: skip
    return Qwen3Config(
        **{name: getattr(ours, name) for name in shared},
        num_hidden_layers=ours.num_encoder_layers,
        tie_word_embeddings=False,
        use_cache=False,
        is_causal=False,
        architectures=["Qwen3Model"],
        dtype=dtype,
    )


def _require_qwen3(tensors: Mapping[str, Tensor], config: Any) -> None:
    from transformers import Qwen3Model

    with torch.device("meta"):
        described = {name: tensor.shape for name, tensor in Qwen3Model(config).state_dict().items()}
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    if described != stored:
        differing = sorted(name for name in {**described, **stored} if described.get(name) != stored.get(name))
        raise CheckpointError(
            "An encoder that is exported alone must be a plain Qwen3, whose code everybody has",
            found=f"{len(differing)} tensors that differ, {differing[0]} among them",
            remedy="Leave --encoder out: the whole model can be exported",
        )


def _save_tokenizer(files: Path, folder: Path, longest: int) -> None:
    """A tokenizer that puts the end behind each text, as encoder inputs have it in training."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer

    ours = Qwen3EncoderDecoderTokenizer.from_pretrained(files)
    backend, end = ours.backend_tokenizer, ours.eos_token
    ended = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, ours.eos_token_id)]
    )
    before = [backend.post_processor] if backend.post_processor else []
    backend.post_processor = processors.Sequence([*before, ended])
    # a class that takes tokenizer.json as it is: Qwen's own would make its post-processor anew
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token=ours.pad_token,
        model_max_length=longest,
        padding_side="right",
    ).save_pretrained(folder)


def _describe(folder: Path, config: Any, pooling: Pooling, parameters: int) -> None:
    """What sentence-transformers reads beside transformers' own files, in the form that its older versions know too."""
    import transformers

    key, words = POOLINGS[pooling]
    (folder / "1_Pooling").mkdir()
    modes = {name: name == key for name in ALL_KEYS}
    pooled = {"word_embedding_dimension": config.hidden_size, **modes, "include_prompt": True}
    atomic_write_json(folder / "1_Pooling" / "config.json", pooled)
    names = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (path, name) in enumerate(names)
    ]
    atomic_write_json(folder / "modules.json", modules)
    lengths = {"max_seq_length": config.max_position_embeddings, "do_lower_case": False}
    atomic_write_json(folder / "sentence_bert_config.json", lengths)
    versions = {"transformers": transformers.__version__, "pytorch": torch.__version__}
    about = {"__version__": versions, "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    atomic_write_json(folder / "config_sentence_transformers.json", about)
    card = CARD.format(parameters=parameters, width=config.hidden_size, pooling=words, version=transformers.__version__)
    atomic_write_text(folder / "README.md", card)
