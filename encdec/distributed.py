"""Small collectives on plain Python values that also work in one process without a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from encdec.errors import EncdecError

T = TypeVar("T")
Group = dist.ProcessGroup | None
"""Who takes part, always all ranks; None: the default group. A thread beside the training loop needs its own."""


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def broadcast(value: T) -> T:
    """Rank 0's ``value`` on every rank."""
    if not is_distributed():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T, group: Group = None) -> list[T]:
    """Every rank's ``value``, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def together(work: Callable[[], T], group: Group = None) -> list[T]:
    """Run ``work`` on every rank; results in rank order, or the first rank's error raised on all of them.

    Without this, a rank that fails alone (a full disk) leaves the others waiting in their next collective.
    """
    result: T | None = None
    problem: Exception | None = None
    try:
        result = work()
    except (EncdecError, OSError) as error:
        problem = error
    answers = gather((result, problem), group)
    first = next((error for _, error in answers if error is not None), None)
    if first is not None:
        raise first
    return [answer for answer, _ in answers]  # type: ignore[misc]


def on_rank_zero(work: Callable[[], T], group: Group = None) -> T:
    """Run ``work`` on rank 0 alone; its result, or its error, on every rank."""
    return together(work if rank() == 0 else lambda: None, group)[0]  # type: ignore[arg-type,return-value]
