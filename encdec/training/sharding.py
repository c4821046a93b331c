"""Process group, device and precision of a rank, and the proof at its start that they are what was asked for."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from encdec.errors import MissingPrerequisite, ShardingError
from encdec.training.config import InfraConfig, TrainingConfig
from encdec.training.notifications import require_notifications
from encdec.training.rules import require_deepspeed

COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def require_ranks(infra: InfraConfig, expected_world_size: int | None = None) -> None:
    """Compare the launcher's environment with what was asked for, before anything is written or joined.

    Args:
        expected_world_size: ranks asked for in all, or None to expect ``infra.num_gpus`` on each node.

    Raises:
        ShardingError: the environment describes another number of ranks, or another engine.
        MissingPrerequisite: an engine or the means of notification are not there.
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
    require_engine(infra)
    if os.environ.get("RANK", "0") == "0":
        require_notifications(infra.notify_env, infra.notify_file)


def require_engine(infra: InfraConfig) -> None:
    """Refuse an engine that is not installed, or that the launcher's own file contradicts. Imports nothing.

    Raises:
        MissingPrerequisite: DeepSpeed is asked for and not there.
        ShardingError: ``accelerate launch`` was given the configuration of another engine.
    """
    environment = os.environ
    wanted = infra.distributed_type
    used = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
    told = [engine for engine, variable in used.items() if environment.get(variable, "").lower() == "true"]
    if told and wanted not in told:
        raise _not_the_launchers(f"{told[0]} from accelerate, infra.distributed_type={wanted}", wanted)
    if wanted != "deepspeed":
        return
    require_deepspeed()
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    if told and stage != "3":
        raise _not_the_launchers(f"ZeRO stage {stage} from accelerate, where this version honours stage 3", wanted)
    if file := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise _not_the_launchers(f"deepspeed_config_file {file} from accelerate, not infra.deepspeed_config", wanted)
    for name in ("OPTIMIZER", "PARAM"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE", "none")
        if device not in ("none", "cpu"):
            raise _not_the_launchers(f"offload to {device} from accelerate, where none or cpu will do", wanted)


def _not_the_launchers(found: str, wanted: str) -> ShardingError:
    config = {"fsdp": "accelerate_fsdp2.yaml", "deepspeed": "accelerate_deepspeed.yaml"}.get(wanted, "")
    return ShardingError(
        "Launcher and configuration must name the same engine",
        found=found,
        remedy=f"Start with --config_file configs/{config}",
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
