"""ZeRO-3: DeepSpeed's partitioned engine, set up through Accelerate.

DeepSpeed would also accumulate, clip, average and schedule by itself. Here the trainer does that, the same way for both
engines: DeepSpeed's own clipping is switched off, and the gradients are scaled in place before its optimizer runs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from encdec import distributed
from encdec.checkpoints.stored import persistent_buffers
from encdec.errors import ShardingError
from encdec.initialization.streams import Stream, is_empty, move_buffers, trim_heap
from encdec.training.config import FullConfig
from encdec.training.deepspeed_config import engine_config
from encdec.training.optimizer import make_optimizer

log = logging.getLogger("encdec.train")


class ZeroEngine:
    """A model partitioned by DeepSpeed, parameters, gradients and optimizer state alike.

    Args:
        model: fp32; partitioned in place. Whole, on ``device``, or with its parameters on the meta device.
        dtype: of the computation; DeepSpeed keeps fp32 master weights beside it, and reduces in fp32.
        micro_batch_size: samples.
        stream: values of parameters that are on the meta device; None leaves them at zero.
    """

    payload = "zero3"

    def __init__(
        self,
        model: nn.Module,
        config: FullConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch_size: int,
        accumulation_steps: int,
        stream: Stream | None = None,
    ) -> None:
        settings = engine_config(
            config, os.environ, micro_batch_size=micro_batch_size, accumulation_steps=accumulation_steps,
            world_size=distributed.world_size(), bf16=dtype == torch.bfloat16,
        )  # fmt: skip
        empty = is_empty(model)
        if empty:
            move_buffers(model, device)  # DeepSpeed moves no model that is partitioned already
        with kept_buffers(model), quiet_deepspeed(device):
            if empty:
                _fill_partitions(model, stream, settings, dtype)
            self.module = _initialize(model, make_optimizer(model, config), settings, device)
        self.optimizer = self.module.optimizer
        self.averaged_over = distributed.world_size()
        self._clear_padding()

    def set_sync(self, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def local_gradients(self) -> list[Tensor]:
        if self.optimizer.offload_optimizer:
            return [flat.grad for flat in self.optimizer.fp32_partitioned_groups_flat]
        return [part for parts in self.optimizer.averaged_gradients.values() for part in parts]

    def update(self) -> None:
        self.module.step()

    def end_evaluation(self) -> None:
        """DeepSpeed gives whole parameters up after each forward pass."""

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # its next backward pass overwrites instead of adding
        if self.optimizer.offload_optimizer:
            self.optimizer.reset_cpu_buffers()
        else:
            self.optimizer.averaged_gradients = {}

    def local_state(self) -> list[Tensor]:
        states = [value for state in self.optimizer.optimizer.state.values() for value in state.values()]
        return [flat.data for flat in [*self.optimizer.fp32_partitioned_groups_flat, *filter(torch.is_tensor, states)]]

    def prove_sharding(self, world_size: int) -> str:
        stage, partitions = self.module.zero_optimization_stage(), self.optimizer.partition_count
        if stage != 3 or partitions != world_size:
            raise _not_split(world_size, f"ZeRO stage {stage} over {partitions} ranks")
        local = total = 0
        for name, parameter in self.module.module.named_parameters():
            part = getattr(parameter, "ds_tensor", None)
            if part is None or part.numel() != math.ceil(parameter.ds_numel / world_size):
                raise _not_split(world_size, f"{name}: {'a whole tensor' if part is None else part.numel()}")
            if parameter.data.numel() and not parameter.ds_persist and world_size > 1:
                raise _not_split(world_size, f"{name}: {parameter.data.numel()} elements held beside its part")
            local += part.numel()
            total += parameter.ds_numel
        return f"ZeRO-3 over {world_size} ranks: {total:,} parameters, {local:,} on this rank"

    def _clear_padding(self) -> None:
        """Parts are padded to one length with memory as it was found: not always numbers, never ones to be saved."""
        for group, flat in zip(self.optimizer.fp16_groups, self.optimizer.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for parameter in group:
                length = parameter.partition_numel()
                real = min(max(parameter.ds_numel - distributed.rank() * length, 0), length)
                flat.data[offset + real : offset + length].zero_()
                parameter.ds_tensor.data[real:].zero_()
                offset += length


def _not_split(world_size: int, found: str) -> ShardingError:
    return ShardingError(
        f"Every parameter must be partitioned over all {world_size} ranks by ZeRO-3",
        found=found,
        remedy="Let encdec.train start DeepSpeed itself; start it with torchrun or accelerate launch",
    )


@torch.no_grad()
def _fill_partitions(model: nn.Module, stream: Stream | None, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Replace each parameter on the meta device by its partition; one whole parameter at a time is in memory.

    DeepSpeed sends every rank the first one's values, so the others read none.
    """
    import deepspeed

    _name_place()
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)  # around torch's own
    partition = deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype)
    owners = {f"{prefix}.{name}" if prefix else name: (module, name)
              for prefix, module in model.named_modules() for name in module._parameters}  # fmt: skip
    buffers = dict(persistent_buffers(model))
    for name, read in stream if stream is not None else _zeros(model):
        if name in buffers:
            buffers[name].copy_(read(None))
            continue
        module, own_name = owners.pop(name)
        described = module._parameters[own_name]
        assert described is not None
        first = distributed.rank() == 0
        values = read(None).to(dtype).contiguous() if first else torch.empty(described.shape, dtype=dtype)
        module._parameters[own_name] = nn.Parameter(values, requires_grad=described.requires_grad)
        del values
        partition._convert_to_zero_parameters([module._parameters[own_name]])
        trim_heap()  # each partition would end a hole in which the next whole parameter has no room
    unfilled = [name for name, (module, own_name) in owners.items() if module._parameters[own_name] is not None]
    if unfilled:
        raise ValueError(f"no values for {', '.join(unfilled[:3])}, {len(unfilled)} in all")


def _zeros(model: nn.Module) -> Stream:
    for name, parameter in model.named_parameters():
        yield name, lambda piece, shape=parameter.shape: torch.zeros(shape)  # type: ignore[misc]


def _name_place() -> None:
    """What DeepSpeed looks for in the environment, also in one process without a launcher."""
    place = {"RANK": distributed.rank(), "WORLD_SIZE": distributed.world_size(), "LOCAL_RANK": 0}
    for name, value in place.items():
        os.environ.setdefault(name, str(value))


def _initialize(model: nn.Module, optimizer: Optimizer, settings: dict[str, Any], device: torch.device) -> Any:
    """DeepSpeed's engine as Accelerate makes it, whatever launcher's variables it finds."""
    _name_place()
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else Accelerate chooses another number
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # engine_config has heeded the launcher's fields; Accelerate would refuse them beside a whole configuration
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    from accelerate import Accelerator, DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
    with gloo_is_a_backend(device):
        accelerator = Accelerator(
            mixed_precision="bf16" if settings["bf16"]["enabled"] else "no",
            gradient_accumulation_steps=settings["gradient_accumulation_steps"],
            deepspeed_plugin=plugin,
        )
    engine, _ = accelerator.prepare(model, optimizer)
    return engine


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers keep their values: DeepSpeed rounds all of a model to bf16, its rotary frequencies among it."""
    kept = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    yield
    for module, name, buffer in kept:
        module._buffers[name] = buffer.to(getattr(module, name).device)


@contextlib.contextmanager
def quiet_deepspeed(device: torch.device) -> Iterator[None]:
    """DeepSpeed imported for ``device``, without what it says about itself or compiles for others.

    On CPU it would build an extension at the first start (half a minute, a C++ compiler, a lock that a killed rank
    leaves behind) for a collective that only tensor-parallel inference calls.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    yield


@contextlib.contextmanager
def gloo_is_a_backend(device: torch.device) -> Iterator[None]:
    """On CPU Accelerate takes a launched rank for a process of its own, unless it is told of gloo."""
    from accelerate.state import DistributedType, PartialState

    original = PartialState._prepare_backend
    if device.type == "cpu":
        PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_CPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = original
