"""The FSDP2 payload: flat, named tensors in the format of torch.distributed.checkpoint (DCP), which reads them.

    model.<parameter>               fp32 master weight, or persistent buffer
    optim.<parameter>.<state>       AdamW's exp_avg, exp_avg_sq, step

Tied weights occur once: ``named_parameters`` names each parameter a single time. Hyper-parameters are not saved here;
they come from run.yaml and the schedule.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from blake3 import blake3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from encdec.checkpoints.dcp_index import PayloadReader, plain_error
from encdec.checkpoints.fsdp2_tensors import DcpTensors, Fsdp2Weights
from encdec.checkpoints.image import Chunk, Entry, Image, index_of
from encdec.checkpoints.manifest import FileRecord, unreadable, write_hashed
from encdec.checkpoints.stored import StoredTensors, feed, persistent_buffers, require_same_model, split
from encdec.checkpoints.weights import PREFIX
from encdec.distributed import Group, gather, is_distributed, rank
from encdec.errors import CheckpointError

METADATA = ".metadata"


def training_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor that has to survive, by name; sharded parameters stay sharded (DTensor)."""
    tensors: dict[str, Tensor] = {f"{PREFIX}{name}": parameter for name, parameter in model.named_parameters()}
    tensors |= {f"{PREFIX}{name}": buffer for name, buffer in persistent_buffers(model)}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim.{name}.{key}"] = value
    return tensors


class Fsdp2Payload:
    """What FSDP2 trains (or one process alone), in DCP's format; a Payload."""

    name = "fsdp2"

    def __init__(self) -> None:
        self._key: list[tuple[Any, ...]] = []
        self._own: list[bool] = []
        self._image: Image | None = None
        self._entries: dict[int, list[Entry]] = {}
        self._index = b""

    def snapshot(self, model: nn.Module, optimizer: Optimizer) -> Fsdp2Snapshot:
        with torch.no_grad():
            tensors = training_tensors(model, optimizer)
            local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
        key = [_layout_key(*item) for item in zip(tensors, tensors.values(), local, strict=True)]
        if self._image is None or key != self._key:
            self._lay_out(tensors, local)
            self._key = key
        assert self._image is not None
        self._image.copy([tensor for tensor, own in zip(local, self._own, strict=True) if own])
        return Fsdp2Snapshot(self, self._image)

    def _lay_out(self, tensors: dict[str, Tensor], local: list[Tensor]) -> None:
        """Make the image anew: the first time, once the optimizer has state, and for another model."""
        self._image = None  # its memory is needed now
        chunks = [_own_chunk(*item) for item in tensors.items()]
        self._own = [chunk is not None for chunk in chunks]
        on_gpu = any(tensor.is_cuda for tensor in local)
        self._image = Image([chunk for chunk in chunks if chunk], f"__{rank()}_0.distcp", pinned=on_gpu)
        self._entries.pop(rank(), None)

    def tell_entries(self, group: Group) -> bytes:
        """DCP's index on rank 0, nothing elsewhere; collective. Only what is new is sent."""
        assert self._image is not None
        known = rank() in self._entries
        news = gather(None if known else self._image.entries, group)
        self._entries |= {sender: entries for sender, entries in enumerate(news) if entries is not None}
        if rank() == 0 and any(entries is not None for entries in news):
            self._index = index_of(entry for entries in self._entries.values() for entry in entries)
        return self._index

    def load(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
        stored = DcpTensors(folder)
        prepare_optimizer_state(stored, model, optimizer)
        tensors = {name: tensor.detach() for name, tensor in training_tensors(model, optimizer).items()}
        wanted = {split(name)[0]: tensor.shape for name, tensor in tensors.items() if name.startswith(PREFIX)}
        require_same_model(folder, stored.parameters, wanted)
        _fill(tensors, folder, no_dist=not is_distributed())

    def weights(self, folder: Path) -> Fsdp2Weights:
        return Fsdp2Weights(folder)

    def digest(self, folder: Path, hasher: blake3) -> None:
        """Every tensor's name, dtype, shape and bytes, in order of name."""
        feed(hasher, DcpTensors(folder))

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


def _take_part(target: Tensor, whole: Tensor) -> None:
    """Fill this rank's part of a tensor that is sharded by one dimension, or a plain one."""
    if isinstance(target, DTensor):
        (cut,), local = target.placements, target.to_local()
        assert isinstance(cut, Shard)
        rows = -(-whole.shape[cut.dim] // target.device_mesh.size())
        first = min(rank() * rows, whole.shape[cut.dim])
        target, whole = local, whole.narrow(cut.dim, first, local.shape[cut.dim])
    target.copy_(whole)


class Fsdp2Snapshot:
    """The training state of one step boundary in the payload's image; a Snapshot."""

    def __init__(self, payload: Fsdp2Payload, image: Image) -> None:
        self._payload, self._image = payload, image

    @property
    def nbytes(self) -> int:
        return self._image.buffer.nbytes

    def write(self, folder: Path, group: Group = None) -> list[FileRecord]:
        index = self._payload.tell_entries(group)
        records = [self._image.write(folder)] if self._image.entries else []
        if rank() == 0:
            records.append(write_hashed(folder / METADATA, memoryview(index)))
        return records


def _layout_key(name: str, tensor: Tensor, local: Tensor) -> tuple[Any, ...]:
    """What a place in the image depends on; compared at every save, so cheap."""
    spread = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    return name, tensor.dtype, tensor.shape, local.shape, spread


def _own_chunk(name: str, tensor: Tensor) -> Chunk | None:
    """The part of a tensor that this rank writes: its shard, or the first replica of it; None where there is none."""
    if not isinstance(tensor, DTensor):
        offsets, sizes = (0,) * tensor.dim(), tuple(tensor.shape)
        first = rank() == 0
    else:
        (part,) = tensor.__create_chunk_list__()
        offsets, sizes = tuple(part.offsets), tuple(part.sizes)
        coordinate = tensor.device_mesh.get_coordinate() or ()
        first = all(not p.is_replicate() or not at for p, at in zip(tensor.placements, coordinate, strict=True))
    chunk = Chunk(name, tensor.dtype, tuple(tensor.shape), offsets, sizes)
    return chunk if first and chunk.nbytes else None


def _fill(tensors: dict[str, Tensor], folder: Path, *, no_dist: bool) -> None:
    with _quiet():
        try:
            dcp.load(tensors, storage_reader=PayloadReader(folder), no_dist=no_dist)
        except BaseException as error:
            plain = plain_error(error, folder)
            raise unreadable(folder, plain) if isinstance(plain, OSError) else plain from error


def prepare_optimizer_state(stored: DcpTensors, model: nn.Module, optimizer: Optimizer) -> None:
    """Make empty optimizer state of the stored names, shapes and dtypes, sharded like its parameter."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, meta in stored.tensors.items():
        name, state = split(key)
        if not state:
            continue
        if name not in parameters:
            raise CheckpointError(
                "Optimizer state must belong to a parameter of the model",
                found=key,
                remedy="Resume with the configuration it was made with",
            )
        parameter = parameters[name]
        if meta.shape == parameter.shape and meta.shape:
            value = torch.zeros_like(parameter, dtype=meta.dtype)
        else:  # the fused AdamW keeps its step counter, a scalar, where the parameter is
            value = torch.zeros(meta.shape, dtype=meta.dtype, device=parameter.device)
        optimizer.state[parameter][state] = value.detach()


def _quiet() -> warnings.catch_warnings:
    """DCP warns at every call that one process is no process group; ours is a choice, not an accident."""
    return warnings.catch_warnings(action="ignore")
