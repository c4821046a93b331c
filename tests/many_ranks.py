"""Real process groups inside a test: ranks are forked from a server that has loaded torch and DeepSpeed once."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing

PRELOADED = [
    "transformers.models.qwen3.modeling_qwen3", "encdec.train", "encdec.training.rank", "encdec.training.engines.zero3",
    "deepspeed", "tests.encdec.checkpoints.ranks", "tests.encdec.training.engine_lab", __name__,
]  # fmt: skip


def use_one_server() -> None:
    """One forkserver for all tests: the first to ask decides what it has loaded."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for it when it is imported, in the server
    multiprocessing.set_forkserver_preload(PRELOADED)


def in_ranks(world_size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` in each of ``world_size`` ranks of a gloo group; the first rank's error is raised.

    Args:
        function: at the top of a module.
    """
    use_one_server()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, (world_size, folder, function, arguments), nprocs=world_size, start_method="forkserver"
        )


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"})
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(*arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
