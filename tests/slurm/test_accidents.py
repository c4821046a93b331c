"""What clusters do to jobs: each run ends complete and bit-identical to the undisturbed one, or as the user said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

import psutil
import pytest

from encdec.files import RunPaths
from encdec.records import ContinuationRecord, read_json_lines, read_record
from tests.conftest import losses, wait_for_step, wait_until
from tests.slurm.conftest import Cluster, ledger, lift_hold, outcome

pytestmark = pytest.mark.slurm
Eventually = Callable[..., None]


class Run:
    """One run on the cluster, and what is done to it.

    Args:
        cluster: where.
        extra: flags of its submission.
    """

    def __init__(self, cluster: Cluster, eventually: Eventually, *extra: str) -> None:
        self.cluster, self.eventually, self.extra = cluster, eventually, extra
        self.paths = RunPaths(cluster.lab.root / "run")
        self.job = cluster.queue(self.paths, *extra)

    def slurm(self, *command: str) -> str:
        return self.cluster.sandbox.run(*command)

    def state(self, job: str) -> str:
        return self.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def warn(self) -> None:
        """What Slurm sends before the time limit."""
        self.slurm("scancel", "--signal=USR2", self.job)

    def lift_hold(self) -> None:
        """Slurm holds a requeued job back for a while."""
        self.eventually(lambda: self.state(self.job) == "PENDING", 60)
        lift_hold(self.cluster.sandbox, self.job)

    def events(self, kind: str, attempt: int = 0) -> list[dict]:
        return ledger(self.paths.attempt(attempt).events("node-0"), kind)

    def successor(self) -> str | None:
        return read_record(self.paths.continuation, ContinuationRecord).successor

    def ends_like(self, twin: RunPaths, digest: str) -> None:
        """Follow it to its end."""
        code, output = self.cluster.submit(self.paths, "--wait", *self.extra)
        assert code == 0, output
        assert losses(self.paths) == losses(twin)
        assert self.cluster.lab.digest(self.paths.checkpoints / "step-60") == digest

    def steps(self) -> list[list[int]]:
        """Steps computed by each attempt."""
        numbers = self.paths.attempt_numbers()
        return [[record["step"] for record in read_json_lines(self.paths.attempt(n).steps)] for n in numbers]


@pytest.fixture
def submit(cluster: Cluster, eventually: Eventually):
    return lambda *extra: Run(cluster, eventually, *extra)


def test_two_time_outs_lose_no_step(submit, twin: RunPaths, twin_digest: str):
    run = submit()
    for attempt, step in enumerate((8, 30)):
        wait_for_step(run.paths, step, attempt)
        run.warn()
        run.lift_hold()
    run.ends_like(twin, twin_digest)
    assert [step for steps in run.steps() for step in steps] == list(range(1, 61))  # none twice, none left out
    assert len(run.paths.attempt_numbers()) == 3
    run.eventually(lambda: run.cluster.history(run.job) == ["REQUEUED", "REQUEUED", "COMPLETED"], 10)


def test_requeued_job_that_dies_before_it_runs_is_continued_all_the_same(submit, twin: RunPaths, twin_digest: str):
    """A node that cannot start it, a lost mount, a script cut off: the successor that was the net is still there."""
    run = submit()
    wait_for_step(run.paths, 10)
    host = run.paths.batch_host(run.job)
    host.unlink()
    host.mkdir()  # the job's script cannot write there and leaves, before Python
    run.warn()
    run.lift_hold()
    run.eventually(lambda: run.cluster.history(run.job) == ["REQUEUED", "FAILED"], 60)
    run.ends_like(twin, twin_digest)
    assert [step for steps in run.steps() for step in steps] == list(range(1, 61))
    [queued] = run.events("successor_queued")
    assert json.loads(run.paths.attempt(1).process.read_text())["job"] == queued["job"]


def test_successor_goes_on_where_its_predecessor_stopped(submit, twin: RunPaths, twin_digest: str):
    run = submit("--continue-by", "successor")
    wait_for_step(run.paths, 10)
    second = run.successor()
    assert second is not None and run.state(second) == "PENDING"
    run.warn()
    run.ends_like(twin, twin_digest)
    assert [step for steps in run.steps() for step in steps] == list(range(1, 61))
    [cancelled] = run.events("successor_cancelled", 1)  # the work is done: the third job is not needed
    assert run.state(cancelled["job"]) == "CANCELLED"
    assert json.loads(run.paths.attempt(1).process.read_text())["job"] == second
    assert run.cluster.history(run.job) != ["REQUEUED"]


def test_save_slower_than_the_warning_leaves_a_continued_run(submit, twin: RunPaths, twin_digest: str):
    """Storage so slow that the ranks stand still in the middle of their save, until the time limit ends the job."""
    run = submit("--time", "10")
    wait_for_step(run.paths, 20)
    with standing_still(run.paths):
        run.warn()
        run.eventually(lambda: run.events("successor_queued"), 60)
        soon = datetime.now() + timedelta(seconds=2)
        run.slurm("scontrol", "update", f"jobid={run.job}", f"endtime={soon.isoformat(timespec='seconds')}")
        run.eventually(lambda: run.cluster.history(run.job) == ["TIMEOUT"], 120)  # Slurm looks every 30 s
    assert not run.paths.attempt(0).outcome.exists()
    run.ends_like(twin, twin_digest)
    assert run.steps()[1][0] == 16  # from the newest checkpoint


@contextlib.contextmanager
def standing_still(paths: RunPaths) -> Iterator[None]:
    """Hold every rank of the run where it is. Again and again: Slurm sends SIGCONT along with every signal."""
    ranks, done = ranks_on_all_nodes(paths), threading.Event()

    def hold() -> None:
        while not done.wait(0.005):
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGSTOP)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        yield
    finally:
        done.set()
        holder.join()


def ranks_on_all_nodes(paths: RunPaths) -> list[psutil.Process]:
    ranks = find_ranks(paths)
    assert len(ranks) >= 2
    return ranks


def find_ranks(paths: RunPaths) -> list[psutil.Process]:
    """The ranks of a run: they write its rank logs. The sandbox's nodes are processes of this machine."""
    mark, ranks = f"{paths.root}/attempts/", []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            descriptors = os.scandir(f"/proc/{process.pid}/fd")
            targets = [os.readlink(descriptor.path) for descriptor in descriptors]
            if any(target.startswith(mark) and target.endswith(".err") for target in targets):
                ranks.append(process)
    return ranks


def test_administrators_requeue(submit, twin: RunPaths, twin_digest: str):
    run = submit()
    wait_for_step(run.paths, 10)
    run.slurm("scontrol", "requeue", run.job)
    run.lift_hold()
    run.ends_like(twin, twin_digest)


@pytest.mark.parametrize("warned", [True, False], ids=["user signal", "TERM only"])
def test_preemption(submit, warned: bool, twin: RunPaths, twin_digest: str):
    run = submit("--partition", "low")
    conf = run.cluster.sandbox.layout.slurm_conf
    text = conf.read_text()
    if not warned:
        conf.write_text(text.replace("SlurmctldParameters=preempt_send_user_signal\n", ""))
        run.slurm("scontrol", "reconfigure")
    try:
        wait_for_step(run.paths, 10)
        whole = ["--nodes=4", "--exclusive", "--partition=high", "--time=5", "--output=/dev/null", "--wrap=sleep 600"]
        high = run.slurm("sbatch", "--parsable", *whole).strip()
        run.eventually(lambda: run.state(high) == "RUNNING", 60)
        run.slurm("scancel", high)
    finally:
        conf.write_text(text)
        run.slurm("scontrol", "reconfigure")
    run.lift_hold()
    run.ends_like(twin, twin_digest)
    assert outcome(run.paths)["cause"] == "signalled"
    assert [step for steps in run.steps() for step in steps] == list(range(1, 61))


def test_node_crash(submit, twin: RunPaths, twin_digest: str):
    run = submit()
    wait_for_step(run.paths, 20)
    run.cluster.sandbox.crash("n2")
    try:
        run.lift_hold()
    finally:
        run.cluster.sandbox.heal("n2")
    run.ends_like(twin, twin_digest)


def test_cut_node_writes_nothing_any_more(submit, twin: RunPaths, twin_digest: str):
    run = submit()
    wait_for_step(run.paths, 20)
    run.cluster.sandbox.cut("n1")  # the head node: its ranks, its agent and its batch shell live on
    try:
        run.lift_hold()
        wait_until(lambda: len(run.paths.attempt_numbers()) == 2, "the next attempt has begun")
    finally:
        run.cluster.sandbox.heal("n1")
    run.ends_like(twin, twin_digest)
    old = [json.loads(path.read_text())["attempt"] for path in run.paths.checkpoints.glob("step-*/manifest.json")]
    assert set(old) <= {0, 1}
    assert not run.paths.attempt(0).outcome.exists() or outcome(run.paths)["cause"] != "complete"


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_run_goes_on_without_a_node_whose_ranks_die(submit, node: str, twin: RunPaths, twin_digest: str):
    """A broken GPU, memory that fails: the node looks well to Slurm, and every rank on it dies soon."""
    run = submit()
    wait_for_step(run.paths, 20)
    with deadly(run, node):
        wait_until(run.paths.attempt(0).outcome.is_file, "the first attempt ends")
    assert (outcome(run.paths)["cause"], outcome(run.paths)["bad_node"]) == ("bad_node", node)
    run.ends_like(twin, twin_digest)
    successor = json.loads(run.paths.attempt(1).process.read_text())["job"]
    nodes = run.slurm("squeue", "-h", "-t", "all", "-j", successor, "-o", "%N").strip()
    assert node not in run.slurm("scontrol", "show", "hostnames", nodes).split()


@contextlib.contextmanager
def deadly(run: Run, node: str) -> Iterator[None]:
    """Kill every rank of the run on a node as soon as it writes its log."""
    space, done = os.readlink(f"/proc/{machine_pid(run, node)}/ns/pid"), threading.Event()

    def kill() -> None:
        while not done.wait(0.05):
            for rank in find_ranks(run.paths):
                with contextlib.suppress(OSError, psutil.Error):
                    if os.readlink(f"/proc/{rank.pid}/ns/pid") == space:
                        rank.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        done.set()
        killer.join()


def machine_pid(run: Run, node: str) -> int:
    """PID 1 of a node, as this machine numbers it."""
    return json.loads(run.cluster.sandbox.layout.identity(node).read_text())["pid"]


def test_controller_restart_is_not_noticed(submit, twin: RunPaths, twin_digest: str):
    run = submit()
    wait_for_step(run.paths, 10)
    run.cluster.sandbox.crash("ctl")
    run.cluster.sandbox.heal("ctl")
    run.ends_like(twin, twin_digest)
    assert run.paths.attempt_numbers() == [0]


@pytest.mark.parametrize("mode", ["requeue", "successor"])
def test_scancel_during_the_save_is_final(submit, mode: str):
    run = submit("--continue-by", mode)
    wait_for_step(run.paths, 10)
    run.warn()
    run.eventually(lambda: list(run.paths.checkpoints.glob("step-*.tmp-0")) or outcome_written(run.paths), 20)
    run.slurm("scancel", run.job)
    run.eventually(lambda: run.state(run.job) == "CANCELLED", 30)
    jobs = run.slurm("squeue", "-h", "-t", "all", "-o", "%i %T %k").splitlines()
    comment = next(line for line in jobs if line.startswith(f"{run.job} ")).partition(" encdec ")[2]
    mine = [line for line in jobs if comment in line]
    run.eventually(lambda: all(run.state(line.split()[0]) in ("CANCELLED", "COMPLETED") for line in mine), 30)
    assert len(run.paths.attempt_numbers()) == 1  # a successor that started nevertheless has declined


def outcome_written(paths: RunPaths) -> bool:
    return paths.attempt(0).outcome.is_file()
