"""A model's directory from a stream of weights: written file by file, there whole or not at all, with a report.

Memory: one safetensors file of the result and one tensor of the source.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from encdec.checkpoints.export import open_as_umask_says, write_shards
from encdec.checkpoints.space import require_room
from encdec.checkpoints.stored import feed_tensor
from encdec.checkpoints.weights import Piece, whole
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError, MissingPrerequisite
from encdec.files import atomic_write_json, staged_directory
from encdec.initialization.qwen3 import EMBEDDING, UNUSED_ROWS_SEED, Qwen3Weights
from encdec.initialization.source import model_type_of

REPORT = "initialization.json"
FILES_BESIDE_WEIGHTS = 8


@dataclass(frozen=True)
class DrawnRows:
    """Rows of the embedding that come from no tensor of the source."""

    parameter: str
    first: int
    end: int
    """One behind the last."""
    seed: int
    rule: str = "mean + standard deviation, per dimension, of the rows before them, times normal noise"


@dataclass(frozen=True)
class Report:
    """Where every parameter came from, and where every tensor of the source went."""

    source: str
    source_tied: bool
    source_parameters: int
    used: dict[str, list[str]]
    """The source's key -> parameters that it fills."""
    unused: dict[str, str]
    """The source's key -> why nothing reads it."""
    drawn: DrawnRows
    parameters: int
    """Of the result; the one embedding counts once."""
    tensors: int
    vocab_size: int
    num_sentinel_tokens: int
    dtype: str
    digest: str
    """BLAKE3 of the weights as written, 64 hex digits: names, types, shapes and bytes, in order of name."""
    files: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        copied = sum(len(targets) for targets in self.used.values())
        rows = self.drawn
        lines = [
            f"source      {self.source}: {self.source_parameters:,} parameters in "
            f"{len(self.used) + len(self.unused)} tensors",
            f"used        {len(self.used)} tensors, for {copied} of ours: each layer for encoder and decoder",
            *(f"unused      {key}: {reason}" for key, reason in self.unused.items()),
            f"drawn       rows {rows.first:,} to {rows.end - 1:,} of {rows.parameter}: {self.num_sentinel_tokens} "
            f"sentinels and {rows.end - rows.first - self.num_sentinel_tokens} spare",
            f"result      {self.parameters:,} parameters in {self.tensors} tensors, {self.vocab_size:,} rows, "
            f"{self.dtype}, {len(self.files)} file(s)",
            f"digest      {self.digest}",
        ]
        if not self.source_tied:
            lines.insert(2, "untied      the source has a head of its own, which is left out: ours is the embedding")
        return lines


class _Converted:
    """Weights in the type they are written in, their digest taken by the way; read in order of name, each once."""

    def __init__(self, weights: Qwen3Weights, dtype: torch.dtype) -> None:
        self._weights, self.hasher = weights, blake3()
        self.tensors: Mapping[str, Tensor] = {name: weights.tensors[name].to(dtype) for name in sorted(weights.tensors)}

    def pieces(self, name: str) -> Sequence[Piece]:
        return [whole(self.tensors[name])]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        # a copy: encoder and decoder read the same tensor, and safetensors refuses two names of one memory
        values = self._weights.read(name, piece).to(self.tensors[name].dtype, copy=True)
        feed_tensor(self.hasher, name, values)
        return values


def write_model(
    out: Path,
    weights: Qwen3Weights,
    config: Qwen3EncoderDecoderConfig,
    save_beside: Callable[[Path], None],
    *,
    source: str,
    source_tied: bool,
    dtype: torch.dtype,
    shard_bytes: int,
    replace: bool,
    progress: Callable[[int], None] = lambda count: None,
) -> Report:
    """Write ``out``: weights, report, and what ``save_beside`` puts there.

    Args:
        save_beside: given the folder that is filled; saves config and tokenizer.
        source: as it was named; source_tied: whether its head is its embedding.
        shard_bytes: most of one safetensors file; also what is held in memory.
        replace: whether ``out`` may be there; it must be a model's directory then, and is replaced at the end.
        progress: told the bytes of each tensor written.

    Raises:
        OSError: it cannot be written; nothing of it is left, and what was there stays.
    """
    converted = _Converted(weights, dtype)
    used: dict[str, list[str]] = {}
    for target, key in weights.plan.targets.items():
        used.setdefault(key, []).append(target)
    with _replaced(out, replace) as place, staged_directory(place) as staging:
        save_beside(staging)
        files = write_shards(staging, converted, dtype, shard_bytes, progress)
        report = Report(
            source=source,
            source_tied=source_tied,
            source_parameters=sum(tensor.numel() for tensor in weights.source.tensors.values()),
            used=used,
            unused=dict(weights.plan.unused),
            drawn=DrawnRows(EMBEDDING, weights.first_drawn, config.vocab_size, UNUSED_ROWS_SEED),
            parameters=sum(tensor.numel() for tensor in converted.tensors.values()),
            tensors=len(converted.tensors),
            vocab_size=config.vocab_size,
            num_sentinel_tokens=config.num_sentinel_tokens,
            dtype=str(dtype).removeprefix("torch."),
            digest=converted.hasher.hexdigest(),
            files=[path.name for path in files],
        )
        atomic_write_json(staging / REPORT, report.to_json())
        open_as_umask_says(staging)
    return report


def require_place(out: Path, *, replace: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse to write over anything but a directory of a model of ours that may be replaced.

    Args:
        inputs: what is read: nothing of it may be in ``out``.

    Raises:
        ConfigError: something else is at ``out``.
    """
    if not os.path.lexists(out):
        return
    if not replace:
        raise ConfigError(
            "The directory to write must not exist yet",
            found=out,
            remedy="Give another one with --to, or --force to replace it",
        )
    place = out.resolve()
    if held := [path for path in inputs if path.exists() and path.resolve().is_relative_to(place)]:
        raise ConfigError(
            "--force must not replace what the model is made from",
            found=f"{held[0]} in {out}",
            remedy="Give another directory with --to",
        )
    if fault := _why_no_model_of_ours(out):
        raise ConfigError(
            "--force replaces the directory of an encoder-decoder and nothing else",
            found=f"{out} {fault}",
            remedy="Remove it yourself, or give another one with --to",
        )


def _why_no_model_of_ours(out: Path) -> str | None:
    if out.is_symlink():
        return "which is a symbolic link"
    if not (out / "config.json").is_file():
        return "without a config.json"
    try:
        model_type = model_type_of(out)
    except MissingPrerequisite:
        return "with a config.json that cannot be read"
    return None if model_type == Qwen3EncoderDecoderConfig.model_type else f"of model_type {model_type}"


def require_room_for(out: Path, weights: Qwen3Weights, dtype: torch.dtype) -> None:
    """Ask for the room before any of it is written.

    Raises:
        MissingPrerequisite: there is too little.
    """
    needed = sum(tensor.numel() for tensor in weights.tensors.values()) * dtype.itemsize
    try:
        require_room(out, needed, FILES_BESIDE_WEIGHTS)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise MissingPrerequisite(
            "There must be room for the model", found=f"{needed:,} bytes wanted for {out}: {error.strerror}",
            remedy="Free some, or give another place with --to",
        ) from None  # fmt: skip


@contextlib.contextmanager
def _replaced(out: Path, replace: bool) -> Iterator[Path]:
    """Where to write: ``out``, or beside what is there, which is exchanged for it at the end."""
    if not replace or not out.exists():
        yield out
        return
    new, old = (out.with_name(f".{out.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    try:
        yield new
        try:
            os.rename(out, old)
            os.rename(new, out)
        except BaseException:
            if old.exists() and not os.path.lexists(out):
                os.rename(old, out)
            raise
        shutil.rmtree(old)
    finally:
        shutil.rmtree(new, ignore_errors=True)
