"""The safetensors files of a checkpoint's directory, read by slices: whatever its size, one slice is in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from encdec.checkpoints.weights import Piece, slices_of
from encdec.errors import MissingPrerequisite

INDEX = "model.safetensors.index.json"
FILES, CONFIG_ALONE = ["*.safetensors", "*.json"], ["config.json"]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the floating-point types that weights come in."""


def checkpoint_directory(model_name_or_path: str, files: list[str]) -> Path:
    """The directory itself, or the hub's snapshot of a model in the local cache.

    Raises:
        MissingPrerequisite: it is neither.
    """
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
        MissingPrerequisite: there is none, or it cannot be read.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise MissingPrerequisite(
            "a checkpoint must have a config.json", found=f"none in {directory}", remedy="Give a checkpoint's directory"
        )
    return _json_object(path).get("model_type")


class SourceFiles:
    """The tensors of a checkpoint: an index, where there is one, says in which files they are.

    Opening it reads the headers of all files and nothing else. At most one file is mapped at a time.

    Args:
        directory: holds the safetensors files.

    Raises:
        MissingPrerequisite: files are missing or cannot be read, or the index does not describe them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, Path] = {}
        """Name of a tensor -> its file."""
        self.tensors: Mapping[str, Tensor]
        """Name -> shape and dtype, as a tensor on the meta device."""
        self._open: tuple[Path, Any] | None = None
        index = directory / INDEX
        listed = _listed(index) if index.is_file() else None
        paths = _unlisted(directory) if listed is None else _paths(directory, listed)
        if not paths:
            raise _incomplete(f"none in {directory}")
        tensors: dict[str, Tensor] = {}
        for path in paths:
            headers = self._headers(path)
            if listed is not None:
                _require_as_listed(path, set(headers), {name for name, file in listed.items() if file == path.name})
            if twice := sorted(tensors.keys() & headers.keys()):
                raise _incomplete(f"{twice[0]} in {self.files[twice[0]].name} and in {path.name}, without an index")
            tensors |= headers
            self.files |= dict.fromkeys(headers, path)
        self.tensors = tensors

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """A tensor, or one box of it, on the CPU, in memory of its own size.

        Raises:
            MissingPrerequisite: its file cannot be read any more.
        """
        path = self.files[name]
        try:
            file = self._opened(path)
            if piece is None or piece.sizes == tuple(self.tensors[name].shape):
                return file.get_tensor(name)
            return file.get_slice(name)[slices_of(piece)]
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error

    def _headers(self, path: Path) -> dict[str, Tensor]:
        try:
            file, headers = self._opened(path), {}
            for name in file.keys():  # noqa: SIM118 - not a dict, and it does not iterate
                header = file.get_slice(name)
                dtype = DTYPES.get(header.get_dtype())
                if dtype is None:
                    raise MissingPrerequisite(
                        "a checkpoint's weights must be floating-point numbers of 16 bits or more",
                        found=f"{name} of type {header.get_dtype()} in {path}",
                        remedy="Give the checkpoint without quantisation",
                    )
                headers[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
            return headers
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error

    def _opened(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = None  # unmap the one before
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(document, dict):
        raise _unreadable(path, f"a JSON {type(document).__name__} instead of an object")
    return document


def _listed(index: Path) -> dict[str, str]:
    """Tensor -> file name, as an index has it."""
    listed = _json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(_is_plain(name) for name in listed.values()):
        raise _unreadable(index, "no weight_map of tensors to files beside it")
    return listed


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _unlisted(directory: Path) -> list[Path]:
    """Files of a directory without an index: the one that transformers would take, else all."""
    usual = directory / "model.safetensors"
    return [usual] if usual.is_file() else sorted(directory.glob("*.safetensors"))


def _paths(directory: Path, listed: Mapping[str, str]) -> list[Path]:
    names = sorted(set(listed.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise _incomplete(f"{', '.join(missing)} missing in {directory}")
    return [directory / name for name in names]


def _require_as_listed(path: Path, held: set[str], listed: set[str]) -> None:
    if held != listed:
        differing = sorted(held ^ listed)
        side = "not listed for it" if differing[0] in held else "listed but not in it"
        raise MissingPrerequisite(
            f"{INDEX} must list exactly the tensors of each file",
            found=f"{path.name}: {len(differing)} that differ, {differing[0]} {side}",
            remedy="Download the checkpoint again",
        )


def _incomplete(found: str) -> MissingPrerequisite:
    return MissingPrerequisite(
        "a checkpoint must have all of its safetensors files", found=found, remedy="Download the checkpoint again"
    )


def _unreadable(path: Path, error: object) -> MissingPrerequisite:
    return MissingPrerequisite(
        "a checkpoint's files must be ones that can be read",
        found=f"{path}: {error}",
        remedy="Download the checkpoint again",
    )
