"""Values of parameters, one parameter at a time, and how a model takes them.

A stream yields each parameter's name and a function that reads a box of its values, or all of them. What is read lives
as long as the reader keeps it: so a rank that asks for its own rows never holds more than its shard and one parameter.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from encdec.checkpoints.stored import persistent_buffers
from encdec.checkpoints.weights import Piece, Weights, box

Read = Callable[[Piece | None], Tensor]
"""A box of a parameter's values, or all of them, on the CPU. Valid until the stream goes on."""
Stream = Iterator[tuple[str, Read]]


class InitialWeights(Protocol):
    """What a model's parameters start from; the same on every rank that asks."""

    def stream(self) -> Stream:
        """Each parameter once."""


class StoredStream:
    """Weights that can be read in any order, in the order they are listed."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def stream(self) -> Stream:
        for name in self.weights.tensors:
            yield name, functools.partial(self.weights.read, name)


class SeededWeights:
    """Random weights in float32 that depend on a model's configuration and a seed alone.

    They are those of transformers' own `initialize_weights` on the CPU after `manual_seed`: modules are visited in its
    order, each with its own parameters in memory and no others. torch's global generator is left as it was.

    Args:
        model: like the one to be filled, on the meta device; its parameters stay there.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model, self.seed = model, seed

    def stream(self) -> Stream:
        state = torch.Generator().manual_seed(self.seed).get_state()
        for prefix, module, owner in _in_order(self.model, "", self.model):
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if not names:
                continue
            empty = dict(module._parameters)
            try:
                state = _initialise(module, owner, state)
                values = {name: module._parameters[name] for name in names}
            finally:
                module._parameters.update(empty)
            for name in names:
                values_of_name = values.pop(name)
                assert values_of_name is not None
                yield prefix + name, functools.partial(box, values_of_name.detach())


def _in_order(
    module: nn.Module, prefix: str, owner: PreTrainedModel
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Name with a dot, module, and the model that initialises it: children first, as transformers has it."""
    for name, child in module.named_children():
        yield from _in_order(child, f"{prefix}{name}.", child if isinstance(child, PreTrainedModel) else owner)
    yield prefix, module, owner


@torch.no_grad()
def _initialise(module: nn.Module, owner: PreTrainedModel, state: Tensor) -> Tensor:
    """Give a module's own parameters memory and values; the generator's state before -> after."""
    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu", dtype=torch.float32))
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.set_state(state)  # not torch.manual_seed, which would reseed the GPUs too
        owner._init_weights(module)
        return torch.random.default_generator.get_state()


@torch.no_grad()
def fill(model: nn.Module, stream: Stream) -> None:
    """Copy each parameter's values into a model that has memory for them; of a sharded one, this rank's part alone.

    Args:
        model: plain, or sharded by FSDP2 (parameters are DTensors).

    Raises:
        ValueError: the stream's names are not the model's.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    targets = {**parameters, **dict(persistent_buffers(model))}
    filled = set()
    for name, read in stream:
        if name not in targets:
            raise ValueError(f"values for {name}, which the model does not have")
        filled.add(name)
        target = targets[name]
        if not isinstance(target, DTensor):
            target.copy_(read(None))
            continue
        part = own_part(target)
        if part.elements:
            target.to_local().copy_(read(part))
    if unfilled := sorted(parameters.keys() - filled):
        raise ValueError(f"no values for {', '.join(unfilled[:3])}, {len(unfilled)} in all")


def own_part(parameter: DTensor) -> Piece:
    """The box of a sharded parameter that this rank holds."""
    (part,) = parameter.__create_chunk_list__()  # type: ignore[attr-defined]
    return Piece(tuple(part.offsets), tuple(part.sizes))


def trim_heap() -> None:
    """Give the host back the memory that glibc keeps for later; nothing with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def is_empty(model: nn.Module) -> bool:
    """Whether parameters are on the meta device, without memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def give_memory(model: nn.Module, device: torch.device, buffers_device: torch.device | None = None) -> None:
    """Give the parameters of a model that are on the meta device memory, without values; buffers keep theirs.

    Sharded before, a rank gets memory for its shards alone.

    Args:
        device: of the parameters.
        buffers_device: of the buffers; the same unless given.
    """
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    move_buffers(model, buffers_device or device)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put all buffers on ``device``, wherever the parameters are."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
