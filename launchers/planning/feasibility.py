"""Whether a plan can work where it is to run, and which of its choices are bad. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from encdec.errors import ConfigError
from encdec.training.run_config import RunConfig
from launchers.launch_options import LaunchOptions, limit_seconds
from launchers.planning.forecast import Forecast
from launchers.planning.plan import Plan
from launchers.planning.slurm_limits import Limits, Partition, memory_bytes

SAFE_PART = 0.9
"""Of a GPU's memory, that an estimate may take: communication and fragmentation take some, too."""
ESTIMATE_AT_MOST_ABOVE = 1.2
"""What a rank needs is at least the estimate over this (tests/encdec/training/test_rank_memory.py)."""
MUCH_ETTR = 0.02
"""Loss of the share of time that trains, by an interval between saves, that is worth a word."""
MUCH_LOST_HOURS = 0.1
"""As much as it has to cost in all."""
LOW_ETTR = 0.8
MUCH_TIME = 1.5
"""Ratio of two mean times to interrupt that is worth a word."""
RULE = "Slurm must accept the job"
NOTHING_QUEUED = "Nothing is queued; {remedy}"


@dataclass(frozen=True)
class Finding:
    """A choice that is bad, or one that cannot work."""

    refuses: bool
    """Whether the run cannot work with it."""
    found: str
    remedy: str


def require_feasible(findings: Sequence[Finding]) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: naming all that cannot.
    """
    fatal = [finding for finding in findings if finding.refuses]
    if fatal:
        raise ConfigError(
            RULE,
            found="; ".join(finding.found for finding in fatal),
            remedy=NOTHING_QUEUED.format(remedy="; ".join(dict.fromkeys(finding.remedy for finding in fatal))),
        )


def bad_choices(
    run: RunConfig, plan: Plan, forecast: Forecast, options: LaunchOptions, *, memory_is_certain: bool
) -> list[Finding]:
    """What the forecast says against a run, wherever it runs.

    Args:
        memory_is_certain: whether the GPU's memory is named, not guessed from the name of a Slurm resource.
    """
    return [
        *memory_findings(forecast, certain=memory_is_certain),
        *saving_findings(run, plan, forecast),
        *time_findings(forecast, options),
    ]


def memory_findings(forecast: Forecast, *, certain: bool) -> Iterator[Finding]:
    """A rank's memory against its device's."""
    if forecast.memory_gb is None or forecast.device_memory_gb is None:
        return
    total, device = forecast.memory_gb["total_gb"], forecast.device_memory_gb
    if total > SAFE_PART * device:
        most = max((name for name in forecast.memory_gb if name != "total_gb"), key=lambda n: forecast.memory_gb[n])  # type: ignore[index]
        yield Finding(
            certain and forecast.device == "cuda" and total > ESTIMATE_AT_MOST_ABOVE * device,
            f"about {total:,.1f} GB a rank on a device of {device:,.1f} GB, most of it {most.removesuffix('_gb')}",
            "lower training.per_device_train_batch_size or the lengths, keep infra.fsdp_activation_checkpointing on, "
            "or take more ranks",
        )


def saving_findings(run: RunConfig, plan: Plan, forecast: Forecast) -> Iterator[Finding]:
    """How often it saves, against how often it is interrupted."""
    if plan.saves_between:
        configured = run.config.infra.mean_time_to_interrupt_hours
        ratio = forecast.mean_time_to_interrupt_hours / configured
        if not 1 / MUCH_TIME < ratio < MUCH_TIME and forecast.mean_time_to_interrupt_hours < float("inf"):
            yield Finding(
                False,
                f"training.save_every=auto reckons with {configured:g} h between interrupts, the cluster's failure "
                f"rate makes {forecast.mean_time_to_interrupt_hours:,.1f} h",
                f"set infra.mean_time_to_interrupt_hours={forecast.mean_time_to_interrupt_hours:.1f}",
            )
    elif forecast.step_seconds and lost_to_interval(forecast) > MUCH_ETTR:
        best = max(1, round((forecast.best_interval_seconds or 0) / forecast.step_seconds))
        yield Finding(
            False,
            f"a checkpoint every {plan.save_steps:,} steps is every {clock(forecast.save_interval_seconds)}, and "
            f"{forecast.ettr:.1%} of the time trains; the best interval gives {forecast.best_ettr:.1%}",
            f"set training.save_every=auto, or training.save_steps={best}",
        )
    if forecast.ettr is not None and max(forecast.ettr, forecast.best_ettr or 0) < LOW_ETTR:
        yield Finding(
            False,
            f"an interrupt every {forecast.mean_time_to_interrupt_hours:,.1f} h costs "
            f"{clock(forecast.recovery_seconds)} each: {forecast.ettr:.1%} of the time trains at most",
            "shorten the recovery (--continue-by successor), or take fewer nodes",
        )


def lost_to_interval(forecast: Forecast) -> float:
    """Share of the time that another interval between saves would win, 0 to 1; 0 where that is a matter of minutes."""
    if forecast.ettr is None or forecast.best_ettr is None or forecast.wall_hours is None:
        return 0.0
    share = forecast.best_ettr - forecast.ettr
    return share if share * forecast.wall_hours > MUCH_LOST_HOURS else 0.0


def time_findings(forecast: Forecast, options: LaunchOptions) -> Iterator[Finding]:
    """What time limits make of it."""
    if forecast.limit_hours is None:
        return
    limit = 3600 * forecast.limit_hours
    needed = forecast.startup_seconds + options.lead_seconds + (forecast.step_seconds or 0.0)
    if needed >= limit:
        yield Finding(
            False,
            f"a job of {clock(limit)} begins to train after about {clock(forecast.startup_seconds)} and is warned "
            f"{clock(options.lead_seconds)} before its end: no step is left",
            "give --time more",
        )
    if forecast.attempts and forecast.attempts > options.max_attempts:
        yield Finding(
            False,
            f"about {forecast.attempts:,} jobs of {clock(limit)}, and --max-attempts allows {options.max_attempts:,}",
            "raise --max-attempts or --time, or take more nodes",
        )


def refused_by(limits: Limits, plan: Plan, flags: Mapping[str, str | bool], *, cpus: int, gpus: int) -> list[Finding]:
    """What the cluster's limits do not allow.

    Args:
        flags: sbatch's, by long name.
        cpus, gpus: that the job asks for on each node.
    """
    partition = limits.partition
    asked = str(flags.get("partition", ""))
    if partition is None:
        if limits.partitions and asked and "," not in asked:
            names = ", ".join(each.name for each in limits.partitions)
            return [Finding(True, f"invalid partition: {asked}", f"there are {names}")]
        return []
    of_partition = [
        *partition_findings(partition, plan, flags),
        *node_findings(limits, plan, flags, cpus=cpus, gpus=gpus),
    ]
    if not limits.certain:  # the site, or the quality of service, may let it run all the same: sbatch knows
        of_partition = [replace(finding, refuses=False) for finding in of_partition]
    return [*of_partition, *qos_findings(limits, plan, flags, cpus=cpus, gpus=gpus)]


def asked_seconds(flags: Mapping[str, str | bool]) -> float | None:
    """--time in seconds; None where none is asked for."""
    return limit_seconds(str(flags["time"])) if "time" in flags else None


def partition_findings(partition: Partition, plan: Plan, flags: Mapping[str, str | bool]) -> Iterator[Finding]:
    """A partition's own limits."""
    if partition.state == "DOWN":
        yield Finding(False, f"partition {partition.name} is down", "the job waits until it is up; or choose another")
    elif partition.state != "UP":
        yield Finding(True, f"partition {partition.name} is {partition.state}", "choose another --partition")
    time, longest = asked_seconds(flags), partition.max_seconds
    if time is not None and longest is not None and time > longest:
        yield Finding(
            True,
            f"a time limit of {clock(time)}, and partition {partition.name} allows {clock(longest)}",
            f"give --time {int(longest // 60)} (minutes) or less: the run goes on in the next job",
        )
    most = min(partition.max_nodes or partition.total_nodes, partition.total_nodes)
    if plan.nodes > most:
        yield Finding(
            True, f"Node count {plan.nodes}, and partition {partition.name} allows {most}", f"give --nodes {most}"
        )
    for flag, allowed in (("qos", partition.allowed_qos), ("account", partition.allowed_accounts)):
        if allowed and flag in flags and str(flags[flag]).lower() not in {name.lower() for name in allowed}:
            yield Finding(
                True,
                f"--{flag} {flags[flag]}, and partition {partition.name} allows {', '.join(allowed)}",
                f"choose another --{flag} or --partition",
            )


def node_findings(
    limits: Limits, plan: Plan, flags: Mapping[str, str | bool], *, cpus: int, gpus: int
) -> Iterator[Finding]:
    """What each node is asked for, against the nodes there are."""
    nodes, partition = limits.nodes, limits.partition
    if not nodes or partition is None or plan.nodes > partition.total_nodes:
        return
    memory = memory_bytes(str(flags.get("mem", "")))
    wanted = ", ".join(
        [f"{cpus} CPUs", *([f"{gpus} GPUs"] if gpus else []), *([f"{flags['mem']} of memory"] if memory else [])]
    )
    able = [n for n in nodes if n.cpus >= cpus and n.gpus >= gpus and n.memory_bytes >= (memory or 0)]
    if len(able) < plan.nodes:
        best = f"{max(n.cpus for n in nodes)} CPUs, {max(n.gpus for n in nodes)} GPUs, " + (
            f"{max(n.memory_bytes for n in nodes) / 2**30:,.0f} GiB"
        )
        yield Finding(
            True,
            f"{plan.nodes} node(s) with {wanted} each, and partition {partition.name} has {len(able)} of them; its "
            f"largest have {best}",
            "lower --gpus-per-node, --cpus-per-task, --mem or --nodes, or choose another --partition",
        )
    elif sum(node.usable for node in able) < plan.nodes:
        yield Finding(
            False,
            f"{sum(node.usable for node in able)} of {len(able)} fitting nodes of partition {partition.name} can be "
            f"used now, and {plan.nodes} are asked for: the job waits until more are back (sinfo -R says why)",
            "take fewer nodes, or wait",
        )


def qos_findings(
    limits: Limits, plan: Plan, flags: Mapping[str, str | bool], *, cpus: int, gpus: int
) -> Iterator[Finding]:
    """Limits of the quality of service, where accounting enforces them."""
    asked = flags.get("qos")
    if asked and limits.known_qos is not None and str(asked).lower() not in limits.known_qos:
        yield Finding(True, f"invalid qos: {asked}", f"there are {', '.join(limits.known_qos)}")
    wanted = {"node": plan.nodes, "cpu": plan.nodes * cpus, "gres/gpu": plan.nodes * gpus}
    time = asked_seconds(flags)
    for qos in limits.qos:
        if time is not None and qos.max_seconds is not None and time > qos.max_seconds:
            yield Finding(
                True,
                f"a time limit of {clock(time)}, and QOS {qos.name} allows {clock(qos.max_seconds)}",
                f"give --time {int(qos.max_seconds // 60)} (minutes) or less: the run goes on in the next job",
            )
        for what, most in qos.max_resources.items():
            if wanted.get(what, 0) > most:
                yield Finding(
                    True,
                    f"{wanted[what]} of {what}, and QOS {qos.name} allows {most}",
                    "take fewer nodes or ranks, or another --qos",
                )


def job_limit_seconds(limits: Limits, flags: Mapping[str, str | bool]) -> float | None:
    """Time limit that a job with these flags gets; None: none, or not known."""
    partition = limits.partition
    asked = asked_seconds(flags)
    if asked is not None:
        return asked
    return (partition.default_seconds or partition.max_seconds) if partition else None


def clock(seconds: float | None) -> str:
    """Seconds in words: 12 s, 8.5 min, 3.2 h, 4.1 days."""
    if seconds is None:
        return "?"
    for unit, size, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < until:
            amount = seconds / size
            return f"{amount:.0f} {unit}" if amount >= 10 or amount == int(amount) else f"{amount:.1f} {unit}"
    return f"{seconds / 86_400:.1f} days"
