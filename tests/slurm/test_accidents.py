"""What clusters do to jobs: each run ends complete and bit-identical to the undisturbed one, or as the user said."""

from __future__ import annotations

import contextlib
import json

import psutil
import pytest

from encdec.errors import EncdecError
from encdec.files import RunPaths
from launchers.views import overview
from tests.conftest import wait_for_step, wait_until
from tests.slurm.conftest import deadly, ledger, outcome, standing_still

pytestmark = pytest.mark.slurm


def test_time_limit_and_another_stop_lose_no_step(submit, twin: RunPaths, twin_digest: str):
    """Slurm itself gives the first warning: on its tick of 30 s, up to 150 s before the end."""
    run = submit("--time", "10")
    wait_for_step(run.paths, 8)
    with standing_still(run.paths):  # the run would be over before the tick
        run.set_end(seconds=148)
        run.eventually(lambda: run.events("successor_queued"), 90)
    run.lift_hold()
    run.slurm("scontrol", "update", f"jobid={run.job}", "timelimit=10")  # the end that was set has become its limit
    wait_for_step(run.paths, 30, attempt=1)
    run.warn()
    run.lift_hold()
    output = run.ends_like(twin, twin_digest)  # the same command finds the job and follows it
    assert f"job {run.job} is this run's already" in output
    assert len(ledger(run.paths.events, "submitted")) == 1
    assert [outcome(run.paths, attempt)["exit_code"] for attempt in (0, 1, 2)] == [75, 75, 0]
    assert all(outcome(run.paths, attempt)["checkpoint_verified"] for attempt in (0, 1, 2))
    assert [outcome(run.paths, attempt)["cause"] for attempt in (0, 1, 2)] == ["signalled", "signalled", "complete"]
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


def test_save_slower_than_the_warning_leaves_a_continued_run(submit, twin: RunPaths, twin_digest: str):
    """Storage so slow that the ranks stand still in the middle of their save, until the time limit ends the job."""
    run = submit("--time", "10")
    wait_for_step(run.paths, 20)
    with standing_still(run.paths):
        run.warn()
        run.eventually(lambda: run.events("successor_queued"), 60)
        run.set_end(seconds=2)
        run.eventually(lambda: run.state(run.job) == "TIMEOUT", 120)  # Slurm looks every 30 s, and kills 3 s later
    assert run.cluster.history(run.job) == ["TIMEOUT"]
    assert not run.paths.attempt(0).outcome.exists()
    run.ends_like(twin, twin_digest)
    assert run.steps()[1][0] == 16  # from the newest checkpoint


def test_administrators_requeues(submit, twin: RunPaths, twin_digest: str):
    """One amid the run, one while Slurm still ends its tasks, and one before the next attempt can have a step."""
    run = submit()
    wait_for_step(run.paths, 10)
    run.slurm("scontrol", "requeue", run.job)
    with contextlib.suppress(EncdecError):  # Slurm may call it pending already
        run.slurm("scontrol", "requeue", run.job)
    run.lift_hold()
    run.eventually(lambda: run.state(run.job) == "RUNNING", 60)
    run.slurm("scontrol", "requeue", run.job)
    run.lift_hold()
    run.ends_like(twin, twin_digest)


def test_scancel_while_it_waits_after_a_requeue_is_final(submit, monkeypatch: pytest.MonkeyPatch):
    run = submit()
    wait_for_step(run.paths, 10)
    run.warn()
    run.eventually(lambda: run.events("ended") and run.state(run.job) == "PENDING", 60)
    run.slurm("scancel", run.job)
    assert run.state(run.job) == "CANCELLED"
    [successor] = run.events("successor_queued")
    run.eventually(lambda: run.state(successor["job"]) in ("CANCELLED", "COMPLETED"), 30)  # looked, and declined
    monkeypatch.setenv("SLURM_CONF", str(run.cluster.sandbox.layout.slurm_conf))
    [view] = overview.look([run.paths], forgiving=False)
    assert (view.standing.state, view.standing.words) == ("cancelled", "cancelled by user")
    assert run.paths.attempt_numbers() == [0]


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
        run.preempt()
    finally:
        conf.write_text(text)
        run.slurm("scontrol", "reconfigure")
    run.lift_hold()
    run.ends_like(twin, twin_digest)
    assert outcome(run.paths)["cause"] == "signalled"
    assert [step for steps in run.steps() for step in steps] == list(range(1, 61))


def test_preemption_that_cancels(submit, twin: RunPaths, twin_digest: str):
    """No grace, no requeue: what Slurm cancels, it calls PREEMPTED, and the successor goes on."""
    run = submit("--partition", "low", "--continue-by", "successor")
    run.slurm("scontrol", "update", "partitionname=low", "preemptmode=cancel", "gracetime=0")
    try:
        wait_for_step(run.paths, 10)
        second = run.successor()
        run.preempt()
        run.eventually(lambda: run.state(run.job) == "PREEMPTED", 30)
    finally:
        run.slurm("scontrol", "update", "partitionname=low", "preemptmode=requeue", "gracetime=10")
    run.ends_like(twin, twin_digest)
    assert json.loads(run.paths.attempt(1).process.read_text())["job"] == second
    assert run.cluster.history(run.job) == ["PREEMPTED"]
    run.eventually(lambda: run.cluster.history(second) == ["COMPLETED"], 10)


def test_node_crash(submit, twin: RunPaths, twin_digest: str):
    """Of another than the head node, whose agent, ranks and batch shell see it. The cut takes the head node away."""
    run = submit()
    wait_for_step(run.paths, 10)
    head = json.loads(run.paths.attempt(0).process.read_text())["host"]
    [victim] = set(run.nodes()) - {head}
    run.cluster.sandbox.crash(victim)
    assert {machine.name for machine in run.cluster.sandbox.status() if machine.missing} == {victim}
    try:
        run.lift_hold()
        run.eventually(lambda: run.state(run.job) == "RUNNING", 60)  # on other nodes: this one is to boot in peace
    finally:
        run.cluster.sandbox.heal(victim)
    run.ends_like(twin, twin_digest)
    assert len(run.paths.attempt_numbers()) == 2
    run.eventually(lambda: run.cluster.history(run.job) == ["NODE_FAIL", "COMPLETED"], 10)


def test_cut_node_writes_nothing_any_more(submit, twin: RunPaths, twin_digest: str):
    run = submit()
    wait_for_step(run.paths, 20)
    head = json.loads(run.paths.attempt(0).process.read_text())["host"]
    run.cluster.sandbox.cut(head)
    assert {machine.name for machine in run.cluster.sandbox.status() if machine.link == "cut"} == {head}
    survivors = run.processes_on(head)
    try:
        run.lift_hold()
        wait_until(lambda: len(run.paths.attempt_numbers()) == 2, "the next attempt has begun")
        assert any(is_alive(process) for process in survivors)  # its agent or its batch shell: split brain
        before = manifests_of(run.paths, attempt=0)
    finally:
        run.cluster.sandbox.heal(head)
    run.ends_like(twin, twin_digest)
    assert manifests_of(run.paths, attempt=0) <= before
    assert not run.paths.attempt(0).outcome.exists() or outcome(run.paths)["cause"] != "complete"


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def manifests_of(paths: RunPaths, attempt: int) -> set[tuple[str, str]]:
    """(step, content) of the checkpoints that an attempt has committed."""
    texts = {path.parent.name: path.read_text() for path in paths.checkpoints.glob("step-*/manifest.json")}
    return {(name, text) for name, text in texts.items() if json.loads(text)["attempt"] == attempt}


def test_run_goes_on_without_a_node_whose_ranks_die(submit, twin: RunPaths, twin_digest: str):
    """A broken GPU, memory that fails: the node looks well to Slurm, and every rank on it dies soon."""
    run = submit()
    wait_for_step(run.paths, 20)
    node = run.nodes()[-1]  # not the head node, which judges
    with deadly(run, node):
        wait_until(run.paths.attempt(0).outcome.is_file, "the first attempt ends")
    assert (outcome(run.paths)["cause"], outcome(run.paths)["bad_node"]) == ("bad_node", node)
    run.ends_like(twin, twin_digest)
    successor = json.loads(run.paths.attempt(1).process.read_text())["job"]
    nodes = run.slurm("squeue", "-h", "-t", "all", "-j", successor, "-o", "%N").strip()
    assert node not in run.slurm("scontrol", "show", "hostnames", nodes).split()


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
