"""Real ranks of a small FSDP2 model in processes of their own: gloo groups, kills, errors of one rank alone."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from encdec.training.config import InfraConfig
from encdec.training.engines.fsdp2 import shard
from tests.encdec.checkpoints.damage import Lab
from tests.many_ranks import use_one_server

PATIENCE_SECONDS = 120.0


class ShardedLab(Lab):
    """As ``Lab``, over all ranks; they see the same data, so that it trains exactly as one process does."""

    def __init__(self) -> None:
        super().__init__()
        layers = [self.model[0], self.model[2]]
        shard(self.model, layers, InfraConfig(device="cpu"), torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)


def run_ranks(work: Callable[[Path], None], folder: Path, count: int = 2) -> list[int | None]:
    """Run ``work(folder)`` in ``count`` ranks; their exit codes, None for one that had to be ended."""
    use_one_server()
    context = multiprocessing.get_context("forkserver")
    store = folder / f"store-{work.__name__}"
    ranks: list[BaseProcess] = [
        context.Process(target=_rank, args=(work, folder, store, rank, count)) for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(PATIENCE_SECONDS)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    return codes


def _rank(work: Callable[[Path], None], folder: Path, store: Path, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    code = 1
    try:
        work(folder)
        dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)  # at once: a group whose other rank was killed may not let go
