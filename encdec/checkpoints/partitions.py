"""Reads DeepSpeed's ZeRO-3 files by parameter name, at any world size, without DeepSpeed.

    state/zero_pp_rank_<r>_mp_rank_00_model_states.pt          names and shapes, in the order of the flat tensors
    state/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   rank r's part of everything, flat

Rank r of W holds elements [r * c, (r + 1) * c) of each flattened parameter, c = ceil(numel / W), padded to c; the parts
of a group's parameters follow each other in one flat tensor, in fp32, and so do their optimizer states.

DeepSpeed's own way to another world size writes the whole checkpoint once more, a folder per parameter (universal
format), and its loader then gives every group the hyper-parameters of the first, weight decay on norms among them. Here
each rank reads the parts it needs: nothing is converted, nothing is written, and no number is computed.

The files are pickles. Verify the manifest first; beyond that, nothing but tensors and plain values is brought to life.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from encdec.checkpoints.manifest import reading
from encdec.checkpoints.stored import split
from encdec.errors import CheckpointError

TAG = "state"
"""Folder of DeepSpeed's files in the payload, which DeepSpeed's tools call a tag."""
MODEL_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
ALLOWED = {
    ("collections", "OrderedDict"), ("torch", "Size"), ("torch", "device"), ("torch.nn.parameter", "Parameter"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in every rank's flat tensors."""

    group: int
    """Which of the flat tensors."""
    offset: int
    """First element of the part."""
    length: int
    """Elements of the part, padding included: ceil(numel / world size)."""
    shape: torch.Size

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def held_by(self, rank: int) -> int:
        """Elements of the part of ``rank`` that are no padding."""
        return min(max(self.numel - rank * self.length, 0), self.length)


class Shard:
    """One rank's file."""

    def __init__(self, values: dict[str, Any]) -> None:
        state = values["optimizer_state_dict"]
        order = [index for group in state["optimizer_state_dict"]["param_groups"] for index in group["params"]]
        by_index = state["optimizer_state_dict"]["state"]
        self.world_size: int = state["partition_count"]
        self.weights: list[Tensor] = state["fp32_flat_groups"]
        self.states: list[dict[str, Tensor]] = [by_index.get(index, {}) for index in order]
        """Per flat tensor of weights: AdamW's states, flat as well, or a scalar for all of it."""


class Partitions:
    """A verified ZeRO-3 payload as named tensors: model.<parameter>, optim.<parameter>.<state>, as the FSDP2 payload's.

    Args:
        folder: the payload.

    Raises:
        CheckpointError: the files are not what DeepSpeed writes, or not all there.
        UnreadableCheckpoint: storage does not let them be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / TAG
        with reading(self.folder, "a folder of DeepSpeed's files"):
            names = sorted(path.name for path in self.folder.iterdir())
        self._files = {int(found.group(1)): name for name in names if (found := OPTIMIZER_FILE.fullmatch(name))}
        self.world_size = len(self._files)
        models = [name for name in names if MODEL_FILE.fullmatch(name)]
        if sorted(self._files) != list(range(self.world_size)) or len(models) != self.world_size or not models:
            raise _broken(self.folder, "two of DeepSpeed's files a rank", f"{len(names)} files: {names[:3]}")
        path = self.folder / models[0]
        header = _unpickled(path)
        with reading(path, "names and shapes of a ZeRO-3 model"):
            self.places = self._lay_out(header["param_shapes"])
            self.buffers: dict[str, Tensor] = {name: header["module"][name] for name in header["buffer_names"]}
            if header["frozen_param_shapes"]:
                raise ValueError("frozen parameters, which no run of this project has")

    def _lay_out(self, groups: list[dict[str, torch.Size]]) -> dict[str, Place]:
        places = {}
        for index, shapes in enumerate(groups):
            offset = 0
            for name, shape in shapes.items():
                length = math.ceil(torch.Size(shape).numel() / self.world_size)
                places[name] = Place(index, offset, length, torch.Size(shape))
                offset += length
        return places

    @property
    def parameters(self) -> dict[str, torch.Size]:
        """Shapes of parameters and persistent buffers, by name."""
        return {name: place.shape for name, place in self.places.items()} | {
            name: buffer.shape for name, buffer in self.buffers.items()
        }

    def shard(self, rank: int, *, outline: bool = False) -> Shard:
        """Rank ``rank``'s part.

        Args:
            outline: leave the numbers in the file (``_read_flat`` reads some of them).
        """
        path = self.folder / self._files[rank]
        with reading(path, "a rank's part of a ZeRO-3 state"):
            shard = Shard(_unpickled(path, outline=outline))
            if shard.world_size != self.world_size:
                raise ValueError(f"a part of {shard.world_size} where {self.world_size} are")
        return shard

    @cached_property
    def _outlines(self) -> list[Shard]:
        return [self.shard(rank, outline=True) for rank in range(self.world_size)]

    @cached_property
    def names(self) -> list[str]:
        """All tensors, in order."""
        states = [list(state) for state in self._outlines[0].states]
        optim = [f"optim.{name}.{key}" for name, place in self.places.items() for key in states[place.group]]
        return sorted([*(f"model.{name}" for name in self.parameters), *optim])

    def dtype_of(self, parameter: str) -> torch.dtype:
        """Of a parameter or buffer."""
        if parameter in self.buffers:
            return self.buffers[parameter].dtype
        return self._outlines[0].weights[self.places[parameter].group].dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the host."""
        parameter, key = split(name)
        if parameter in self.buffers:
            return self.buffers[parameter]
        place = self.places[parameter]
        if not self._flat(0, place, key).ndim:
            return self._read_flat(0, place, key, 0, 1)[0]
        return self.read_range(name, 0, place.numel).view(place.shape)

    def read_range(self, name: str, first: int, count: int) -> Tensor:
        """Elements [first, first + count) of a flattened tensor.

        Raises:
            UnreadableCheckpoint: storage does not let them be read.
        """
        parameter, key = split(name)
        if parameter in self.buffers:
            return self.buffers[parameter].flatten()[first:][:count]
        place = self.places[parameter]
        parts = []
        for rank in range(self.world_size):
            own = rank * place.length
            begin, end = max(first, own), min(first + count, own + place.held_by(rank))
            if begin < end:
                parts.append(self._read_flat(rank, place, key, place.offset + begin - own, end - begin))
        if sum(len(part) for part in parts) != count:
            raise _broken(self.folder, "each rank's part of every parameter", f"less of {name}")
        return torch.cat(parts) if parts else torch.empty(0, dtype=self._flat(0, place, key).dtype)

    def _flat(self, rank: int, place: Place, key: str) -> Tensor:
        """Outline of rank ``rank``'s flat tensor of weights or, with ``key``, of that optimizer state."""
        shard = self._outlines[rank]
        return shard.states[place.group][key] if key else shard.weights[place.group]

    def _read_flat(self, rank: int, place: Place, key: str, first: int, count: int) -> Tensor:
        """Elements [first, first + count) of that tensor, which ``torch.save`` has stored uncompressed.

        Read, not memory-mapped: storage that fails under a mapping kills the process with SIGBUS instead of an error.
        """
        flat, path = self._flat(rank, place, key), self.folder / self._files[rank]
        content = bytearray(count * flat.itemsize)
        with reading(path, "all elements of a rank's part"), path.open("rb") as stream:
            begin = int(flat.untyped_storage()._checkpoint_offset)  # type: ignore[arg-type]
            stream.seek(begin + (int(flat.storage_offset()) + first) * flat.itemsize)
            if stream.readinto(content) != len(content):
                raise ValueError("the file ends before them")
        return torch.frombuffer(content, dtype=flat.dtype)


def _unpickled(path: Path, *, outline: bool = False) -> dict[str, Any]:
    """What a file holds; as an ``outline``, its tensors have no numbers, and their storages say where these are."""
    mode = FakeTensorMode() if outline else contextlib.nullcontext()
    with reading(path, "DeepSpeed's state"), path.open("rb") as stream, mode:
        try:  # of a stream, whose errors are storage's own; given a path, torch makes others of them
            return torch.load(stream, map_location="cpu", weights_only=False, pickle_module=_Restricted)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(str(error).splitlines()[0]) from None


class _Foreign:
    """Stands for an object of DeepSpeed's own, of which nothing is needed."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Restricted:
    """What torch.load takes for the pickle module: its Unpickler makes tensors and plain values alone."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.partition(".")[0] == "deepspeed":
                return _Foreign
            if (module, name) in ALLOWED:
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"{module}.{name}, which a checkpoint has no use for")


def _broken(path: Path, rule: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"A ZeRO-3 checkpoint must have {rule} at {path}",
        found=found,
        remedy="Use an older checkpoint; this one is not loaded",
    )
