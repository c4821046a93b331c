"""First weights of a Qwen3 encoder-decoder: from a pretrained decoder-only Qwen3, or at random from a seed.

Shape legend:
    V_s  rows of the source's embedding    V  rows of ours, >= V_s    H  hidden size
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForSeq2SeqLM, Qwen3Config
from transformers.initialization import no_init_weights

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError, MissingPrerequisite
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer

EMBEDDING = "shared.weight"
FILES, CONFIG_ALONE = ["*.safetensors", "*.json"], ["config.json"]
UNUSED_ROWS_SEED = 20  # any constant: sentinels start alike in every run

# Every key of a Qwen3 checkpoint and the parameters it fills. No target: left out on purpose.
KEY_MAP: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"model\.embed_tokens\.weight"), (EMBEDDING,)),
    (re.compile(r"model\.(layers\.\d+\..+(?<!inv_freq))"), (r"encoder.\1", r"decoder.\1")),
    (re.compile(r"model\.(norm\.weight)"), (r"encoder.\1", r"decoder.\1")),
    (re.compile(r"lm_head\.weight"), ()),  # our head is the embedding
    (re.compile(r"model\..*rotary_emb\.inv_freq"), ()),  # computed from the config
)


def build_from_scratch(config: Qwen3EncoderDecoderConfig, seed: int) -> Qwen3ForSeq2SeqLM:
    """A model with random weights, float32 on the CPU, that depends on `config` and `seed` alone.

    Every rank that calls this gets the same weights, whatever the world size. torch's global generator is untouched.
    """
    model = allocate(config, torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # not torch.manual_seed, which would reseed the GPUs too
        model.initialize_weights()
    return model


def build_from_pretrained(
    model_name_or_path: str | Path,
    num_sentinel_tokens: int,
    *,
    tokenizer: Qwen3EncoderDecoderTokenizer,
    fill: bool = True,
) -> Qwen3ForSeq2SeqLM:
    """The model of a directory or hub id, float32 on the CPU: an encoder-decoder of ours as it is, or one that starts
    from a decoder-only Qwen3 (`initialize_from_qwen3`).

    Args:
        fill: False leaves the parameters without values.

    Raises:
        MissingPrerequisite: no such directory, no such model on the hub or no way there, or files are missing.
        ConfigError: it is neither.
    """
    directory = checkpoint_directory(str(model_name_or_path), FILES if fill else CONFIG_ALONE)
    if model_type_of(directory) != Qwen3EncoderDecoderConfig.model_type:
        return initialize_from_qwen3(directory, num_sentinel_tokens, tokenizer=tokenizer, fill=fill)
    if not fill:
        return allocate(Qwen3EncoderDecoderConfig.from_pretrained(directory), torch.float32)
    try:
        return Qwen3ForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32)
    except (OSError, SafetensorError) as error:
        raise MissingPrerequisite(
            "a model's directory must have its weights",
            found=f"none that can be read in {directory}: {type(error).__name__}",
            remedy="Export them with python -m encdec.checkpoints export RUN DIR, or download the model again",
        ) from error


def initialize_from_qwen3(
    model_name_or_path: str | Path,
    num_sentinel_tokens: int = 100,
    *,
    tokenizer: Qwen3EncoderDecoderTokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    fill: bool = True,
) -> Qwen3ForSeq2SeqLM:
    """Build the encoder-decoder of a pretrained decoder-only Qwen3; encoder and decoder both start from its layers.

    Embedding rows from the first sentinel on, which no text of the source ever reached, are drawn from the mean and the
    standard deviation (per dimension) of the rows before it, with a fixed seed.

    Args:
        model_name_or_path: directory with `config.json` and safetensors files, or hub id ("Qwen/Qwen3-0.6B").
        num_sentinel_tokens: sentinels to make room for.
        tokenizer: settles the token ids where given, and is checked against the result. Needed where the tokenizer
            leaves rows of the embedding unused and the vocabulary is not Qwen3's own.
        dtype: of the result, on the CPU.
        fill: False leaves the parameters without values, for weights that come from elsewhere; only the source's
            config.json is read.

    Returns:
        The model. Its tokenizer is `Qwen3EncoderDecoderTokenizer.from_pretrained(<same>, num_sentinel_tokens=<same>)`.

    Raises:
        MissingPrerequisite: no such directory, no such model on the hub or no way there, or files are missing.
        ConfigError: the source is no Qwen3, or its keys or shapes are not what its config says.
    """
    directory = checkpoint_directory(str(model_name_or_path), FILES if fill else CONFIG_ALONE)
    config = Qwen3EncoderDecoderConfig.from_qwen3_config(
        _read_qwen3_config(directory), num_sentinel_tokens, **_token_ids(tokenizer)
    )
    if tokenizer is not None:
        tokenizer.assert_matches(config)
    model = allocate(config, dtype)
    if not fill:
        return model
    _fill_parameters(model, directory)
    _fill_unused_rows(model.shared.weight, config.sentinel_start_id)
    return model


def allocate(config: Qwen3EncoderDecoderConfig, dtype: torch.dtype) -> Qwen3ForSeq2SeqLM:
    """A model whose parameters hold no values yet; its buffers do."""
    with no_init_weights():
        return AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)


def _token_ids(tokenizer: Qwen3EncoderDecoderTokenizer | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")}
    return ids | {"sentinel_start_id": min(tokenizer.sentinel_ids, default=len(tokenizer))}


def checkpoint_directory(model_name_or_path: str, files: list[str]) -> Path:
    """The directory itself, or the hub's snapshot of a model in the local cache."""
    if Path(model_name_or_path).is_dir():
        return Path(model_name_or_path)
    try:
        return Path(snapshot_download(model_name_or_path, allow_patterns=files))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise MissingPrerequisite(
            "model_name_or_path must be a directory, or a model that the hub or its local cache has",
            found=f"{model_name_or_path} ({type(error).__name__})",
            remedy="Correct the name; without a network, download the model elsewhere and give its directory",
        ) from error


def model_type_of(directory: Path) -> str | None:
    """What a directory's config.json says it is.

    Raises:
        MissingPrerequisite: there is none.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise MissingPrerequisite(
            "a checkpoint must have a config.json", found=f"none in {directory}", remedy="Give a checkpoint's directory"
        )
    return json.loads(path.read_text(encoding="utf-8")).get("model_type")


def _read_qwen3_config(directory: Path) -> Qwen3Config:
    path, model_type = directory / "config.json", model_type_of(directory)
    if model_type != Qwen3Config.model_type:
        raise ConfigError(
            f"the source's model_type must be {Qwen3Config.model_type}",
            found=f"{model_type} in {path}",
            remedy="Give a dense Qwen3 checkpoint, or load an encoder-decoder with Qwen3ForSeq2SeqLM.from_pretrained",
        )
    return Qwen3Config.from_pretrained(directory)


def _read_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a checkpoint, one at a time; an index, where there is one, says which files count."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = [
            directory / name
            for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise MissingPrerequisite(
            "a checkpoint must have all of its safetensors files",
            found=f"{', '.join(missing) or 'none'} {'missing ' if missing else ''}in {directory}",
            remedy="Download the checkpoint again",
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict, and it does not iterate
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise MissingPrerequisite(
                "a checkpoint's safetensors files must be ones that can be read",
                found=f"{file}: {error}",
                remedy="Download the checkpoint again",
            ) from error


def target_names(source_name: str) -> tuple[str, ...]:
    """The parameters a Qwen3 checkpoint's key fills; none for those left out on purpose.

    Raises:
        ConfigError: `KEY_MAP` does not know the key.
    """
    for pattern, templates in KEY_MAP:
        if match := pattern.fullmatch(source_name):
            return tuple(match.expand(template) for template in templates)
    raise ConfigError(
        "every tensor of the source must have a place in the encoder-decoder",
        found=source_name,
        remedy="Give a dense Qwen3 checkpoint without adapters or quantisation",
    )


@torch.no_grad()
def _fill_parameters(model: Qwen3ForSeq2SeqLM, directory: Path) -> None:
    parameters = dict(model.named_parameters())
    unfilled = set(parameters)
    for source_name, tensor in _read_tensors(directory):
        for name in target_names(source_name):
            if name not in parameters or not _fits(name, tensor, parameters[name]):
                raise ConfigError(
                    "the source's tensors must have the shapes its config gives",
                    found=f"{source_name} {tuple(tensor.shape)} for {name} {_shape(parameters, name)}",
                    remedy="Check that config.json belongs to these weights",
                )
            parameters[name][: len(tensor)].copy_(tensor)
            unfilled.discard(name)
    if unfilled:
        raise ConfigError(
            "the source must fill every parameter",
            found=f"nothing for {', '.join(sorted(unfilled)[:3])} and {max(0, len(unfilled) - 3)} more",
            remedy="Download the checkpoint again",
        )


def _fits(name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    if name == EMBEDDING:  # ours may have grown
        return tensor.shape[1:] == parameter.shape[1:] and len(tensor) <= len(parameter)
    return tensor.shape == parameter.shape


def _shape(parameters: dict[str, torch.nn.Parameter], name: str) -> str:
    return str(tuple(parameters[name].shape)) if name in parameters else "(no such parameter)"


@torch.no_grad()
def _fill_unused_rows(embedding: torch.Tensor, num_used: int) -> None:
    """Draw the rows from `num_used` on, in place. embedding: [V, H]."""
    used = embedding[:num_used].float()
    generator = torch.Generator().manual_seed(UNUSED_ROWS_SEED)
    noise = torch.randn(len(embedding) - num_used, embedding.shape[1], generator=generator)
    embedding[num_used:] = (used.mean(0) + used.std(0) * noise).to(embedding.dtype)
