"""Gathers what a forecast needs to know: the cluster's limits, its GPUs, earlier runs. Refuses what cannot work."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace

from encdec.files import RunPaths
from encdec.flops import ACCELERATORS, accelerator_in
from encdec.training.run_config import RunConfig
from launchers.cluster_file import ClusterFile
from launchers.launch_options import launch_options
from launchers.names import find_run
from launchers.planning.calibration import EarlierRuns, calibrate_from
from launchers.planning.feasibility import Finding, bad_choices, job_limit_seconds, refused_by, require_feasible
from launchers.planning.forecast import Place, foresee
from launchers.planning.plan import Plan
from launchers.planning.slurm_limits import Limits, ask_start, read_limits
from launchers.preflight.needs import device_memory_gb, device_name
from launchers.remote import job_request
from launchers.run_directory import ROOT
from launchers.script import gpu_flag, sbatch_text

WAITS = "no node can start it as things are, and the job waits until that changes (sinfo -R says why nodes are out)"
CORRECT_THE_FLAG = (
    "correct the flag it names (sinfo shows partitions, limits, nodes and GPUs), and give the command again"
)


@dataclass(frozen=True)
class Outlook:
    """A plan with its forecast."""

    plan: Plan
    findings: list[Finding]
    script: str | None
    """What sbatch would get; None on this machine."""


@dataclass(frozen=True)
class Prospect:
    """A run to look ahead for."""

    paths: RunPaths
    run: RunConfig
    plan: Plan
    new: bool
    """Whether this command queues it for the first time: what has begun is followed or continued, and sbatch alone
    has the word about it."""


def foreseen(prospects: Sequence[Prospect], arguments: Namespace, *, inside_job: bool = False) -> list[Outlook]:
    """Each run's plan with its forecast; nothing is written or queued.

    Args:
        inside_job: the runs belong to the job that this is: Slurm is asked nothing, nothing is refused.

    Raises:
        ConfigError: a new one cannot work where it is to run; or --calibrate-from names no run that fits.
        RunDirectoryError: --calibrate-from gives a path of something else.
    """
    on_slurm = prospects[0].plan.cluster == "slurm"
    limits = read_limits(arguments.sbatch) if on_slurm and not inside_job else Limits()
    earlier = EarlierRuns([ROOT, prospects[0].paths.root.parent])
    outlooks = [look_ahead(prospect, arguments, limits, earlier) for prospect in prospects]
    news = [] if inside_job else [number for number, prospect in enumerate(prospects) if prospect.new]
    require_feasible([finding for number in news for finding in outlooks[number].findings])
    if on_slurm and news:
        outlooks[news[0]] = with_start(outlooks[news[0]])
    return outlooks


def look_ahead(prospect: Prospect, arguments: Namespace, limits: Limits, earlier: EarlierRuns) -> Outlook:
    """The outlook of one run."""
    paths, run, plan = prospect.paths, prospect.run, prospect.plan
    options = launch_options(paths, arguments)
    request = job_request(paths, run, arguments, options) if plan.cluster == "slurm" else None
    place = place_of(run, plan, arguments, limits)
    bare = plan.with_forecast(foresee(run, place, options, sharding=plan.sharding), ())
    named, known = getattr(arguments, "calibrate_from", None), bare.to_mapping()
    measured = calibrate_from(known, find_run(named, ROOT)) if named else earlier.calibrate(known)
    forecast = foresee(run, place, options, sharding=plan.sharding, measured=measured)
    findings = bad_choices(run, plan, forecast, options, memory_is_certain=memory_is_named(arguments.cluster_file))
    if request:
        gpus = run.ranks_per_node if gpu_flag(request) else 0
        findings += refused_by(limits, plan, request.flags, cpus=request.cpus, gpus=gpus)
    warnings = [f"{finding.found}: {finding.remedy}" for finding in findings if not finding.refuses]
    return Outlook(plan.with_forecast(forecast, warnings), findings, sbatch_text(request) if request else None)


def with_start(outlook: Outlook) -> Outlook:
    """With the time at which Slurm would start the job, or a warning that it could not start it as things are.

    Raises:
        ConfigError: Slurm would refuse it.
    """
    assert outlook.script is not None and outlook.plan.forecast is not None
    test = ask_start(outlook.script)
    if test.passes:
        return replace(
            outlook, plan=replace(outlook.plan, warnings=(*outlook.plan.warnings, f"{test.problem}: {WAITS}"))
        )
    if test.problem:
        require_feasible([Finding(True, test.problem, CORRECT_THE_FLAG)])
    return replace(
        outlook, plan=replace(outlook.plan, forecast=replace(outlook.plan.forecast, start_estimate=test.start))
    )


def place_of(run: RunConfig, plan: Plan, arguments: Namespace, limits: Limits) -> Place:
    """Where a run runs, as far as it is known from here."""
    cluster: ClusterFile = arguments.cluster_file
    slurm = plan.cluster == "slurm"
    gpu = gpu_kind(run, cluster, limits) if slurm else accelerator_in(device_name(run))
    if slurm:
        named = cluster.gpu_memory_gb or (ACCELERATORS[gpu].memory_gb if gpu else None)
        memory = named if run.config.infra.device == "cuda" else None
    else:
        memory = device_memory_gb(run)
    return Place(
        on_slurm=slurm,
        gpu=gpu,
        gpu_memory_gb=memory,
        expected_mfu=cluster.expected_mfu,
        failures_per_thousand_node_days=cluster.failures_per_thousand_node_days if slurm else None,
        limit_seconds=job_limit_seconds(limits, arguments.sbatch) if slurm else None,
    )


def gpu_kind(run: RunConfig, cluster: ClusterFile, limits: Limits) -> str | None:
    """Which GPUs there are: by the cluster's file, by the flag that asks for them, by Slurm's names."""
    if run.config.infra.device != "cuda":
        return None
    kinds = {accelerator_in(node.gres) for node in limits.nodes or () if node.gpus}
    one = kinds.pop() if len(kinds) == 1 else None
    return cluster.gpu or accelerator_in(cluster.gpu_flag) or one


def memory_is_named(cluster: ClusterFile) -> bool:
    return cluster.gpu_memory_gb is not None or cluster.gpu is not None
