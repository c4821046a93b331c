"""An agent of the least size: it forks the ranks of one attempt, kills the survivors when one dies, and starts them
again in place when told to. The ranks are the real rank program.

The launcher's own agent takes seconds to start; this one is forked with its imports done, so that it can die often.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import traceback
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.kill_points import MOMENT, Kill, Watch, strike
from encdec.files import RunPaths
from encdec.training import lifeline

RANKS = 2
PATIENCE_SECONDS = 600.0
"""After which ranks that say nothing count as hanging; a machine may be busy with other things."""


class BrokenChainError(Exception):
    """A start of the ranks neither went on, nor ended as it should."""


class Agent:
    """The driver's end of one agent process, which runs one attempt.

    Args:
        paths: the run directory; an attempt of it is claimed.
        ranks: how many it starts.
    """

    def __init__(self, paths: RunPaths, ranks: int = RANKS) -> None:
        context = multiprocessing.get_context("forkserver")
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for it when it is imported, in the server
        context.set_forkserver_preload(["benchmarks.small_agent", "encdec.train", "encdec.training.rank", "deepspeed"])
        self.attempt, self.restart = paths.claim_attempt(), -1
        self._orders, orders = context.Pipe()
        self._notes, notes = context.Pipe(duplex=False)
        self._process = context.Process(target=run_agent, args=(str(paths.root), self.attempt, ranks, orders, notes))
        self._process.start()
        orders.close()
        notes.close()
        self._ranks: list[int] = []

    def start_ranks(self, kill: Kill | None) -> None:
        """Start the ranks, in place if they ran before; ``kill`` is what one of them looks for."""
        self.restart += 1
        self._orders.send((self.restart, kill))
        self._ranks = self._answer()

    def wait(self, seconds: float | None) -> str:
        """What came first: a note of the victim (``noted``), the end of the ranks (``ended``), or nothing.

        Raises:
            BrokenChainError: nothing within PATIENCE_SECONDS, where ``seconds`` is None.
        """
        patience = PATIENCE_SECONDS if seconds is None else seconds
        ready = multiprocessing.connection.wait([self._orders, self._notes], patience)
        if not ready and seconds is None:
            raise BrokenChainError(f"nothing is heard of attempt {self.attempt} for {PATIENCE_SECONDS:.0f} s")
        return "noted" if self._notes in ready else "ended" if ready else ""

    def note(self) -> bytes:
        """What the victim told; empty where all that could tell have died."""
        return os.read(self._notes.fileno(), 1)

    def strike(self, kill: Kill) -> None:
        """Kill whom ``kill`` names, now."""
        assert self._process.pid
        strike(kill.scope, self._process.pid, self._ranks[0], self._ranks[kill.victim])

    def warn(self) -> None:
        """Send the ranks what a cluster sends when time is running out."""
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(rank, signal.SIGUSR2)

    def codes(self) -> list[int] | None:
        """Exit codes of the ranks once all have ended, or None where the agent has died with them."""
        try:
            codes = self._answer()
        except (EOFError, ConnectionResetError):
            codes = None
        self._ranks = []
        return codes

    def _answer(self) -> list[int]:
        if not self._orders.poll(PATIENCE_SECONDS):
            raise BrokenChainError(f"nothing is heard of attempt {self.attempt} for {PATIENCE_SECONDS:.0f} s")
        return self._orders.recv()

    def end(self) -> None:
        """Let it go; its ranks have ended."""
        with contextlib.suppress(BrokenPipeError):
            self._orders.send(None)
        self._process.join()

    def kill_all(self) -> None:
        """Kill what still runs."""
        if self._process.is_alive():
            self._process.kill()
        if self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._ranks[0], signal.SIGKILL)
        self._process.join()


def run_agent(run_dir: str, attempt: int, ranks: int, orders: Connection, notes: Connection) -> None:
    """Start the ranks for every order; the ranks share ``orders``, which so stays open as long as one of them lives.

    Args:
        orders: gives (restart, Kill or None), takes the process ids of the ranks, then their exit codes; None ends it.
        notes: end of a pipe for the ranks' notes about a kill.
    """
    os.setpgid(0, 0)
    while (order := orders.recv()) is not None:
        restart, kill = order
        pids = start_ranks(RunPaths(Path(run_dir)), attempt, restart, ranks, kill, notes.fileno())
        orders.send(pids)
        orders.send(wait_for(pids))


def start_ranks(paths: RunPaths, attempt: int, restart: int, ranks: int, kill: Kill | None, notes: int) -> list[int]:
    """Fork the ranks, in a process group of their own; returns their process ids."""
    port, agent, pids = free_port(), os.getpid(), []
    for rank in range(ranks):
        pid = os.fork()
        group = pids[0] if pids else pid
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, group)
                lifeline.die_with_parent(agent)
                lifeline.listen_to_agent(agent)
                open_log(paths.attempt(attempt).rank_logs(0), rank, restart)
                set_environment(rank, ranks, restart, port)
                if kill and kill.victim == rank and kill.place != MOMENT:
                    die = partial(strike, kill.scope, agent, group or os.getpid(), os.getpid())
                    Watch(paths.checkpoints, kill, notes, die).arm()
                code = run_rank(paths, attempt)
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        with contextlib.suppress(ProcessLookupError):  # whoever comes first, the child or this
            os.setpgid(pid, group)
        pids.append(pid)
    return pids


def run_rank(paths: RunPaths, attempt: int) -> int:
    from encdec.train import leave
    from encdec.training.rank import run_rank_of_attempt

    run_rank_of_attempt(str(paths.root), attempt)
    leave(0)


def set_environment(rank: int, ranks: int, restart: int, port: int) -> None:
    """What torch elastic tells a rank."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RESTART_COUNT=str(restart),
        GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
    )  # fmt: skip


def open_log(folder: Path, rank: int, restart: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"rank-{rank}.restart-{restart}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def wait_for(pids: list[int]) -> list[int]:
    """Exit codes of the ranks, in order; as the agents do it, a rank that ends badly ends the others at once."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, 0)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(pids) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
