"""What one node is to run, and how its agent and the group of its ranks speak to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from launchers.launch_options import Launcher


@dataclass(frozen=True, kw_only=True)
class NodeJob:
    """One node's part of an attempt."""

    run_dir: str
    attempt: int
    nodes: int
    node_rank: int
    ranks: int
    endpoint: str
    """host:port of the rendezvous; port 0 on one node: any free one."""
    rendezvous_id: str
    max_restarts: int
    """Restarts in place without a new step between them."""
    address: str = "localhost"
    """This node's address as the others see it."""
    interface: str = "lo"
    """Network interface that carries the address."""
    launcher: Launcher = "torchrun"
    engine: str = "fsdp"
    """``infra.distributed_type`` of the run."""


def network_variables(interface: str) -> dict[str, str]:
    """Over which interface the ranks' libraries meet. On one node NCCL needs no network."""
    libraries = ("GLOO",) if interface == "lo" else ("GLOO", "NCCL")
    return {f"{library}_SOCKET_IFNAME": interface for library in libraries}


class RankGroup(Protocol):
    """The ranks of one node, as their agent sees them."""

    restarts: int
    """Times the ranks were started again so far."""

    def pids(self) -> list[int]:
        """Process ids of the ranks that run now."""


class Watcher(Protocol):
    """The agent, as the group of its ranks sees it."""

    job: NodeJob

    def adopt(self, group: RankGroup) -> None:
        """The group is there."""

    def tick(self) -> None:
        """Called at every look at the ranks (some 20 times a second)."""

    def met(self, restart: int) -> None:
        """The agents of all nodes have met, after so many restarts of the ranks."""

    def may_restart(self) -> bool:
        """Whether a failed group may be started again."""

    def last_step(self) -> int:
        """Highest step recorded so far."""

    def rank_failed(self, rank: int, exit_code: int, restart: int) -> None:
        """A rank has ended badly; a negative exit code is the number of a signal."""

    def restarting(self, count: int) -> None:
        """The ranks are about to be started for the ``count``-th time again."""
