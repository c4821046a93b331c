"""Small collectives on plain Python values that also work in one process without a process group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from encdec.errors import EncdecError

T = TypeVar("T")
LONG_WORK = "long-work"
"""Begins the name of the thread in which rank 0 does what the others meet about."""
SECONDS_BETWEEN_MEETINGS = 1.0
Group = dist.ProcessGroup | None
"""Who takes part, always all ranks; None: the default group. A thread beside the training loop needs its own."""


PATIENCE = timedelta(hours=6)
"""What ranks wait for each other in a group beside the training loop: a slow disk is no reason to end training."""


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def background_group() -> Group:
    """A group of all ranks for one thread beside the training loop; collective. None in one process alone."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if is_distributed() else None


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


def on_rank_zero_however_long(work: Callable[[], T]) -> T:
    """As ``on_rank_zero``, for work that may outlast a collective's timeout: the ranks meet while it goes on."""
    if not is_distributed():
        return work()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=LONG_WORK) as pool:
        future = pool.submit(work) if rank() == 0 else None
        while not broadcast(future is not None and _done_within(future, SECONDS_BETWEEN_MEETINGS)):
            pass
        return on_rank_zero(lambda: future.result())  # type: ignore[union-attr]


def _done_within(future: Future[Any], seconds: float) -> bool:
    return not wait([future], timeout=seconds).not_done
