"""What Slurm gets: a run, a cluster's file and the user's flags -> the text of a batch script. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from encdec.errors import ConfigError, ExitCode
from encdec.files import RunPaths
from encdec.training.run_config import RunConfig
from launchers.cluster_file import ClusterFile

UNKNOWN_SUBMISSION = "<submission>"
"""In place of the random part of a job's comment, where nothing is submitted."""
DEAF = """sh -c 'trap "" USR2; exec "$@"' sh"""
"""Starts Python deaf to a warning that comes before it can have a handler; the job's end time is looked at later."""
GPU_FLAGS = frozenset({"gres", "gpus", "gpus-per-node", "gpus-per-task"})
SLURMS_OWN = ("%", "\\")
"""What Slurm replaces in the paths of a job's output, and what turns that off."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """Everything that decides the text."""

    paths: RunPaths
    run: RunConfig
    cluster: ClusterFile
    flags: Mapping[str, str | bool]
    """sbatch flags by long name, the cluster's and over them the user's; True for one without a value."""
    lead_seconds: int
    """Warning before the time limit."""
    submission: str
    """Random, or UNKNOWN_SUBMISSION."""
    python: str
    """Shell words that start Python on the nodes."""
    pythonpath: str
    """PYTHONPATH of whoever submits; empty: none."""

    @property
    def comment(self) -> str:
        return comment_of(self.run, self.submission)

    @property
    def starter(self) -> str:
        """Shell words that start Python, and let it live until it can listen."""
        return f"{DEAF} {self.python}"

    @property
    def cpus(self) -> int:
        """CPUs of each node's one task: unless asked for otherwise one a rank and one a data worker."""
        workers = self.run.config.data.dataloader_num_workers
        return int(self.flags.get("cpus-per-task") or self.run.ranks_per_node * (1 + workers))


def comment_of(run: RunConfig, submission: str) -> str:
    """What the job says about itself in Slurm: by it a job is found again whose id was lost."""
    return f"encdec {run.identity[:16]} {submission}"


def sbatch_text(request: JobRequest) -> str:
    """The script as submitit hands it to sbatch."""
    command = f"{request.starter} -u -m submitit.core._submit {shlex.quote(str(request.paths.submitit))}"
    return _make_sbatch_string(command=command, folder=request.paths.submitit, **submitit_parameters(request))


def submitit_parameters(request: JobRequest) -> dict[str, Any]:
    """submitit's parameters for one task per node. submitit itself adds --output and --open-mode=append."""
    return {
        "job_name": request.run.name,
        "comment": request.comment,
        "nodes": request.run.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": request.cpus,
        "time": None,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": setup_lines(request),
        "srun_args": srun_arguments(request),
        "additional_parameters": {
            "requeue": True,
            "signal": f"USR2@{request.lead_seconds}",
            **gpu_flag(request),
            **{flag: value for flag, value in request.flags.items() if flag != "cpus-per-task"},
        },
    }


def job_text(request: JobRequest, mark: str) -> str:
    """The script that a job submitted by hand becomes, and that its successor gets; so does the successor of a job that
    runs several phases.

    Args:
        mark: ``made_inside``, or nothing.
    """
    paths = request.paths
    header = {
        "job-name": request.run.name,
        "comment": request.comment,
        "nodes": str(request.run.nodes),
        "ntasks-per-node": "1",
        **({} if GPU_FLAGS & request.flags.keys() else gpu_flag(request)),
        "cpus-per-task": str(request.cpus),
        "output": f"{paths.submitit}/%j_0_log.out",
        "open-mode": "append",
        "requeue": True,
        "signal": f"USR2@{request.lead_seconds}",
        **request.flags,
    }
    flags = [f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}" for name, value in header.items()]
    output = shlex.quote(f"{paths.submitit}/%j_%t_log.out")
    srun = f"srun --unbuffered --output {output} {shlex.join(srun_arguments(request))}"
    lines = [
        "#!/bin/bash",
        *filter(None, [mark]),
        *(f"#SBATCH {flag}" for flag in sorted(flags)),
        "",
        "# setup",
        *setup_lines(request),
        "",
        "# command",
        "# The ranks save when they are warned or told to end; this shell must outlive that. A trap waits for the",
        "# child in the foreground, and ends a wait: so srun runs behind, and is waited for again after a signal.",
        "trap 'interrupted=yes' USR2 TERM INT HUP",
        f"{srun} {request.starter} -u -m launchers.job {shlex.quote(str(paths.root))} &",
        "step=$!",
        'while interrupted=; wait "$step"; code=$?; [ -n "$interrupted" ]; do :; done',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def made_inside(job: str) -> str:
    """The line by which a later start of ``job`` knows that a script is its own."""
    return f"# Made inside job {job}, for it and its successors."


def gpu_flag(request: JobRequest) -> dict[str, str]:
    """How the cluster wants to be asked for the GPUs of a node; nothing for ranks on CPUs."""
    if request.run.config.infra.device != "cuda" or not request.cluster.gpu_flag:
        return {}
    flag, _, value = request.cluster.gpu_flag.partition("=")
    return {flag: value.replace("{n}", str(request.run.ranks_per_node))}


def srun_arguments(request: JobRequest) -> list[str]:
    """A dead task takes the step along; the others are given a minute to end by themselves."""
    return ["--kill-on-bad-exit=1", "--wait=60", f"--cpus-per-task={request.cpus}", *request.cluster.srun_args]


def setup_lines(request: JobRequest) -> list[str]:
    """Shell lines before srun. The code's snapshot goes before whatever the cluster's own lines put on the path."""
    code = shlex.quote(str(request.paths.code))
    seen = shlex.quote(str(request.paths.batch_host("")))
    return [
        f'echo "$HOSTNAME" > {seen}"$SLURM_JOB_ID" || exit {ExitCode.CONFIG_WRONG:d}  # seen here?',
        f"export PYTHONPATH={shlex.quote(request.pythonpath)}",
        *(f"export {name}={shlex.quote(value)}" for name, value in request.cluster.variables.items()),
        *request.cluster.setup,
        f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        "export PYTHONSAFEPATH=1  # python -m would put the working directory first",
    ]


def require_plain_path(paths: RunPaths) -> None:
    """Slurm gives ``%j`` and its like in the paths of a job's output a meaning of its own.

    Raises:
        ConfigError: naming the path.
    """
    root = str(paths.root)
    if any(character in root for character in SLURMS_OWN):
        raise ConfigError(
            "The path of a run directory on Slurm must be without % and \\, which have a meaning in the paths of its "
            "output",
            found=repr(root),
            remedy="Choose another with --run-dir",
        )
