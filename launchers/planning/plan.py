"""RunConfig + where it runs -> Plan: everything the dry run prints. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from encdec.training.run_config import RunConfig
from launchers.planning.forecast import Forecast, to_mapping


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was decided, and why. Written as ``plan.json``."""

    name: str
    phase: str
    description: str
    run_dir: str
    cluster: str
    """local | slurm"""
    why_cluster: str
    nodes: int
    ranks_per_node: int
    device: str
    sharding: str
    micro_batch_size: int
    """Samples; the most that may be tried where the ranks find it themselves."""
    micro_batch_found: bool
    """Whether the ranks find the largest micro-batch that fits (``training.per_device_train_batch_size: auto``)."""
    gradient_accumulation_steps: int
    global_batch_size: int
    sample_length: int
    """Raw tokens per sample."""
    tokens_per_step: int
    steps_by_table: int
    """Optimizer steps that the phase's steps allow."""
    steps_by_tokens: int
    """Optimizer steps that the phase's tokens feed."""
    num_train_steps: int
    """The smaller of the two."""
    bound_by: str
    warmup_steps: int
    tokens: int
    """Raw tokens of the whole phase."""
    learning_rate: float
    save_steps: int
    saves_between: bool
    """Whether the clock asks for checkpoints between these steps, too (``training.save_every: auto``)."""
    eval_steps: int
    checkpoints: int
    """Checkpoints of ``save_steps`` that the phase writes, the last one included."""
    max_loss_after_warmup: float
    min_loss_decrease: float
    gates: list[str]
    """Judged while the phase trains: levels, then the names of one's own."""
    text: str
    weights: str
    identity: str
    forecast: Forecast | None = None
    """What it will take; None: nobody has looked."""
    warnings: tuple[str, ...] = ()
    """Choices that are bad where it is to run, and what to do."""

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self) | {"forecast": to_mapping(self.forecast) if self.forecast else None}

    def with_forecast(self, forecast: Forecast, warnings: Sequence[str]) -> Plan:
        return replace(self, forecast=forecast, warnings=tuple(warnings))


def sharding_of(run: RunConfig) -> str:
    """The engine in words."""
    infra = run.config.infra
    name = "ZeRO-3" if infra.distributed_type == "deepspeed" else f"FSDP2 {infra.fsdp_sharding_strategy}"
    return f"{name}, offloaded to host memory" if infra.fsdp_cpu_offload else name


def weights_of(run: RunConfig) -> str:
    """What the run begins with, in words."""
    start, model = run.starts_from, run.config.model
    if start is None:
        return "random initial weights" if model.from_scratch else f"both stacks from {model.model_name_or_path}"
    if start.kind == "gate":
        return f"those that pass the gate of {start.source}"
    what = "all that training continues from in " if start.kind == "checkpoint" else ""
    return f"{what}{start.source}, unproved: no gate is asked for"


def make_plan(run: RunConfig, *, run_dir: str, cluster: str, why_cluster: str) -> Plan:
    """Everything the launcher and its user need to know before anything is written.

    Raises:
        ConfigError: the global batch cannot be cut evenly over the ranks.
    """
    micro, accumulation = run.micro_batches(run.world_size)
    training, phase = run.config.training, run.phase
    assert phase is not None, "the launcher runs phases"
    return Plan(
        name=run.name,
        phase=str(phase.phase),
        description=phase.description,
        run_dir=run_dir,
        cluster=cluster,
        why_cluster=why_cluster,
        nodes=run.nodes,
        ranks_per_node=run.ranks_per_node,
        device=run.config.infra.device,
        sharding=sharding_of(run),
        micro_batch_size=micro,
        micro_batch_found=training.per_device_train_batch_size == "auto",
        gradient_accumulation_steps=accumulation,
        global_batch_size=run.global_batch_size,
        sample_length=run.sample_length,
        tokens_per_step=run.tokens_per_step,
        steps_by_table=training.num_train_steps,
        steps_by_tokens=phase.num_tokens // run.tokens_per_step,
        num_train_steps=run.num_train_steps,
        bound_by=run.bound_by,
        warmup_steps=run.warmup_steps,
        tokens=run.num_train_steps * run.tokens_per_step,
        learning_rate=training.learning_rate,
        save_steps=training.save_steps,
        saves_between=training.save_every == "auto",
        eval_steps=training.eval_steps,
        checkpoints=-(-run.num_train_steps // training.save_steps),
        max_loss_after_warmup=phase.max_loss_after_warmup,
        min_loss_decrease=phase.min_loss_decrease,
        gates=[*map(str, phase.gates), *(gate.name for gate in phase.custom_gates)],
        text=run.config.data.dataset_name,
        weights=weights_of(run),
        identity=run.identity,
    )
