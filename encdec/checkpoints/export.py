"""A checkpoint as a Hugging Face directory: what ``from_pretrained`` loads, written shard by shard.

    OUT/config.json  generation_config.json  tokenizer...  *.py    copies of the run's own; the model's code
    OUT/README.md                                                  the model card: what it is, how it was trained
    OUT/model.safetensors, or model-00001-of-0000N.safetensors and their index

Memory: one safetensors shard. The model's one embedding is stored once, under the name of its one parameter.

Of a model with low-rank adapters: by default with the adapters merged in; or its base alone, likewise; or the adapter
alone, as peft has it: ``adapter_config.json`` and ``adapter_model.safetensors``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from encdec.checkpoints.lora_weights import LoraWeights, Part, read_adapter_config
from encdec.checkpoints.manifest import Manifest
from encdec.checkpoints.model_files import ADAPTER_CONFIG, CONFIG, find_model_files
from encdec.checkpoints.payload import open_weights
from encdec.checkpoints.training_facts import TrainingFacts, checkpoint_rows
from encdec.checkpoints.weights import Weights, shape_in
from encdec.errors import CheckpointError, ConfigError
from encdec.files import atomic_write_json, staged_directory
from encdec.hub_code import AUTO_MAP, MODULES, write_code
from encdec.model_card import MODEL_CARD, model_card

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth)$|\.index\.json$")
"""Not copied from a folder of model files: those would be another checkpoint's."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
DEFAULT_SHARD_MB = 1000
Progress = Callable[[int], None]


def export(
    checkpoint: Path,
    manifest: Manifest,
    out: Path,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    shard_mb: int = DEFAULT_SHARD_MB,
    files_from: Path | None = None,
    part: Part = "merged",
    progress: Progress = lambda count: None,
) -> list[Path]:
    """Write ``out``, which is there whole or not at all; returns its weight files.

    Args:
        checkpoint: a verified checkpoint.
        manifest: its manifest.
        dtype: of the weights; checkpoints hold the fp32 master weights.
        shard_mb: most of one safetensors file, 10^6 bytes; also what is held in memory.
        files_from: folder with config.json and the tokenizer; default: the run's own.
        part: of a model with low-rank adapters.
        progress: told the bytes of each tensor written.

    Raises:
        ConfigError: ``out`` exists, ``files_from`` is of another model, or a part is asked for that there is not.
        CheckpointError: there are no model files, or they are of another model.
        OSError: it cannot be written.
    """
    require_absent(out)
    files, weights = open_model(checkpoint, manifest, files_from, part)
    try:
        with staged_directory(out) as staging:
            if part == "adapter":
                written = _write_adapter(staging, weights, DTYPES[dtype], files, progress)
            else:
                _copy_model_files(files, staging)
                config = _complete_config(staging / CONFIG, DTYPES[dtype])
                if not (staging / f"{MODULES[0]}.py").exists():  # of a run that is older than this
                    write_code(staging)
                _write_card(staging, config, weights, manifest)
                written = write_shards(staging, weights, DTYPES[dtype], shard_mb * 10**6, progress)
            open_as_umask_says(staging)
    except FileExistsError:
        require_absent(out)
        raise
    return [out / path.name for path in written]


def open_model(
    checkpoint: Path, manifest: Manifest, files_from: Path | None = None, part: Part = "merged"
) -> tuple[Path, Weights]:
    """The folder of a checkpoint's model files, and its weights or a part of them, which fit each other.

    Raises:
        ConfigError: a part is asked for that there is not.
        CheckpointError: there are no model files, or they are of another model.
    """
    files = files_from or find_model_files(checkpoint)
    if files is None or not (files / CONFIG).is_file():
        raise CheckpointError(
            "An export needs the model's config.json and tokenizer, which a run keeps in RUN/model",
            found=f"no {CONFIG} in {files}" if files else f"none for {checkpoint}",
            remedy="Give a folder that has them with --files-from DIR",
        )
    _require_same_model(part_of(checkpoint, manifest, files, "merged").tensors, files)
    return files, part_of(checkpoint, manifest, files, part)


def part_of(checkpoint: Path, manifest: Manifest, files: Path | None, part: Part) -> Weights:
    """The weights of a verified checkpoint, or of that part of them where the model has adapters.

    Raises:
        ConfigError: a part of a model without adapters.
    """
    weights = open_weights(checkpoint, manifest)
    if files is not None and (files / ADAPTER_CONFIG).is_file():
        return LoraWeights(weights, read_adapter_config(files / ADAPTER_CONFIG), part)
    if part != "merged":
        raise ConfigError(
            f"--part {part} needs a run with low-rank adapters (model.lora)",
            found=f"no {ADAPTER_CONFIG} in {files}",
            remedy="Leave --part out: the whole model is exported",
        )
    return weights


def require_absent(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ConfigError: something is at ``out``.
    """
    if out.is_symlink() or out.exists():
        raise ConfigError("The directory to export to must not exist yet", found=out, remedy="Give another one")


def _require_same_model(tensors: Mapping[str, Tensor], files: Path) -> None:
    """Compare names and shapes with those of the model that config.json describes, built without memory."""
    from encdec.modeling_qwen3_encdec import Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM  # slow to import

    try:
        config = Qwen3EncoderDecoderConfig.from_pretrained(files)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{files / CONFIG} must be a configuration that transformers reads",
            found=" ".join(str(error).split()),
            remedy="Give a folder that has one with --files-from DIR",
        ) from None
    with torch.device("meta"):
        model = Qwen3ForSeq2SeqLM(config)
    described = {name: tensor.shape for name, tensor in model.state_dict().items()}
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    if described != stored:
        differing = sorted(name for name in {**described, **stored} if described.get(name) != stored.get(name))
        first = differing[0]
        raise CheckpointError(
            f"{files / CONFIG} must describe the model of the checkpoint",
            found=f"{len(differing)} tensors that differ: {first} has shape {shape_in(described, first)} there, "
            f"{shape_in(stored, first)} in the checkpoint",
            remedy="Give the folder that belongs to it with --files-from DIR",
        )


def _copy_model_files(files: Path, folder: Path) -> None:
    """Configuration and tokenizer; an adapter's configuration would have transformers look for its weights."""
    for path in files.iterdir():
        if path.is_file() and not WEIGHTS.search(path.name) and path.name != ADAPTER_CONFIG:
            shutil.copyfile(path, folder / path.name)


def _complete_config(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"dtype": str(dtype).removeprefix("torch."), "auto_map": AUTO_MAP}
    atomic_write_json(path, values)
    return values


def _write_card(folder: Path, config: Mapping[str, Any], weights: Weights, manifest: Manifest) -> None:
    facts = TrainingFacts.read(folder, manifest)
    card = model_card(
        SimpleNamespace(**config),
        sum(tensor.numel() for tensor in weights.tensors.values()),
        base_model=facts.base_model if facts else None,
        datasets=facts.datasets if facts else None,
        training=(facts.rows if facts else {}) | checkpoint_rows(manifest),
    )
    (folder / MODEL_CARD).write_text(card, encoding="utf-8")  # also over that of the folder the files came from


def open_as_umask_says(folder: Path) -> None:
    """A model to hand on, unlike a checkpoint: the permissions of any file that its user makes."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~mask)


def write_shards(
    folder: Path, weights: Weights, dtype: torch.dtype, shard_bytes: int, progress: Progress
) -> list[Path]:
    """Write the safetensors files of a model, and their index where there are several; the files.

    Args:
        weights: each tensor is read once, in the order of ``tensors``.
        dtype: of what is written of floating-point tensors.
        shard_bytes: most of one file; also what is held in memory.
        progress: told the bytes of each tensor.
    """
    target = {name: meta.to(_stored_dtype(meta, dtype)) for name, meta in weights.tensors.items()}
    plan = split_torch_state_dict_into_shards(target, max_shard_size=shard_bytes)
    written = []
    for file_name, names in plan.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name] = weights.read(name).to(target[name].dtype)
            progress(target[name].nbytes)
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        written.append(folder / file_name)
        del shard  # before the next one fills: one shard at a time
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        atomic_write_json(folder / "model.safetensors.index.json", index)
    return written


def _write_adapter(folder: Path, weights: Weights, dtype: torch.dtype, files: Path, progress: Progress) -> list[Path]:
    shutil.copyfile(files / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    tensors = {name: weights.read(name).to(dtype) for name in weights.tensors}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    progress(sum(tensor.nbytes for tensor in tensors.values()))
    return [folder / ADAPTER_WEIGHTS]


def _stored_dtype(meta: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if meta.dtype.is_floating_point else meta.dtype


def bytes_to_write(weights: Weights, dtype: Literal["fp32", "bf16"]) -> int:
    """What an export of these weights will write of them, bytes."""
    tensors = weights.tensors.values()
    return sum(meta.numel() * _stored_dtype(meta, DTYPES[dtype]).itemsize for meta in tensors)
