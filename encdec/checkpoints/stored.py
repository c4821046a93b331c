"""A payload's content as named tensors, whatever engine wrote it.

    model.<parameter>               fp32 master weight, or persistent buffer
    optim.<parameter>.<state>       AdamW's exp_avg, exp_avg_sq, step

The names are the same for all engines. So an engine can continue from another's checkpoint, and equal states have equal
digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from blake3 import blake3
from torch import Tensor, nn

from encdec.errors import CheckpointError


class StoredTensors(Protocol):
    """The tensors of a verified payload."""

    @property
    def names(self) -> list[str]:
        """All of them, in order."""

    @property
    def parameters(self) -> Mapping[str, torch.Size]:
        """Shapes of the model's parameters and buffers, by their names in the model."""

    def read(self, name: str) -> Tensor:
        """One, whole, on the host."""


def split(name: str) -> tuple[str, str]:
    """(parameter, state) of a tensor's name; the state is empty for the parameter itself."""
    kind, _, rest = name.partition(".")
    parameter, _, state = (rest, "", "") if kind == "model" else rest.rpartition(".")
    return parameter, state


def feed(hasher: blake3, stored: StoredTensors) -> None:
    """Feed every tensor's name, dtype, shape and bytes to ``hasher``, in order of name: the same for any sharding."""
    for name in stored.names:
        feed_tensor(hasher, name, stored.read(name))


def feed_tensor(hasher: blake3, name: str, tensor: Tensor) -> None:
    """Feed one tensor on the CPU: its name, dtype, shape and bytes."""
    hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def require_same_model(
    folder: Path,
    stored: Mapping[str, torch.Size],
    wanted: Mapping[str, torch.Size],
    remedy: str = "Resume with the configuration it was made with",
) -> None:
    """Compare parameters and buffers by name and shape.

    Raises:
        CheckpointError: naming some that differ.
    """
    missing = sorted(name for name, shape in wanted.items() if stored.get(name) != shape)
    unknown = sorted(stored.keys() - wanted.keys())
    if missing or unknown:
        raise CheckpointError(
            f"The checkpoint {folder.parent} must have the parameters of this model",
            found=f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}",
            remedy=remedy,
        )


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what is no parameter but belongs to the state."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
