"""The FSDP2 payload: torch.distributed.checkpoint (DCP) of flat, named tensors.

    model.<parameter>               fp32 master weight, or persistent buffer
    optim.<parameter>.<state>       AdamW's exp_avg, exp_avg_sq, step

Tied weights occur once: ``named_parameters`` names each parameter a single time. Hyper-parameters are not saved here;
they come from run.yaml and the schedule.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from blake3 import blake3
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from encdec import files
from encdec.checkpoints.manifest import FileRecord, hash_file, reading, unreadable
from encdec.checkpoints.stored import StoredTensors, persistent_buffers, require_same_model, split
from encdec.distributed import Group, is_distributed, rank
from encdec.errors import CheckpointError

DIGEST_CHUNK_BYTES = 512 * 2**20


def training_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor that has to survive, by name; sharded parameters stay sharded (DTensor)."""
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.data for name, parameter in model.named_parameters()}
    tensors |= {f"model.{name}": buffer for name, buffer in persistent_buffers(model)}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim.{name}.{key}"] = value
    return tensors


class Fsdp2Payload:
    """What FSDP2 trains (or one process alone), through DCP; a Payload."""

    name = "fsdp2"

    def snapshot(self, model: nn.Module, optimizer: Optimizer) -> Fsdp2Snapshot:
        return Fsdp2Snapshot(training_tensors(model, optimizer))

    def load(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
        metadata = read_metadata(folder)
        stored = {key for key in metadata.state_dict_metadata if key.startswith("model.")}
        prepare_optimizer_state(metadata, model, optimizer)
        tensors = training_tensors(model, optimizer)
        wanted = {key for key in tensors if key.startswith("model.")}
        if stored != wanted:
            missing, unknown = sorted(wanted - stored), sorted(stored - wanted)
            raise CheckpointError(
                f"The checkpoint {folder.parent} must have the parameters of this model",
                found=f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}",
                remedy="Resume with the configuration it was made with",
            )
        _fill(tensors, folder, no_dist=not is_distributed())

    def digest(self, folder: Path, hasher: blake3) -> None:
        """Every tensor's name, dtype, shape and bytes, in order of name."""
        metadata = read_metadata(folder).state_dict_metadata
        for names in _chunks(metadata):
            tensors = {name: torch.empty(metadata[name].size, dtype=metadata[name].properties.dtype) for name in names}  # type: ignore[union-attr]
            _fill(tensors, folder, no_dist=True)
            for name, tensor in tensors.items():
                hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
                hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def stored(self, folder: Path) -> DcpTensors:
        return DcpTensors(folder)

    def load_from(self, stored: StoredTensors, folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
        parameters, buffers = dict(model.named_parameters()), dict(persistent_buffers(model))
        shapes = {name: tensor.shape for name, tensor in {**parameters, **buffers}.items()}
        require_same_model(folder, stored.parameters, shapes)
        optimizer.state.clear()
        for name in stored.names:
            (parameter, key), values = split(name), stored.read(name)
            if parameter in buffers:
                buffers[parameter].copy_(values)
            elif not key:
                _take_part(parameters[parameter].data, values)
            elif values.ndim:
                own = torch.zeros_like(parameters[parameter], dtype=values.dtype).detach()
                _take_part(own, values)
                optimizer.state[parameters[parameter]][key] = own
            else:  # the fused AdamW keeps its step counter where the parameter is
                optimizer.state[parameters[parameter]][key] = values.to(parameters[parameter].device, copy=True)


class DcpTensors:
    """A verified FSDP2 payload as named tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: dict[str, Any] = read_metadata(folder).state_dict_metadata

    @property
    def names(self) -> list[str]:
        return sorted(self._index)

    @property
    def parameters(self) -> dict[str, torch.Size]:
        return {split(name)[0]: stored.size for name, stored in self._index.items() if name.startswith("model.")}

    def read(self, name: str) -> Tensor:
        stored = self._index[name]
        tensors = {name: torch.empty(stored.size, dtype=stored.properties.dtype)}
        _fill(tensors, self._folder, no_dist=True)
        return tensors[name]


def _take_part(target: Tensor, whole: Tensor) -> None:
    """Fill this rank's part of a tensor that is sharded by its first dimension, or a plain one."""
    if isinstance(target, DTensor):
        local = target.to_local()
        rows = -(-len(whole) // target.device_mesh.size())
        target, whole = local, whole[rank() * rows :][: len(local)]
    target.copy_(whole)


class Fsdp2Snapshot:
    """The training state as it is where it lies; a Snapshot for as long as training waits."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def nbytes(self) -> int:
        local = (t.to_local() if isinstance(t, DTensor) else t for t in self._tensors.values())
        return sum(tensor.nbytes for tensor in local)

    def write(self, folder: Path, group: Group = None) -> list[FileRecord]:
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        with _quiet():
            try:
                dcp.save(self._tensors, storage_writer=writer, process_group=group, no_dist=not is_distributed())
            except BaseException as error:  # DCP's own exception derives from BaseException
                raise _plain(error, folder) from error
        own = sorted(folder.glob(f"__{rank()}_*.distcp")) + ([folder / ".metadata"] if rank() == 0 else [])
        for path in own:
            path.chmod(0o600)
            files.fsync_file(path)
        files.fsync_directory(folder)
        return [hash_file(folder, path) for path in own]


def _fill(tensors: dict[str, Tensor], folder: Path, *, no_dist: bool) -> None:
    with _quiet():
        try:
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=no_dist)
        except BaseException as error:
            plain = _plain(error, folder)
            raise unreadable(folder, plain) if isinstance(plain, OSError) else plain from error


def prepare_optimizer_state(metadata: Metadata, model: nn.Module, optimizer: Optimizer) -> None:
    """Make empty optimizer state of the stored names, shapes and dtypes, sharded like its parameter."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, stored in metadata.state_dict_metadata.items():
        if not key.startswith("optim.") or not isinstance(stored, TensorStorageMetadata):
            continue
        name, _, state = key.removeprefix("optim.").rpartition(".")
        if name not in parameters:
            raise CheckpointError(
                "Optimizer state must belong to a parameter of the model",
                found=key,
                remedy="Resume with the configuration it was made with",
            )
        parameter, dtype = parameters[name], stored.properties.dtype
        if stored.size == parameter.shape and stored.size:
            value = torch.zeros_like(parameter, dtype=dtype)
        else:  # the fused AdamW keeps its step counter, a scalar, where the parameter is
            value = torch.zeros(stored.size, dtype=dtype, device=parameter.device)
        optimizer.state[parameter][state] = value.detach()


def read_metadata(folder: Path) -> Metadata:
    """DCP's index of the payload. It is a pickle: call only after the manifest has been verified."""
    with reading(folder / ".metadata", "DCP's metadata"):
        return dcp.FileSystemReader(folder).read_metadata()


def _chunks(metadata: dict[str, Any]) -> Iterator[list[str]]:
    """Names in order, cut so that each cut's tensors stay within DIGEST_CHUNK_BYTES (or are one tensor)."""
    names: list[str] = []
    size = 0
    for name in sorted(metadata):
        stored = metadata[name]
        nbytes = stored.size.numel() * stored.properties.dtype.itemsize
        if names and size + nbytes > DIGEST_CHUNK_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    if names:
        yield names


def _quiet() -> warnings.catch_warnings:
    """DCP warns at every call that one process is no process group; ours is a choice, not an accident."""
    return warnings.catch_warnings(action="ignore")


def _plain(error: BaseException, folder: Path) -> BaseException:
    """DCP's CheckpointException carries every rank's failure; show the first one's cause."""
    failures = getattr(error, "failures", None)
    if not failures:
        return error
    rank, wrapped = sorted(failures.items())[0]
    cause = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    if isinstance(cause, OSError):
        return cause
    return CheckpointError(
        f"Every rank must read or write its part of {folder}",
        found=f"rank {rank}: {type(cause).__name__}: {cause}",
        remedy="See that rank's log",
    )
