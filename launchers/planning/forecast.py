"""What a run will take: memory, FLOPs, hours, attempts, storage, and how much of its time trains. Pure.

What an earlier run has measured goes before what is assumed, and a forecast says which of the two it rests on.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from encdec.estimates import ModelSize, checkpoint_interval_seconds
from encdec.flops import ACCELERATORS, training_flops_per_sample
from encdec.reliability import expected_ettr, mean_time_to_interrupt, share_of_jobs
from encdec.training.model_sizes import model_size
from encdec.training.run_config import RunConfig
from launchers.launch_options import LaunchOptions
from launchers.planning.footprint import Storage, bytes_per_value, rank_memory, storage_of

HOUR = 3600.0
EXPECTED_MFU = 0.4
"""Model FLOPs utilization where nothing was measured: Llama 3 had 0.38 to 0.43 (arXiv:2407.21783, table 4)."""
STARTUP_SECONDS = 60.0
"""From a job's start to its first step where nothing was measured: imports and rendezvous on many nodes, loading."""
COPY_BYTES_PER_SECOND = 5e9
"""Of a rank's state from its GPU to the host's memory, for which training stands still; assumed."""
WRITE_BYTES_PER_SECOND = 1e9
"""Of one node to shared storage, digests included; assumed."""
DETECTION_SECONDS = 300.0
"""Until Slurm takes a node that does not answer for lost: SlurmdTimeout's default (slurm.conf(5))."""
HOLD_OFF_SECONDS = 121.0
"""For which Slurm holds a requeued job back by default; a successor is not held back."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an earlier run of the same model on the same device measured."""

    source: str
    """Name of that run."""
    steps: int
    """Counted."""
    step_seconds: float
    """Median of a step, what lies between two steps included."""
    flops_per_second: float
    """Of one rank, within steps."""
    startup_seconds: float | None
    """From the attempt's process to its first step; None: not known, as the next ones."""
    pause_seconds: float
    """For an evaluation or a save between two steps."""
    finish_seconds: float | None
    """From the last step to the attempt's end: last save, verification, gate, average."""
    blocking_seconds: float | None
    """For which a save blocked training."""
    save_seconds: float | None
    """Of a save until its commit."""
    tokens_per_step: int
    ranks: int
    nodes: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run runs, as far as a forecast needs it."""

    on_slurm: bool
    gpu: str | None = None
    """A key of ACCELERATORS; None: not known, or no GPU."""
    gpu_memory_gb: float | None = None
    """Of one GPU, or of one rank's share of this machine; None: not known."""
    expected_mfu: float = EXPECTED_MFU
    """Where nothing was measured."""
    failures_per_thousand_node_days: float | None = None
    """None: ``infra.mean_time_to_interrupt_hours`` of the run."""
    limit_seconds: float | None = None
    """Time limit of one job; None: none, or not known."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take. Part of ``plan.json``; None: not known."""

    parameters: int | None
    """Of the model; None: its sizes are not known here, nor then what follows from them."""
    active_parameters: int | None
    """Of them, those that a token meets: with experts, those that it passes."""
    trained_parameters: int | None
    """Of them, those that are not frozen beside low-rank adapters."""
    device: str
    gpu: str | None
    bytes_per_value: int
    activation_checkpointing: bool
    sharding: str
    memory_gb: dict[str, float] | None
    """Of one rank, GB of 10**9 bytes, by part (``encdec.estimates.estimate_rank_memory``)."""
    device_memory_gb: float | None
    flops_per_step: float | None
    """All ranks, padding not counted."""
    total_flops: float | None
    basis: str
    """What the hours rest on, in words."""
    step_seconds: float | None
    tokens_per_second: float | None
    """Raw tokens, all ranks."""
    mfu: float | None
    """Model FLOPs utilization that this is; None without a GPU that is known."""
    training_hours: float | None
    """From the first process to the end in one job that nothing interrupts."""
    wall_hours: float | None
    """Expected, with interrupts and time limits; waiting in a queue not counted."""
    gpu_hours: float | None
    """``wall_hours`` of all ranks."""
    limit_hours: float | None
    """Time limit of one job."""
    attempts: int | None
    """Jobs' starts that the time limit makes of it; interrupts come on top."""
    interrupts: float | None
    """Expected while it runs."""
    mean_time_to_interrupt_hours: float
    mean_time_from: str
    """Where that comes from."""
    startup_seconds: float
    recovery_seconds: float
    """From an interrupt to the next step."""
    blocking_seconds: float | None
    """For which a checkpoint stops training."""
    save_seconds: float | None
    """Until a checkpoint is one."""
    save_interval_seconds: float | None
    """Between the checkpoints of this configuration."""
    best_interval_seconds: float | None
    """That loses the least (Daly)."""
    ettr: float | None
    """Expected share of the wall time that trains, 0 to 1, waiting in a queue not counted."""
    best_ettr: float | None
    """The same at ``best_interval_seconds``."""
    storage: Storage | None
    start_estimate: str | None = None
    """When Slurm would start it, by sbatch --test-only; local time."""


def foresee(
    run: RunConfig, place: Place, options: LaunchOptions, *, sharding: str, measured: Measured | None = None
) -> Forecast:
    """The forecast of a run.

    Args:
        place: where it runs.
        options: how it is continued.
        sharding: the engine in words.
        measured: by an earlier run.
    """
    size, infra = model_size(run.config.model), run.config.infra
    flops = flops_per_step(run, size) if size else None
    step, basis = step_seconds(run, flops, place, measured)
    memory = rank_memory(run, size) if size else None
    saving = save_costs(run, size, measured)
    startup = measured.startup_seconds if measured and measured.startup_seconds is not None else STARTUP_SECONDS
    recovery = startup
    if place.on_slurm:
        recovery += DETECTION_SECONDS + (HOLD_OFF_SECONDS if options.continue_by == "requeue" else 0.0)
    mean, mean_from = mean_time(run, place)
    best = checkpoint_interval_seconds(*saving, mean) if saving and math.isfinite(mean) else None
    interval = between_saves(run, step, best)
    ettrs = [
        expected_ettr(
            each, mean, blocking_seconds=saving[0], recovery_seconds=recovery, commit_seconds=saving[1] - saving[0]
        )
        if each and saving
        else None
        for each in (interval, best)
    ]
    undisturbed = whole_seconds(run, step, startup, saving, measured)
    limit = place.limit_seconds if place.limit_seconds and math.isfinite(place.limit_seconds) else None
    stop = 2 * saving[1] if saving else 0.0
    one_job = undisturbed is not None and limit is not None and undisturbed <= limit
    left = share_of_jobs(math.inf if one_job or not limit else limit, startup_seconds=startup, stop_seconds=stop)
    wall = stretched(undisturbed, ettrs[0], interval, saving[0] if saving else 0.0, left)
    ettr, best_ettr = (each * left if each is not None else None for each in ettrs)
    achieved = flops / step / run.world_size if flops and step else None
    return Forecast(
        parameters=size.parameters if size else None,
        active_parameters=size.active if size else None,
        trained_parameters=size.trained if size else None,
        device=infra.device,
        gpu=place.gpu,
        bytes_per_value=bytes_per_value(run),
        activation_checkpointing=infra.fsdp_activation_checkpointing,
        sharding=sharding,
        memory_gb=memory,
        device_memory_gb=place.gpu_memory_gb,
        flops_per_step=flops,
        total_flops=flops * run.num_train_steps if flops else None,
        basis=basis,
        step_seconds=step,
        tokens_per_second=run.tokens_per_step / step if step else None,
        mfu=achieved / ACCELERATORS[place.gpu].bf16_flops if achieved and place.gpu else None,
        training_hours=undisturbed / HOUR if undisturbed else None,
        wall_hours=wall / HOUR if wall else None,
        gpu_hours=wall * run.world_size / HOUR if wall else None,
        limit_hours=limit / HOUR if limit else None,
        attempts=max(1, math.ceil(wall / limit)) if wall and limit else 1 if wall else None,
        interrupts=wall / mean if wall else None,
        mean_time_to_interrupt_hours=mean / HOUR,
        mean_time_from=mean_from,
        startup_seconds=startup,
        recovery_seconds=recovery,
        blocking_seconds=saving[0] if saving else None,
        save_seconds=saving[1] if saving else None,
        save_interval_seconds=interval,
        best_interval_seconds=best,
        ettr=ettr,
        best_ettr=best_ettr,
        storage=storage_of(run, size) if size else None,
    )


def flops_per_step(run: RunConfig, size: ModelSize) -> float:
    """Of all ranks."""
    model, data = run.config.model, run.config.data
    each = training_flops_per_sample(size, run.sample_length, model.num_sentinel_tokens, data.ul2_task_weights)
    return run.global_batch_size * each


def step_seconds(
    run: RunConfig, flops: float | None, place: Place, measured: Measured | None
) -> tuple[float | None, str]:
    """(seconds of a step, what that rests on)."""
    if measured:
        if run.tokens_per_step == measured.tokens_per_step and run.world_size == measured.ranks:
            seconds = measured.step_seconds
        elif flops:
            seconds = flops / (measured.flops_per_second * run.world_size)
        else:
            seconds = measured.step_seconds * run.tokens_per_step / measured.tokens_per_step
        elsewhere = run.world_size != measured.ranks  # where start and pauses may take another time
        ranks = f" on {measured.ranks:,} ranks, for {run.world_size:,}" if elsewhere else ""
        return seconds, f"measured by {measured.source}, {measured.steps:,} steps{ranks}"
    if flops and place.gpu:
        rate = place.expected_mfu * ACCELERATORS[place.gpu].bf16_flops
        return flops / (rate * run.world_size), f"assumed: {place.expected_mfu:.0%} of {place.gpu}'s peak"
    lacks = "the model's sizes are not known here" if not flops else "no run of this model has been measured here"
    if run.config.infra.device == "cuda" and flops:
        lacks += ", and the cluster's file names no gpu"
    return None, lacks


def save_costs(run: RunConfig, size: ModelSize | None, measured: Measured | None) -> tuple[float, float] | None:
    """(seconds for which a checkpoint blocks training, seconds until it is one); None: not known.

    What was measured on another number of nodes is scaled by the bytes that each writes, and what blocks while a rank
    copies its state by the bytes of a rank: the model is the same, and so are the bytes of all.
    """
    if measured and measured.blocking_seconds is not None and measured.save_seconds is not None:
        by_node, by_rank = measured.nodes / run.nodes, measured.ranks / run.world_size
        blocking = measured.blocking_seconds * (by_rank if run.config.training.async_save else by_node)
        return blocking, max(blocking, measured.save_seconds * by_node)
    if size is None:
        return None
    nbytes = size.checkpoint_bytes(run.config.training.optimizer)
    total = nbytes / (run.nodes * WRITE_BYTES_PER_SECOND)
    blocking = nbytes / run.world_size / COPY_BYTES_PER_SECOND if run.config.training.async_save else total
    return blocking, max(blocking, total)


def mean_time(run: RunConfig, place: Place) -> tuple[float, str]:
    """(seconds between interrupts of the whole job, where that comes from)."""
    rate = place.failures_per_thousand_node_days
    if rate is not None:
        return mean_time_to_interrupt(run.nodes, rate), f"{rate:g} failures per 1,000 node-days on {run.nodes} nodes"
    return HOUR * run.config.infra.mean_time_to_interrupt_hours, "infra.mean_time_to_interrupt_hours"


def between_saves(run: RunConfig, step: float | None, best: float | None) -> float | None:
    """Seconds between the checkpoints that the configuration asks for; None: a step's time is not known."""
    training = run.config.training
    by_steps = min(training.save_steps, run.num_train_steps) * step if step else None
    if training.save_every == "auto" and best:
        return min(by_steps, best) if by_steps else best
    return by_steps


def whole_seconds(
    run: RunConfig, step: float | None, startup: float, saving: tuple[float, float] | None, measured: Measured | None
) -> float | None:
    """Of a run that nothing interrupts, from its process to its end; None: a step's time is not known."""
    if step is None:
        return None
    training, last = run.config.training, run.num_train_steps - 1
    saves, evaluations = last // training.save_steps, last // training.eval_steps
    if measured:  # whose pauses are for an evaluation, and most for a save with it
        both = last // math.lcm(training.save_steps, training.eval_steps)
        pauses = (saves + evaluations - both) * measured.pause_seconds
        finish = measured.finish_seconds or 0.0
    else:
        pauses = saves * saving[0] if saving else 0.0
        finish = 2 * saving[1] if saving else 0.0  # written, and read back
    return startup + run.num_train_steps * step + pauses + finish


def stretched(
    undisturbed: float | None, ettr: float | None, interval: float | None, blocking: float, left: float
) -> float | None:
    """Expected seconds of a run with interrupts and time limits; None: not known, or it makes no progress.

    Args:
        undisturbed: its seconds without either; its saves are in it already.
        ettr: with interrupts.
        interval, blocking: seconds between two saves, and for which one blocks training.
        left: share of its time that the limits leave.
    """
    if undisturbed is None or ettr is None or interval is None:
        return undisturbed
    share = ettr * (interval + blocking) / interval * left
    return undisturbed / share if share else None


def to_mapping(forecast: Forecast) -> dict[str, Any]:
    """Plain values, as ``plan.json`` has them: what is infinite is not known to JSON, and None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(forecast).items()
    }
