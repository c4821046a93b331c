"""Torch elastic with two habits changed: dead groups are killed at once, and restarts are counted by progress.

Ranks and restarted ranks are forks of the forkserver, which has loaded torch and transformers once.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launchers.nodes.parts import Watcher
from launchers.nodes.rank import run_rank

SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_BETWEEN_LOOKS_AT_OTHERS = 1.0
SECONDS_TO_MEET = 600
"""How long a node tries to reach the head node's store, which begins to listen when its agent has loaded torch."""
UNLIMITED = 2**31 - 1
log = logging.getLogger(__name__)


class RankLogs(LogsSpecs):
    """``logs/node-<k>/rank-<r>.restart-<n>.{out,err}``: no folders of random names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Files of one start of the ranks, by local rank."""
        out, err, errors = {}, {}, {}
        for local_rank, env in envs.items():
            stem = f"rank-{env['RANK']}.restart-{env['TORCHELASTIC_RESTART_COUNT']}"
            out[local_rank] = str(self._folder / f"{stem}.out")
            err[local_rank] = str(self._folder / f"{stem}.err")
            errors[local_rank] = env["TORCHELASTIC_ERROR_FILE"] = str(self._folder / f"{stem}.exception.json")
        return LogsDest(stdouts=out, stderrs=err, error_files=errors)


class Supervisor(LocalElasticAgent):
    """LocalElasticAgent that kills survivors at once (they hang in a collective that can never end) and gives up only
    after ``max_restarts`` restarts without a new step, when its node agent says so, or when another node has given up.

    Raises, from ``run``:
        RendezvousError: another node has given up.
    """

    def __init__(self, agent: Watcher, spec: WorkerSpec, logs: LogsSpecs) -> None:
        super().__init__(spec, logs, start_method="forkserver", shutdown_timeout=10)
        self._agent = agent
        self._best_step = 0
        self._fruitless = 0
        self.restarts = 0
        self._next_look_at_others = 0.0
        agent.adopt(self)

    def pids(self) -> list[int]:
        """Process ids of the ranks that run now."""
        return list(self._pcontext.pids().values()) if self._pcontext else []

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._agent.tick()
        result = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            self._on_failure(result)
        elif result.state == WorkerState.HEALTHY and self._others_gave_up():
            self._stop_workers(worker_group)  # they wait in a collective for ranks that are not coming back
            raise RendezvousClosedError("the agent of another node has given up")
        return result

    def _others_gave_up(self) -> bool:
        """Whether another node's agent has left, after which the ranks can never be complete again."""
        now = time.monotonic()
        if self._agent.job.nodes == 1 or now < self._next_look_at_others:
            return False
        self._next_look_at_others = now + SECONDS_BETWEEN_LOOKS_AT_OTHERS
        return self._worker_group.spec.rdzv_handler.is_closed()

    def _on_failure(self, result: RunResult) -> None:
        for rank, failure in sorted(result.failures.items()):
            self._agent.rank_failed(rank, failure.exitcode, self.restarts)
        step = self._agent.last_step()
        self._fruitless = 0 if step > self._best_step else self._fruitless + 1
        self._best_step = max(step, self._best_step)
        if not self._agent.may_restart() or self._fruitless > self._agent.job.max_restarts:
            self._remaining_restarts = 0

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        self._agent.met(self.restarts)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self.restarts += 1
        self._remaining_restarts = UNLIMITED - self.restarts  # counts those that another node's failure began, too
        self._agent.restarting(self.restarts)
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 30) -> None:
        super()._shutdown(signal.SIGKILL, timeout)  # SIGTERM would ask the ranks to save


def spare_telemetry() -> None:
    """Two habits of torch that cost more than the restart they accompany.

    Its log formatter imports torch._dynamo for the first line, the one that says that a rank has died: 1-2 s. Each of
    the rendezvous's events looks up its own method's name with ``inspect.stack``, source and all: 0.3 s a restart.
    """
    for name in [None, *logging.root.manager.loggerDict]:
        for handler in logging.getLogger(name).handlers:
            if type(handler.formatter).__module__.startswith("torch."):
                handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name


def supervise(agent: Watcher, logs: Path) -> bool:
    """Run the ranks of this node, their output under ``logs``; whether all ended well."""
    job = agent.job
    spare_telemetry()
    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint=job.endpoint,
        run_id=job.rendezvous_id,
        min_nodes=job.nodes,
        max_nodes=job.nodes,
        local_addr=job.address,
        is_host=job.node_rank == 0,
        read_timeout=SECONDS_TO_MEET,
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=job.ranks,
        entrypoint=run_rank,
        args=(job.run_dir, job.attempt, job.interface),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=UNLIMITED,
        monitor_interval=SECONDS_BETWEEN_LOOKS,
        local_addr=job.address,
    )
    supervisor = Supervisor(agent, spec, RankLogs(logs))
    try:
        return not supervisor.run().is_failed()
    except RendezvousError as error:  # the head node, whose agent keeps the rendezvous, may have left, too
        log.error("%s", error)
        return False
    finally:
        spec.rdzv_handler.shutdown()
