"""``accelerate launch`` in place of torch elastic alone: its arguments, its configuration file, its environment.

Its command runs inside the agent. It ends in torch elastic's launcher, which is handed our Supervisor for its own
LocalElasticAgent: so ranks are programs with Accelerate's environment, while logs, restarts and signals stay as they
are. A launcher of its own process would die of the cluster's signals, count restarts blindly, and start a rank again
that refused to run.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api as torch_launcher

from encdec.files import RunPaths
from launchers.nodes.elastic import (
    SECONDS_BETWEEN_LOOKS,
    SECONDS_TO_MEET,
    UNLIMITED,
    RankLogs,
    Supervisor,
    spare_telemetry,
)
from launchers.nodes.parts import NodeJob, Watcher, network_variables

TRAIN = "encdec.train"


class ProgramSupervisor(Supervisor):
    """Supervisor of ranks that are programs of their own."""

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """A new program takes the mask over: the signals that ask to save wait until it listens, seconds later."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
        try:
            return super()._start_workers(worker_group)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})

    def _on_failure(self, result: RunResult) -> None:
        """torch counts the ranks that it killed because of the failure among the failures, after it."""
        super()._on_failure(replace(result, failures=dict(islice(result.failures.items(), 1))))


def supervise(agent: Watcher, logs: Path) -> bool:
    """Run the ranks of this node, their output under ``logs``; whether all ended well."""
    spare_telemetry()

    def start_ours(spec: WorkerSpec, **theirs: object) -> Supervisor:
        return ProgramSupervisor(agent, spec, RankLogs(logs))

    torch_launcher.LocalElasticAgent = start_ours
    os.environ.update(network_variables(agent.job.interface) | os.environ | torchrun_variables(agent.job))
    words = arguments(agent.job, logs)
    print("accelerate launch", shlex.join(words), file=sys.stderr, flush=True)
    try:
        launch_command(launch_command_parser().parse_args(words))
    except (ChildFailedError, RendezvousError):
        return False
    return True


def arguments(job: NodeJob, logs: Path) -> list[str]:
    """Those of ``accelerate launch`` for one node's part of an attempt. Pure."""
    paths = RunPaths(Path(job.run_dir))
    address, _, port = job.endpoint.rpartition(":")
    options = {
        "config_file": paths.accelerate_config(job.engine),
        "num_machines": job.nodes,
        "machine_rank": job.node_rank,
        "num_processes": job.nodes * job.ranks,
        "main_process_ip": address,
        "main_process_port": port,
        "rdzv_backend": "c10d",
        "rdzv_conf": f"is_host={job.node_rank == 0},read_timeout={SECONDS_TO_MEET}",
        "max_restarts": UNLIMITED,
        "monitor_interval": SECONDS_BETWEEN_LOOKS,
        "log_dir": logs,
    }
    train = {"run_dir": job.run_dir.replace("$", "$$"), "attempt": job.attempt, "agent": os.getpid()}  # a template
    return [*as_flags(options), "-m", TRAIN, *as_flags(train)]


def as_flags(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def torchrun_variables(job: NodeJob) -> dict[str, str]:
    """Those of torchrun's arguments that ``accelerate launch`` does not know, by the names torchrun looks for. Pure."""
    return {
        "PET_RDZV_ENDPOINT": job.endpoint,  # c10d would else meet at a fixed port, and same_network hides this one
        "PET_RDZV_ID": job.rendezvous_id,
        "PET_LOCAL_ADDR": job.address,
        "PET_SIGNALS_TO_HANDLE": "SIGQUIT",  # the others are the agent's
    }
