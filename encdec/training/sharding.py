"""Process group and FSDP2, and the proof at start-up that both are what was asked for.

Launchers can lose the sharding without a word: ``accelerate launch --cpu`` collapses to one process, and Accelerate's
own FSDP turns into plain data parallelism on CPU. So the sharding is done here, by ``fully_shard``, then looked at.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from encdec.errors import MissingPrerequisite, ShardingError
from encdec.training.config import InfraConfig, TrainingConfig

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def require_ranks(infra: InfraConfig, expected_world_size: int | None = None) -> None:
    """Compare the launcher's environment with what was asked for, before anything is written or joined.

    Args:
        expected_world_size: ranks asked for in all, or None to expect ``infra.num_gpus`` on each node.

    Raises:
        ShardingError: the environment describes another number of ranks, or another engine.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    wanted = expected_world_size or world // local_world * infra.num_gpus
    if world != wanted or world % local_world:
        raise ShardingError(
            f"The process group must have the {wanted} ranks that the configuration asks for",
            found=f"{world} ({local_world} on this node, infra.num_gpus is {infra.num_gpus})",
            remedy=f"Start it with torchrun --nproc-per-node {infra.num_gpus}, or set infra.num_gpus={local_world}; "
            "accelerate launch --cpu collapses to one process, leave --cpu out",
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise ShardingError(
            "Launcher and configuration must name the same engine",
            found=f"DeepSpeed from accelerate, infra.distributed_type={infra.distributed_type}",
            remedy="Start with --config_file configs/accelerate_fsdp2.yaml",
        )


def open_store() -> dist.TCPStore | None:
    """Rank 0 listens from its first moment, where no launcher keeps the store; ``start_process_group`` shares it.

    A rank that finds nobody listening waits about a second before it tries again.
    """
    environment = os.environ
    if environment.get("RANK") != "0" or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    return dist.TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        int(environment["WORLD_SIZE"]),
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
    )


def start_process_group(infra: InfraConfig) -> torch.device:
    """Join the process group that the launcher's environment describes; returns this rank's device.

    Raises:
        MissingPrerequisite: infra.device is cuda and this rank has no GPU.
    """
    device = _own_device(infra)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(
            f"cpu:gloo,cuda:{backend}" if device.type == "cuda" else backend, timeout=COLLECTIVE_TIMEOUT
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    return device


def _own_device(infra: InfraConfig) -> torch.device:
    if infra.device == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.device_count() <= local_rank:
        raise MissingPrerequisite(
            "infra.device=cuda needs one GPU a rank",
            found=f"{torch.cuda.device_count()} GPUs on this node for local rank {local_rank}",
            remedy="Lower infra.num_gpus, or use configs/tiny.yaml, which needs no GPU",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def use_even_threads() -> None:
    """Share the processor cores evenly among the node's ranks, whatever OMP_NUM_THREADS a launcher chose.

    Slurm may allot fewer cores than it binds a task to; more threads than cores would spin against each other.
    """
    cores = len(os.sched_getaffinity(0))
    cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def compute_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where asked for and where the hardware has it, else float32 with a warning."""
    if not training.bf16:
        return torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    warnings.warn(f"training.bf16: {device.type} here has no fast bfloat16, computing in float32", stacklevel=2)
    return torch.float32


def shard(model: nn.Module, layers: Iterable[nn.Module], infra: InfraConfig, dtype: torch.dtype) -> DeviceMesh:
    """FSDP2 over all ranks: each transformer layer is a group, the rest (embedding, final norms) belongs to the root.

    Master weights and reductions are fp32; ``dtype`` is that of the computation.
    """
    mesh = init_device_mesh(infra.device, (dist.get_world_size(),), mesh_dim_names=("data",))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if infra.fsdp_cpu_offload else OffloadPolicy()
    free_after_forward = infra.fsdp_sharding_strategy == "FULL_SHARD"
    for layer in layers:
        fully_shard(
            layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=free_after_forward
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=free_after_forward)
    return mesh


def prove_sharding(model: nn.Module, world_size: int) -> str:
    """Look at every parameter's placement; returns one line that says what was found.

    Raises:
        ShardingError: a parameter is not split over all ranks.
    """
    local = total = 0
    for name, parameter in model.named_parameters():
        tensor = parameter.data
        if (
            not isinstance(tensor, DTensor)
            or tensor.placements != (Shard(0),)
            or tensor.device_mesh.size() != world_size
        ):
            raise ShardingError(
                f"Every parameter must be split over all {world_size} ranks",
                found=f"{name}: {getattr(tensor, 'placements', 'a plain tensor')}",
                remedy="Let encdec.train shard the model itself; start it with torchrun or accelerate launch",
            )
        local += tensor.to_local().numel()
        total += parameter.numel()
    return f"FSDP2 over {world_size} ranks: {total:,} parameters, {local:,} on this rank"
