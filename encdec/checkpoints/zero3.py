"""The ZeRO-3 payload: the files that DeepSpeed's ``save_checkpoint`` writes, which its tools read.

    zero3/latest      names the folder below, for DeepSpeed's tools
    zero3/state/      see encdec.checkpoints.partitions

``python -m deepspeed.utils.zero_to_fp32 step-<k>/zero3 OUT`` makes one fp32 state of them. DeepSpeed's ``latest`` may
point at a folder that was never finished; this one is part of a checkpoint that exists as a whole or not at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from encdec.checkpoints.manifest import FileRecord, hash_file
from encdec.checkpoints.partition_weights import ZeroWeights
from encdec.checkpoints.partitions import TAG, Partitions, Place
from encdec.checkpoints.stored import StoredTensors, feed, persistent_buffers, require_same_model, split
from encdec.distributed import Group, rank

LATEST = "latest"


class ZeroPayload:
    """What DeepSpeed's engine trains; a Payload. ``model`` is the engine, ``optimizer`` its ZeRO-3 optimizer."""

    name = "zero3"

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def snapshot(self, model: Any, optimizer: Any) -> ZeroSnapshot:
        with captured(model) as states:
            model.save_checkpoint("unused", tag=TAG, save_latest=False)
        return ZeroSnapshot({name: self._on_host(state, (name,)) for name, state in states.items()})

    def _on_host(self, value: Any, path: tuple[Any, ...]) -> Any:
        """``value`` with its tensors copied into host buffers, the same ones at every snapshot."""
        if isinstance(value, Tensor):
            buffer = self._buffers.get(path)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = self._buffers[path] = torch.empty_like(value, device="cpu", requires_grad=False)
            return buffer.copy_(value.detach())
        if isinstance(value, dict):
            return type(value)((key, self._on_host(item, (*path, key))) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._on_host(item, (*path, index)) for index, item in enumerate(value))
        return value

    def load(self, folder: Path, model: Any, optimizer: Any) -> None:
        stored = Partitions(folder)
        targets = targets_of(model, optimizer)
        buffers = dict(persistent_buffers(model.module))
        require_same_model(folder, stored.parameters, _shapes(targets, buffers))
        for name, buffer in buffers.items():
            buffer.copy_(stored.buffers[name])
        with refilled(optimizer):
            for shard_rank in _needed(stored, targets):
                shard = stored.shard(shard_rank)
                for name, target in targets.items():
                    source = stored.places[name]
                    _copy_overlap(shard.weights[source.group], source, shard_rank, target.weights, target.place)
                    for key, values in shard.states[source.group].items():
                        flat = target.state(optimizer, key, values)
                        if values.ndim:
                            _copy_overlap(values, source, shard_rank, flat, target.place)

    def load_from(self, stored: StoredTensors, folder: Path, model: Any, optimizer: Any) -> None:
        targets, buffers = targets_of(model, optimizer), dict(persistent_buffers(model.module))
        require_same_model(folder, stored.parameters, _shapes(targets, buffers))
        with refilled(optimizer):
            for name in stored.names:
                (parameter, key), values = split(name), stored.read(name)
                if parameter in buffers:
                    buffers[parameter].copy_(values)
                    continue
                target = targets[parameter]
                flat = target.state(optimizer, key, values) if key else target.weights
                if values.ndim:
                    target.take_part(flat, values)

    def digest(self, folder: Path, hasher: blake3) -> None:
        """Every tensor's name, dtype, shape and bytes, in order of name: as FSDP2's payload, and the same of an equal
        state."""
        feed(hasher, Partitions(folder))

    def stored(self, folder: Path) -> StoredTensors:
        return Partitions(folder)

    def weights(self, folder: Path) -> ZeroWeights:
        return ZeroWeights(folder)


class ZeroSnapshot:
    """This rank's files, as DeepSpeed would write them, in host memory; a Snapshot."""

    def __init__(self, states: dict[str, Any]) -> None:
        self._states = states

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self._states))

    def write(self, folder: Path, group: Group = None) -> list[FileRecord]:
        inner = folder / TAG
        inner.mkdir(mode=0o700, exist_ok=True)  # by whichever rank comes first
        own = [inner / name for name in self._states]
        for path, state in zip(own, self._states.values(), strict=True):
            _save(state, path)
        if rank() == 0:
            own.append(folder / LATEST)
            own[-1].write_text(TAG)
        for path in own:
            path.chmod(0o600)
        return [hash_file(folder, path) for path in own]


def _save(state: dict[str, Any], path: Path) -> None:
    """torch.save, with storage's own error where torch makes another of it."""
    try:
        with path.open("wb") as stream:  # given a path, torch does not even keep the error
            torch.save(state, stream)
    except RuntimeError as error:
        cause = error.__context__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


@contextlib.contextmanager
def captured(engine: Any) -> Iterator[dict[str, Any]]:
    """Inside, what DeepSpeed saves goes into a mapping, by file name, instead of to storage: a save that can be copied
    first and written later, by DeepSpeed's own hand.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    states: dict[str, Any] = {}

    class Captor(CheckpointEngine):
        def create(self, info: Any) -> None: ...
        def makedirs(self, path: str, exist_ok: bool = False) -> None: ...
        def load(self, path: str, map_location: Any = None) -> None: ...

        def save(self, state_dict: dict[str, Any], path: str) -> None:
            states[Path(path).name] = state_dict

        def commit(self, info: Any) -> bool:
            return True

    original = engine.checkpoint_engine
    engine.checkpoint_engine = Captor()
    engine._copy_recovery_script = lambda folder: None  # DeepSpeed's tools are where DeepSpeed is
    try:
        yield states
    finally:
        engine.checkpoint_engine = original
        del engine._copy_recovery_script


@dataclass(frozen=True)
class Target:
    """This rank's part of a parameter, inside DeepSpeed's flat tensors."""

    weights: Tensor
    """Flat fp32 master weights of its group."""
    place: Place

    def state(self, optimizer: Any, key: str, like: Tensor) -> Tensor:
        """The optimizer's flat tensor of that name, or its scalar, made if it is not there yet."""
        states = optimizer.state.setdefault(self.weights, {})
        if key not in states:
            states[key] = torch.zeros_like(self.weights) if like.ndim else like.to(self.weights.device, copy=True)
        return states[key]

    def take_part(self, flat: Tensor, whole: Tensor) -> None:
        """Fill this rank's part in ``flat`` from a whole tensor."""
        first, held = rank() * self.place.length, self.place.held_by(rank())
        flat.data[self.place.offset :][:held] = whole.flatten()[first:][:held]


def _shapes(targets: dict[str, Target], buffers: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: target.place.shape for name, target in targets.items()} | {
        name: buffer.shape for name, buffer in buffers.items()
    }


def targets_of(engine: Any, optimizer: Any) -> dict[str, Target]:
    """By the names of the unsharded model's parameters."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    targets = {}
    for index, (group, flat) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        offset = 0
        for parameter in group:
            length = parameter.partition_numel()
            targets[names[id(parameter)]] = Target(flat, Place(index, offset, length, parameter.ds_shape))
            offset += length
    return targets


@contextlib.contextmanager
def refilled(optimizer: Any) -> Iterator[None]:
    """Inside, master weights and optimizer state are filled anew; then the parameters follow from them."""
    optimizer.checkpoint_event_prologue()
    optimizer.optimizer.state.clear()
    for flat in optimizer.fp32_partitioned_groups_flat:
        flat.data.zero_()
    yield
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()


def _needed(stored: Partitions, targets: dict[str, Target]) -> list[int]:
    """Ranks of a checkpoint that hold something of this rank's parts; one in any case, for the scalars."""
    needed: set[int] = set()
    for name, target in targets.items():
        first = rank() * target.place.length
        held = target.place.held_by(rank())
        if held:
            length = stored.places[name].length
            needed |= set(range(first // length, (first + held - 1) // length + 1))
    return sorted(needed) or [0]


def _copy_overlap(source: Tensor, there: Place, source_rank: int, target: Tensor, here: Place) -> None:
    """Copy the elements that the part of ``source_rank`` and this rank's part have in common."""
    there_first, here_first = source_rank * there.length, rank() * here.length
    first = max(there_first, here_first)
    count = min(there_first + there.held_by(source_rank), here_first + here.held_by(rank())) - first
    if count > 0:
        target.data[here.offset + first - here_first :][:count] = source[there.offset + first - there_first :][:count]
