"""``training.per_device_train_batch_size: auto``: the largest micro-batch that fits, found once and then kept to.

Each rank tries by itself, on a twin of the model that is sharded as the model will be, but over a group that only
pretends to communicate (torch's "fake" backend): the same buffers come and go, nobody waits for anybody. So a rank
that runs out of memory in the middle of a layer fails alone, and tries the next size; then the ranks agree on the
smallest of what they found. A try is a whole step at the longest sequences: two micro-batches where gradients will be
accumulated, and the optimizer's update.

What is not tried: the buffers of real communication (NCCL) and a memory that gets fragmented over time, for which
HEADROOM is held back, and evaluation, whose batch has a key of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from encdec import distributed
from encdec.errors import MissingPrerequisite
from encdec.estimates import GIGABYTE
from encdec.files import RunPaths
from encdec.records import JsonLinesWriter, event, read_json_lines
from encdec.training.config import FullConfig
from encdec.training.engines.fsdp2 import shard
from encdec.training.memory_utils import first_that_fits, kept_randomness
from encdec.training.optimizer import make_optimizer
from encdec.training.run_config import RunConfig, divide_global_batch

log = logging.getLogger("encdec.train")
EVENT = "micro_batch_found"
HEADROOM = 0.05
"""Part of a device's memory that a try leaves free."""


@dataclass(frozen=True)
class Place:
    """What a size that was found holds for."""

    world_size: int
    memory_gb: int
    """Of the smallest device, whole GB of 10**9 bytes; of host memory, a rank's share of its node's."""


def settle_micro_batch(
    run: RunConfig,
    paths: RunPaths,
    attempt: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    make_twin: Callable[[], nn.Module],
) -> tuple[int, int]:
    """(micro-batch size, accumulation steps) for all ranks; collective.

    A number in the configuration stands. With ``auto``, what an earlier attempt found for as many ranks and as much
    memory is used again, so that a run that goes on computes what it would have; else it is found now, and recorded in
    the attempt's ledger.

    Args:
        device, dtype: of the computation.
        make_twin: a model like the run's, on the meta device; has ``transformer_layers()``.

    Raises:
        EncdecError: not even one sample fits, on some rank.
    """
    world = distributed.world_size()
    if run.config.training.per_device_train_batch_size != "auto":
        return run.micro_batches(world)
    place = Place(world, min(distributed.gather(memory_gb(device))))
    micro = distributed.on_rank_zero(lambda: recorded(paths, place))
    if micro is None:
        share, _ = run.micro_batches(world)
        with pretended_mesh(device) as mesh, kept_randomness():
            trial = Trial(run.config, device, dtype, make_twin, mesh, share)
            micro = min(distributed.together(trial.find))
        distributed.on_rank_zero(lambda: record(paths, attempt, place, micro))
        log.info("micro-batch of %d samples: the largest part of each rank's %d that fits", micro, share)
    else:
        log.info("micro-batch of %d samples, as an earlier attempt found", micro)
    return divide_global_batch(run.global_batch_size, micro, world)


def recorded(paths: RunPaths, place: Place) -> int | None:
    """The size that the newest attempt in such a place found; None if there was none."""
    wanted = {"event": EVENT, **asdict(place)}
    for number in reversed(paths.attempt_numbers()):
        for line in read_json_lines(paths.attempt(number).events("rank-0")):
            if wanted.items() <= line.items() and isinstance(line.get("size"), int):
                return line["size"]
    return None


def record(paths: RunPaths, attempt: int, place: Place, size: int) -> None:
    """One line in the attempt's ledger, before anything is computed with that size."""
    with JsonLinesWriter(paths.attempt(attempt).events("rank-0")) as ledger:
        ledger.write(event(EVENT, size=size, **asdict(place)))
        ledger.sync()


def divisors(number: int) -> Iterator[int]:
    """All of them, the largest first."""
    return (size for size in range(number, 0, -1) if number % size == 0)


# ---- one rank's trial


@dataclass(frozen=True)
class Trial:
    """What a try needs, on one rank."""

    config: FullConfig
    device: torch.device
    dtype: torch.dtype
    make_twin: Callable[[], nn.Module]
    mesh: DeviceMesh
    share: int
    """Samples of one step on this rank: micro-batches divide it."""

    def find(self) -> int:
        """The largest divisor of the share with which a step fits this rank's memory; no collective.

        Raises:
            EncdecError: one sample does not fit.
        """
        with held_back(self.device):
            return first_that_fits(divisors(self.share), self.step)

    def step(self, size: int) -> None:
        """One optimizer step with micro-batches of ``size`` on a new twin: a failed one leaves its twin unusable."""
        twin = self._twin()
        optimizer = make_optimizer(twin, self.config)
        for parameter in twin.parameters():  # a first update makes the optimizer's state
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        for last in [True] if size == self.share else [False, True]:
            assert isinstance(twin, FSDPModule)
            twin.set_requires_gradient_sync(last)
            twin(**self._batch(size), use_cache=False, num_items_in_batch=1.0).loss.backward()
        optimizer.step()

    def _twin(self) -> nn.Module:
        twin, infra = self.make_twin(), self.config.infra
        twin.train()
        shard(twin, twin.transformer_layers(), infra, self.dtype, self.mesh)  # type: ignore[operator]
        twin.to_empty(device="cpu" if infra.fsdp_cpu_offload else self.device)
        for parameter in twin.parameters():
            assert isinstance(parameter, DTensor)
            parameter.to_local().detach().zero_()  # memory as it is found can be slow to compute with
        for module in twin.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros_like(buffer, device=self.device))
        return twin

    def _batch(self, size: int) -> dict[str, Tensor]:
        """The longest sequences that there can be: [size, S_e] and [size, S_d]."""
        data = self.config.data
        inputs, labels = (
            torch.zeros(size, length, dtype=torch.int64, device=self.device)
            for length in (data.max_encoder_length, data.max_decoder_length)
        )
        return {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels}


@contextlib.contextmanager
def pretended_mesh(device: torch.device) -> Iterator[DeviceMesh]:
    """A mesh of all ranks whose collectives do nothing and wait for nobody; making it is collective.

    Raises:
        MissingPrerequisite: this torch has no such backend.
    """
    try:
        import torch.testing._internal.distributed.fake_pg
    except ImportError as error:
        raise MissingPrerequisite(
            "training.per_device_train_batch_size=auto needs torch's fake process group",
            found=f"torch {torch.__version__} without it ({error})",
            remedy="Give a number of samples instead of auto",
        ) from None
    group = dist.new_group(backend="fake")
    try:
        yield DeviceMesh.from_group(group, device.type, mesh_dim_names=("data",))
    finally:
        dist.destroy_process_group(group)


def memory_gb(device: torch.device) -> int:
    """Memory of a rank's device, or its share of the host's, whole GB of 10**9 bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory / GIGABYTE)
    return int(psutil.virtual_memory().total / ranks_here() / GIGABYTE)


def free_host_memory() -> int:
    """A rank's share of the host memory that is free now, bytes."""
    return psutil.virtual_memory().available // ranks_here()


def ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextlib.contextmanager
def held_back(device: torch.device) -> Iterator[None]:
    """Inside, HEADROOM of the device's memory cannot be had.

    A host hands out more memory than it has and then kills; so there this process gets a limit of its own for the time,
    at which its allocator says no.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        ballast: Any = torch.empty(int(HEADROOM * total), dtype=torch.uint8, device=device)
        yield
        del ballast
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = psutil.Process().memory_info().data + int((1 - HEADROOM) * free_host_memory())
    hardest = before[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hardest < 0 else min(limit, hardest), hardest))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
