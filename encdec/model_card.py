"""The README.md of a model's folder: Hugging Face's model card, with its front matter in YAML.

It says what is known and no more: a licence, a base model or a data set that nobody named is left out, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

MODEL_CARD = "README.md"
TAGS = ["qwen3", "encoder-decoder", "merged-attention", "ul2", "text2text-generation"]
LICENCES: Mapping[str, str] = {"Qwen/Qwen3-": "apache-2.0"}
"""Beginning of a base model's name on the hub -> the licence that its weights, and what is made of them, come under."""


def model_card(
    config: Any,
    num_parameters: int,
    *,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    training: Mapping[str, str] | None = None,
) -> str:
    """The card of a model, as text.

    Args:
        config: a `Qwen3EncoderDecoderConfig`.
        num_parameters: of the model, the one embedding counted once.
        base_model: hub id of the model that its weights began with.
        datasets: hub ids of what it was trained on.
        training: what else is known of its training, name -> value, in the order to be shown.
    """
    licence = next((name for start, name in LICENCES.items() if (base_model or "").startswith(start)), None)
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text2text-generation",
        base_model=base_model,
        datasets=datasets or None,
        tags=TAGS,
    )
    sections = (_description(config, num_parameters, base_model), USE, _training(training), LIMITS)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def write_model_card(folder: Path, text: str) -> None:
    """Write the card, unless someone has written one already."""
    if not (folder / MODEL_CARD).exists():
        (folder / MODEL_CARD).write_text(text, encoding="utf-8")


def _description(config: Any, num_parameters: int, base_model: str | None) -> str:
    begun = f" Its weights began as those of [{base_model}](https://huggingface.co/{base_model})." if base_model else ""
    rows = {
        "Parameters": f"{num_parameters:,}, the embedding counted once",
        "Layers": f"{config.num_encoder_layers} in the encoder, {config.num_hidden_layers} in the decoder",
        "Hidden size, feed-forward": f"{config.hidden_size:,}, {config.intermediate_size:,}",
        "Heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key and value, "
        f"of size {config.head_dim}",
        "Vocabulary": f"{config.vocab_size:,} rows, of them {config.num_sentinel_tokens} sentinels "
        "(`<extra_id_0>`, ...)",
        "Longest sequence": f"{config.max_position_embeddings:,} tokens on each side",
    }
    return (
        "# Qwen3 encoder-decoder\n\n"
        "A bidirectional encoder and a causal decoder on Qwen3's blocks. The decoder attends to its own tokens and to "
        "the encoder's in one softmax (merged attention, T5Gemma 2's construction); encoder, decoder and head share "
        f"one matrix.{begun}\n\n" + _table(rows)
    )


USE = """## Use

The folder has the model's code, which transformers runs with `trust_remote_code=True`; where the package `encdec` is
installed and imported, it is not needed.

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

name = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(name, trust_remote_code=True)
texts = ["def greet(name):\\n    <extra_id_0>\\n" + tokenizer.eos_token]
batch = tokenizer(texts, return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=32)))
```

Once trained by denoising (UL2), it fills in the spans that sentinels stand for: each sentinel of the input, in the
output, is followed by the text of its span."""


def _training(facts: Mapping[str, str] | None) -> str:
    return "## Training\n\n" + (_table(facts) if facts else "Nothing is recorded here about how it was trained.")


LIMITS = """## Limits

A model trained by denoising alone follows no instructions and has had no training for safety. What it writes can be
wrong, and repeats the biases of its text."""


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
