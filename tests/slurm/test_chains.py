"""Chains on a real Slurm: phases survive what clusters do, hand their weights on, and end at a closed gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from encdec.errors import ExitCode
from encdec.files import RunPaths
from encdec.records import read_json_lines
from encdec.training.execution import TrainingPhase
from encdec.training.promotion import GateFile, read_gate, read_origin
from tests.conftest import MICRO, Lab, losses, wait_for_step, wait_until
from tests.slurm.conftest import Cluster, ledger, lift_hold, outcome, standing_still

pytestmark = pytest.mark.slurm
Eventually = Callable[..., None]
PHASES = ("sanity_check", "validation", "medium")


class Chain:
    """sanity_check -> medium on two nodes of one rank each."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.root = cluster, cluster.lab.root / "chain"
        self.runs = {phase: RunPaths(self.root / phase) for phase in PHASES}

    def submit(self, *extra: str, through: str = "medium") -> tuple[int, str]:
        what = ["--phase", "sanity_check", "--through", through, "--cluster", "slurm", "--run-dir", str(self.root)]
        size = ["--nodes", "2", "--gpus-per-node", "1", "--time", "10"]
        arguments = self.cluster.lab.arguments(*extra)
        return self.cluster.lab.run("launchers.submit", *what, *size, *arguments, launcher=self.cluster.python)

    def job(self, phase: str) -> str:
        return json.loads(self.runs[phase].job.read_text())["job"]

    def gate(self, phase: str) -> GateFile:
        gate = read_gate(self.runs[phase], TrainingPhase(phase))
        assert gate is not None
        return gate

    def status(self) -> dict[str, dict]:
        """By phase, as programs are told."""
        code, output = self.cluster.run("launchers.status", "--json", "--root", str(self.root.parent), "chain")
        assert code == 0, output
        return {view["phase"]: view for view in json.loads(output)["runs"]}

    def queue(self) -> list[str]:
        """Jobs of the chain that wait or run."""
        states = "PENDING,RUNNING,SUSPENDED,CONFIGURING"
        listed = self.cluster.sandbox.run("squeue", "-h", "-t", states, "-o", "%i %k").splitlines()
        own = {self.job(phase) for phase in PHASES}
        return [line for line in listed if line.split()[0] in own]


@pytest.fixture
def chain(cluster: Cluster) -> Chain:
    return Chain(cluster)


@pytest.fixture(scope="module")
def undisturbed(session_folder: Path) -> dict[str, RunPaths]:
    """The same chain on this machine."""
    lab, root = Lab(session_folder, session_folder / "packed"), session_folder / "undisturbed"
    what = ["--phase", "sanity_check", "--through", "medium", "--cluster", "local", "--run-dir", str(root)]
    code, output = lab.run("launchers.submit", *what, *lab.arguments())
    assert code == 0, output
    return {phase: RunPaths(root / phase) for phase in PHASES}


def test_chain_goes_through_a_time_out_and_a_node_crash(
    chain: Chain, undisturbed: dict[str, RunPaths], eventually: Eventually
):
    """Both in the second phase; its gate, the weights that are handed on and the third phase are as undisturbed."""
    code, output = chain.submit()
    assert code == 0, output
    second, job = chain.runs["validation"], chain.job("validation")
    assert chain.status()["medium"]["words"].endswith("(Dependency), after validation")
    wait_until(lambda: second.attempt(0).steps.exists(), "the second phase begins")
    wait_for_step(second, 5)
    chain.cluster.slurm("scancel", "--signal=USR2", job)  # what Slurm sends before the time limit
    eventually(lambda: chain.cluster.state(job) == "PENDING", 60)
    lift_hold(chain.cluster.sandbox, job)
    wait_for_step(second, 12, attempt=1)
    with standing_still(second):  # the phase would be over before Slurm believes the crash
        chain.cluster.sandbox.crash("n2")
        eventually(lambda: chain.cluster.state(job) != "RUNNING", 90)
    chain.cluster.sandbox.heal("n2")
    eventually(lambda: chain.cluster.state(job) == "PENDING", 60)
    lift_hold(chain.cluster.sandbox, job)
    code, output = chain.submit("--wait")
    assert code == 0, output
    assert len(second.attempt_numbers()) == 3 and outcome(second)["cause"] == "signalled"
    for before, phase in zip((None, *PHASES), PHASES, strict=False):
        ours, twin = chain.runs[phase], undisturbed[phase]
        assert losses(ours) == losses(twin)
        gate, expected = chain.gate(phase), read_gate(twin, TrainingPhase(phase))
        assert gate.passed and expected and gate.weights_digest == expected.weights_digest
        assert all(item.value is not None and item.measured for item in gate.evidence)
        origin = read_origin(ours)
        assert (origin is None) == (before is None)
        if before and origin:
            assert origin.proved and origin.weights_digest == chain.gate(before).weights_digest
    assert {view["state"] for view in chain.status().values()} == {"complete"}
    assert output.splitlines()[-1].split()[:4] == ["chain/medium", "medium", "complete", "passed"]  # one table
    assert chain.queue() == []


def test_diverging_run_is_stopped_by_a_named_gate(chain: Chain):
    """At a thousand times its learning rate: the later phases never start, and the queue is empty."""
    code, output = chain.submit("--wait", "--set", "training.learning_rate=10")
    assert code == ExitCode.GATE_NOT_PASSED, output
    closed = chain.gate("sanity_check")
    assert not closed.passed and closed.failures
    assert chain.queue() == []
    view = chain.status()["sanity_check"]
    assert view["gate"]["passed"] is False and "gate not passed" in view["words"]
    for phase in ("validation", "medium"):
        assert chain.runs[phase].attempt_numbers() == []
        assert chain.cluster.history(chain.job(phase))[0].startswith("CANCELLED")
        view = chain.status()[phase]
        assert view["state"] == "blocked" and closed.failures[0].gate in view["words"]
    # the same command goes on where the gate is closed, and comes to the same verdict
    code, output = chain.submit("--wait", "--set", "training.learning_rate=10")
    assert code == ExitCode.GATE_NOT_PASSED, output
    assert chain.queue() == []
    assert chain.runs["validation"].attempt_numbers() == []


def test_chain_in_one_allocation_is_one_job(chain: Chain, undisturbed: dict[str, RunPaths], eventually: Eventually):
    """Requeued in its second phase, it goes through the first without an attempt."""
    code, output = chain.submit("--in-one-allocation")
    assert code == 0, output
    assert len({chain.job(phase) for phase in PHASES}) == 1
    second, job = chain.runs["validation"], chain.job("validation")
    wait_until(lambda: second.attempt(0).steps.exists(), "the second phase begins")
    wait_for_step(second, 5)
    with standing_still(second):  # the phase would be over before status has told
        assert chain.status()["medium"]["words"] == f"waits for validation in job {job}, which is RUNNING"
        chain.cluster.slurm("scancel", "--signal=USR2", job)
    eventually(lambda: chain.cluster.state(job) == "PENDING", 60)
    lift_hold(chain.cluster.sandbox, job)
    code, output = chain.submit("--in-one-allocation", "--wait")
    assert code == 0, output
    assert [len(chain.runs[phase].attempt_numbers()) for phase in PHASES] == [1, 2, 1]
    assert all(losses(chain.runs[phase]) == losses(undisturbed[phase]) for phase in PHASES)
    eventually(lambda: chain.cluster.history(job) == ["REQUEUED", "COMPLETED"], 10)


def test_warning_at_any_moment_between_two_phases_of_one_job(
    chain: Chain, undisturbed: dict[str, RunPaths], eventually: Eventually
):
    """Before, while and after the job becomes that of the next phase: it lives, and is started again."""
    code, output = chain.submit("--in-one-allocation", through="validation")
    assert code == 0, output
    first, job = chain.runs["sanity_check"], chain.job("validation")
    wait_until(lambda: first.attempt(0).result.is_file(), "the first phase's ranks have ended")
    while chain.cluster.state(job) == "RUNNING":
        chain.cluster.slurm("scancel", "--signal=USR2", job)
    eventually(lambda: chain.cluster.state(job) == "PENDING", 60)
    lift_hold(chain.cluster.sandbox, job)
    code, output = chain.submit("--in-one-allocation", "--wait", through="validation")
    assert code == 0, output
    assert all(losses(chain.runs[phase]) == losses(undisturbed[phase]) for phase in PHASES[:2])
    assert first.attempt_numbers() == [0]


def test_successors_of_a_phase_are_waited_for(chain: Chain, undisturbed: dict[str, RunPaths], eventually: Eventually):
    """Where a job is continued by another one, the next phase waits for that, too."""
    code, output = chain.submit("--continue-by", "successor", through="validation")
    assert code == 0, output
    first, job = chain.runs["sanity_check"], chain.job("sanity_check")
    wait_for_step(first, 10)
    chain.cluster.slurm("scancel", "--signal=USR2", job)
    code, output = chain.submit("--continue-by", "successor", "--wait", through="validation")
    assert code == 0, output
    assert [losses(chain.runs[phase]) == losses(undisturbed[phase]) for phase in PHASES[:2]] == [True, True]
    assert len(first.attempt_numbers()) == 2
    declined = [record for record in read_json_lines(chain.runs["validation"].events) if record["event"] == "submitted"]
    assert len(declined) == 1  # its one job waited for both of the first phase's


def test_phase_by_hand_runs_the_missing_ones_first(
    chain: Chain, undisturbed: dict[str, RunPaths], eventually: Eventually
):
    log = chain.cluster.lab.root / "job.out"
    size = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10", f"--output={log}"]
    export = f"--export=ALL,OMP_WAIT_POLICY=PASSIVE,SLURM_CONF={chain.cluster.sandbox.layout.slurm_conf}"
    repository = MICRO.parents[1]
    what = [
        "--config",
        str(MICRO),
        "--run-dir",
        str(chain.root),
        "--set",
        f"data.packed_dir={chain.cluster.lab.packed}",
    ]
    script = str(repository / "slurm" / "validation.sbatch")
    job = chain.cluster.slurm("sbatch", "--parsable", *size, f"--chdir={repository}", export, script, *what).strip()
    second = chain.runs["validation"]
    wait_until(
        lambda: second.attempt(0).steps.exists() or chain.cluster.state(job) in ("FAILED", "COMPLETED"), "it runs"
    )
    assert second.attempt(0).steps.exists(), log.read_text()
    wait_for_step(second, 5)
    chain.cluster.slurm("scancel", "--signal=USR2", job)
    eventually(lambda: chain.cluster.state(job) == "PENDING", 60)
    lift_hold(chain.cluster.sandbox, job)
    eventually(lambda: chain.cluster.history(job) == ["REQUEUED", "COMPLETED"], 120)
    assert all(losses(chain.runs[phase]) == losses(undisturbed[phase]) for phase in PHASES[:2])
    assert [len(chain.runs[phase].attempt_numbers()) for phase in PHASES[:2]] == [1, 2]


def test_cancelled_chain_leaves_nothing_in_the_queue(chain: Chain, eventually: Eventually):
    code, output = chain.submit()
    assert code == 0, output
    wait_for_step(chain.runs["sanity_check"], 5)
    code, output = chain.cluster.run("launchers.cancel", "--root", str(chain.root.parent), "chain")
    assert code == 0, output
    eventually(lambda: chain.queue() == [], 60)
    assert ledger(chain.runs["medium"].events, "cancelled")
    code, output = chain.submit("--wait")
    assert code == 0, output
