"""First weights of a Qwen3 encoder-decoder: from a pretrained decoder-only Qwen3, from a saved model, or from a seed.

python -m encdec.weight_initialization --from Qwen/Qwen3-0.6B --to DIR      writes the model that starts from Qwen3

Two ways to have them. `build_*` and `initialize_from_qwen3` make a whole model on the host. `plan_*` make a model whose
parameters have no memory yet, and the stream of their values: shard it, give it memory, fill it, and no rank ever holds
more than its shards and one parameter. Both give the same values.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.initialization import no_init_weights

from encdec.checkpoints.commands.shared import progress_bar, writing
from encdec.checkpoints.export import DTYPES
from encdec.command_line import Help, Parser, exit_code_of
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError, MissingPrerequisite
from encdec.initialization.folder import require_place, require_room_for, write_model
from encdec.initialization.qwen3 import Qwen3Weights, require_tokenizers_rows, target_names
from encdec.initialization.saved import SavedWeights
from encdec.initialization.source import CONFIG_ALONE, FILES, SourceFiles, checkpoint_directory, model_type_of
from encdec.initialization.streams import InitialWeights, SeededWeights, StoredStream, fill, give_memory
from encdec.model_card import model_card, write_model_card
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer

__all__ = [
    "UnfilledModel", "allocate", "build_from_pretrained", "build_from_scratch", "initialize_from_qwen3",
    "plan_from_pretrained", "plan_from_scratch", "target_names",
]  # fmt: skip


class UnfilledModel(NamedTuple):
    """A model whose parameters are on the meta device, and what they are to start from."""

    model: Qwen3ForSeq2SeqLM
    """Its buffers hold their values."""
    weights: InitialWeights

    def filled(self) -> Qwen3ForSeq2SeqLM:
        """The model itself, whole, on the CPU."""
        give_memory(self.model, torch.device("cpu"))
        fill(self.model, self.weights.stream())
        return self.model


def plan_from_scratch(config: Qwen3EncoderDecoderConfig, seed: int) -> UnfilledModel:
    """Random weights, float32, that depend on `config` and `seed` alone: the same on every rank of any world size."""
    model, twin = (allocate(config, torch.float32, meta=True) for _ in range(2))
    return UnfilledModel(model, SeededWeights(twin, seed))


def plan_from_pretrained(
    model_name_or_path: str | Path,
    num_sentinel_tokens: int,
    *,
    tokenizer: Qwen3EncoderDecoderTokenizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> UnfilledModel:
    """The model of a directory or hub id: an encoder-decoder of ours as it is, or one that starts from a decoder-only
    Qwen3 (`initialize_from_qwen3`). Names and shapes are compared here; values are read where the stream is.

    Args:
        dtype: of the parameters.

    Raises:
        MissingPrerequisite: no such directory, no such model on the hub or no way there, or files are missing or
            damaged.
        ConfigError: it is neither, or its tensors are not what its config says.
    """
    directory = checkpoint_directory(str(model_name_or_path), FILES)
    model = describe_pretrained(directory, num_sentinel_tokens, tokenizer=tokenizer, dtype=dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    source = SourceFiles(directory)
    if model_type_of(directory) == Qwen3EncoderDecoderConfig.model_type:
        return UnfilledModel(model, StoredStream(SavedWeights(source, shapes)))
    return UnfilledModel(model, StoredStream(Qwen3Weights(source, model.config, shapes)))


def describe_pretrained(
    model_name_or_path: str | Path,
    num_sentinel_tokens: int,
    *,
    tokenizer: Qwen3EncoderDecoderTokenizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> Qwen3ForSeq2SeqLM:
    """As `plan_from_pretrained`, but the model alone: only config.json is read."""
    directory = checkpoint_directory(str(model_name_or_path), CONFIG_ALONE)
    if model_type_of(directory) == Qwen3EncoderDecoderConfig.model_type:
        return allocate(Qwen3EncoderDecoderConfig.from_pretrained(directory), dtype, meta=True)
    qwen3 = _read_qwen3_config(directory)
    if tokenizer is not None:
        require_tokenizers_rows(qwen3.vocab_size, min(tokenizer.sentinel_ids, default=len(tokenizer)))
    config = Qwen3EncoderDecoderConfig.from_qwen3_config(qwen3, num_sentinel_tokens, **_token_ids(tokenizer))
    if tokenizer is not None:
        tokenizer.assert_matches(config)
    return allocate(config, dtype, meta=True)


def build_from_scratch(config: Qwen3EncoderDecoderConfig, seed: int) -> Qwen3ForSeq2SeqLM:
    """A model with random weights, float32 on the CPU, that depends on `config` and `seed` alone.

    Every rank that calls this gets the same weights, whatever the world size. torch's global generator is untouched.
    """
    return plan_from_scratch(config, seed).filled()


def build_from_pretrained(
    model_name_or_path: str | Path,
    num_sentinel_tokens: int,
    *,
    tokenizer: Qwen3EncoderDecoderTokenizer | None,
    fill: bool = True,
) -> Qwen3ForSeq2SeqLM:
    """The model of a directory or hub id, float32, whole on the CPU (`plan_from_pretrained`).

    Args:
        fill: False leaves the parameters without values; only config.json is read.
    """
    if fill:
        return plan_from_pretrained(model_name_or_path, num_sentinel_tokens, tokenizer=tokenizer).filled()
    model = describe_pretrained(model_name_or_path, num_sentinel_tokens, tokenizer=tokenizer)
    give_memory(model, torch.device("cpu"))
    return model


def initialize_from_qwen3(
    model_name_or_path: str | Path,
    num_sentinel_tokens: int = 100,
    *,
    tokenizer: Qwen3EncoderDecoderTokenizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> Qwen3ForSeq2SeqLM:
    """Build the encoder-decoder of a pretrained decoder-only Qwen3; encoder and decoder both start from its layers.

    Embedding rows from the first sentinel on, which no text of the source ever reached, are drawn from the mean and the
    standard deviation (per dimension) of the rows before it, with a fixed seed. A head of the source's own is left out.

    Args:
        model_name_or_path: directory with `config.json` and safetensors files, or hub id ("Qwen/Qwen3-0.6B").
        num_sentinel_tokens: sentinels to make room for.
        tokenizer: settles the token ids where given, and is checked against the result. Needed where the tokenizer
            leaves rows of the embedding unused and the vocabulary is not Qwen3's own.
        dtype: of the result, on the CPU.

    Returns:
        The model. Its tokenizer is `Qwen3EncoderDecoderTokenizer.from_pretrained(<same>, num_sentinel_tokens=<same>)`.

    Raises:
        MissingPrerequisite: no such directory, no such model on the hub or no way there, or files are missing.
        ConfigError: the source is no Qwen3, or its keys or shapes are not what its config says.
    """
    directory = checkpoint_directory(str(model_name_or_path), FILES)
    _read_qwen3_config(directory)
    return plan_from_pretrained(directory, num_sentinel_tokens, tokenizer=tokenizer, dtype=dtype).filled()


def allocate(config: Qwen3EncoderDecoderConfig, dtype: torch.dtype, *, meta: bool = False) -> Qwen3ForSeq2SeqLM:
    """A model whose parameters hold no values yet; its buffers do.

    Args:
        meta: the parameters have no memory either.
    """
    config = copy.deepcopy(config)
    config.dtype = dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # not from_config: once a ZeRO-3 engine runs in this process, that hands every new model to DeepSpeed
        with no_init_weights(), _parameters_on_meta() if meta else contextlib.nullcontext():
            return Qwen3ForSeq2SeqLM(config)
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, parameters of new modules are put on the meta device; buffers (rotary frequencies) are not, for nobody
    would compute them again."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _token_ids(tokenizer: Qwen3EncoderDecoderTokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")}
    return ids | {
        "sentinel_start_id": min(tokenizer.sentinel_ids, default=len(tokenizer)),
        "mode_token_ids": tokenizer.mode_token_ids or None,
    }


def _read_qwen3_config(directory: Path) -> Qwen3Config:
    path, model_type = directory / "config.json", model_type_of(directory)
    if model_type != Qwen3Config.model_type:
        raise ConfigError(
            f"the source's model_type must be {Qwen3Config.model_type}",
            found=f"{model_type} in {path}",
            remedy="Give a dense Qwen3 checkpoint, or load an encoder-decoder with Qwen3ForSeq2SeqLM.from_pretrained",
        )
    return Qwen3Config.from_pretrained(directory)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when the model is written; 78 where nothing was, with the reason; 130 after Ctrl-C."""
    return exit_code_of(lambda: _write_and_show(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m encdec.weight_initialization",
        description="Write the encoder-decoder that starts from a pretrained decoder-only Qwen3, with its tokenizer "
        "and a report on every tensor (initialization.json). Memory: one file of the result and one tensor of the "
        "source.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--from", dest="source", required=True, metavar="DIR_OR_ID", help="Qwen3 checkpoint: directory or hub id"
    )
    parser.add_argument("--to", dest="out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--tokenizer", metavar="DIR_OR_ID", help="tokenizer of the source, where it is not beside it")
    parser.add_argument("--num-sentinel-tokens", type=int, default=100, help="sentinels for span corruption")
    parser.add_argument("--mode-tokens", action="store_true", help="add UL2's [R], [S] and [X]")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument(
        "--max-shard-size", type=_size, default="1GB", metavar="SIZE",
        help="most of one safetensors file, also what is held in memory: bytes, or with KB, MB, GB (powers of 1000)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="replace an encoder-decoder that is at --to, once the new one is whole"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    return parser.parse_args(argv)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()] if match else 0
    if not size:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 1GB, not {text!r}")
    return size


def _write_and_show(arguments: argparse.Namespace) -> int:
    """Everything that can be wrong is looked at before anything is written."""
    dtype, out = DTYPES[arguments.dtype], arguments.out
    named = filter(None, (arguments.source, arguments.tokenizer))
    require_place(out, replace=arguments.force, inputs=map(Path, named))
    if arguments.num_sentinel_tokens < 1:
        raise ConfigError(
            "--num-sentinel-tokens must be 1 or more", found=arguments.num_sentinel_tokens, remedy="100 is the default"
        )
    directory = checkpoint_directory(arguments.source, FILES)
    qwen3 = _read_qwen3_config(directory)
    tokenizer = _tokenizer_of(arguments, directory)
    model = describe_pretrained(directory, arguments.num_sentinel_tokens, tokenizer=tokenizer, dtype=dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights = Qwen3Weights(SourceFiles(directory), model.config, shapes)
    require_room_for(out, weights, dtype)

    def save_beside(folder: Path) -> None:
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        base_model = None if Path(arguments.source).is_dir() else arguments.source
        write_model_card(folder, model_card(config, parameters, base_model=base_model))

    parameters = sum(shape.numel() for shape in shapes.values())
    total = parameters * dtype.itemsize
    with progress_bar("writing", total) as progress, writing(out):
        report = write_model(
            out, weights, model.config, save_beside, source=arguments.source, source_tied=qwen3.tie_word_embeddings,
            dtype=dtype, shard_bytes=arguments.max_shard_size, replace=arguments.force, progress=progress,
        )  # fmt: skip
    print(json.dumps({"directory": str(out), **report.to_json()}) if arguments.json else "\n".join(report.lines()))
    return 0


def _tokenizer_of(arguments: argparse.Namespace, directory: Path) -> Qwen3EncoderDecoderTokenizer:
    """The source's tokenizer, with the tokens that ours has besides.

    Raises:
        MissingPrerequisite: it is neither beside the source nor where --tokenizer says.
    """
    try:
        return Qwen3EncoderDecoderTokenizer.from_pretrained(
            arguments.tokenizer or str(directory),
            num_sentinel_tokens=arguments.num_sentinel_tokens, mode_tokens=arguments.mode_tokens,
        )  # fmt: skip
    except MissingPrerequisite:
        if arguments.tokenizer:
            raise
        raise MissingPrerequisite(
            "the source must have its tokenizer beside it, or --tokenizer must name one",
            found=f"none in {directory}",
            remedy="Give its directory or hub id with --tokenizer",
        ) from None


if __name__ == "__main__":
    sys.exit(main())
