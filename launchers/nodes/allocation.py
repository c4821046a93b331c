"""A task's place in a Slurm job: which node it is of how many, which attempt it runs, and where the nodes meet.

Each start of a job is one attempt. The task of node rank 0 claims its number and writes it to a file named after the
start (job, restart count, step), which no later start can mistake for its own; the other nodes wait for that file.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from encdec.errors import EncdecError
from encdec.files import AttemptPaths, RunPaths, atomic_write_json
from encdec.records import ProcessRecord, read_json_lines, read_record
from launchers.slurm import expand_nodelist

SECONDS_TO_BE_TOLD = 600.0
"""How long a node waits for the head node to name the attempt; Python may start slowly from cold shared storage."""
SECONDS_TO_HEAR_THE_END = 60.0
SECONDS_TO_LEAVE_LAST = 5.0
SECONDS_TO_EXIT = 0.3
"""Between a task's last line and the end of its process."""
SECONDS_BETWEEN_LOOKS = 0.2
PORTS = range(20000, 30000)
"""Below Linux's ephemeral ports (32768-60999): no outgoing connection takes the port before the rendezvous binds it."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What Slurm told this task."""

    job: str
    restarts: int
    """Times that Slurm has started the job before."""
    start: str
    """``<job>.<restart count>.<step>``: names one start of the job for ever."""
    nodes: int
    node_rank: int
    """0 on the head node."""
    nodelist: str


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What the head node tells the others about this start of the job."""

    attempt: int | None = None
    """Number of the attempt; None: it declined."""
    exit_code: int = 0
    """If it declined."""
    reason: str = ""


@dataclass(frozen=True)
class Declined:
    """Why a start of a job runs no attempt."""

    reason: str
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class Seat:
    """What the head node decided, and how this node reaches the others."""

    attempt: int
    endpoint: str
    """host:port of the rendezvous, on the head node."""
    address: str
    """This node's address as the others see it."""
    interface: str
    """Network interface that carries the address."""


def read_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """The step of a Slurm job that this process is a task of; None for a local attempt, also inside a Slurm job."""
    if environment.get("SUBMITIT_EXECUTOR") == "local" or "SLURM_PROCID" not in environment:
        return None
    job, restart, step = (environment.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return Allocation(
        job=job,
        restarts=int(restart),
        start=f"{job}.{restart}.{step}",
        nodes=int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES", "1")),
        node_rank=int(environment.get("SLURM_NODEID", "0")),
        nodelist=environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""),
    )


def lead(allocation: Allocation, paths: RunPaths) -> Seat:
    """Claim the next attempt, choose where to meet, and tell the other nodes. The announcement is written last."""
    address, interface, endpoint = "localhost", "lo", "localhost:0"
    if allocation.nodes > 1:
        other = expand_nodelist(allocation.nodelist)[1]  # by its own name the head node might only find its loopback
        address = address_towards(other)
        interface = interface_of(address)
        endpoint = f"{address}:{free_port(int(allocation.job))}"
    number = paths.claim_attempt()
    identify_process(paths.attempt(number).process, job=allocation.job, start=allocation.start, endpoint=endpoint)
    atomic_write_json(announcement(allocation, paths), asdict(Announcement(attempt=number)))
    return Seat(attempt=number, endpoint=endpoint, address=address, interface=interface)


def decline(allocation: Allocation, paths: RunPaths, declined: Declined) -> None:
    """Tell the other nodes, and whoever reads the log, that this start runs no attempt."""
    print(f"no attempt: {declined.reason}", file=sys.stderr, flush=True)
    told = Announcement(exit_code=declined.exit_code, reason=declined.reason)
    atomic_write_json(announcement(allocation, paths), asdict(told))


def join(allocation: Allocation, paths: RunPaths) -> Seat | int:
    """Wait for the head node's announcement; an exit code if it declined.

    Raises:
        EncdecError: it did not tell within SECONDS_TO_BE_TOLD.
    """
    told = announcement(allocation, paths)
    deadline = time.monotonic() + SECONDS_TO_BE_TOLD
    while told.name not in os.listdir(told.parent):  # NFS caches the absence of a name until its folder is opened
        if time.monotonic() > deadline:
            raise EncdecError(
                "The head node must claim the attempt before the others join it",
                found=f"no {told} after {SECONDS_TO_BE_TOLD:.0f} s",
                remedy="See the log of the job's first task, and that all nodes see the same run directory",
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
    said = read_record(told, Announcement)
    if said.attempt is None:
        return said.exit_code
    number = said.attempt
    endpoint = read_record(paths.attempt(number).process, ProcessRecord).endpoint
    assert endpoint is not None, "the head node of a Slurm job says where the nodes meet"
    address = address_towards(endpoint.rpartition(":")[0])
    return Seat(attempt=number, endpoint=endpoint, address=address, interface=interface_of(address))


def announcement(allocation: Allocation, paths: RunPaths) -> Path:
    return paths.announcement(allocation.start)


def identify_process(path: Path, **place: str) -> None:
    """Write which process runs the attempt; a pid alone can be used again, so its creation time goes along."""
    process = psutil.Process()
    record = ProcessRecord(host=socket.gethostname(), pid=process.pid, created=process.create_time(), **place)
    atomic_write_json(path, record.to_json())


def head_exit_code(ledger: Path) -> int | None:
    """Exit code in the head node's last line, waited for; None if it left none.

    A node that left earlier with another code than 0 would take the head node along (srun --kill-on-bad-exit).
    """
    deadline = time.monotonic() + SECONDS_TO_HEAR_THE_END
    while time.monotonic() < deadline:
        for record in read_json_lines(ledger):
            if record["event"] == "ended":
                return record["exit_code"]
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return None


def wait_for_others(attempt: AttemptPaths, nodes: int) -> None:
    """Leave last, if the other nodes leave soon: with another code than 0 this one would take them along, and the job
    would end with the code of their death (srun --kill-on-bad-exit).
    """
    deadline = time.monotonic() + SECONDS_TO_LEAVE_LAST
    waited_for = [attempt.events(f"node-{node}") for node in range(1, nodes)]
    while waited_for and time.monotonic() < deadline:
        waited_for = [ledger for ledger in waited_for if not any(r["event"] == "left" for r in read_json_lines(ledger))]
        time.sleep(SECONDS_BETWEEN_LOOKS if waited_for else SECONDS_TO_EXIT)


def address_towards(host: str) -> str:
    """This machine's address on the route to ``host``. Nothing is sent: connecting UDP only looks the route up."""
    family, kind, protocol, _, there = socket.getaddrinfo(host, PORTS.start, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(there)
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """Name of the network interface that carries ``address``.

    Raises:
        EncdecError: none does, or only the loopback, which no other node can reach.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if name != "lo" and any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    raise EncdecError(
        "A node of a multi-node job must have a network interface that the other nodes reach",
        found=f"none with the address {address} of the route to them",
        remedy="Mend the nodes' name resolution, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
    )


def free_port(job: int) -> int:
    """A port nobody listens on; jobs that share a node begin to look at different ones."""
    for offset in range(len(PORTS)):
        port = PORTS[(job + offset) % len(PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise EncdecError("A port must be free for the rendezvous", found=f"none in {PORTS}", remedy="Use another node")
