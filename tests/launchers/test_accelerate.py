"""``--launcher accelerate``: another launcher starts the ranks, and the run is the same."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from encdec.files import ACCELERATE_CONFIGS, RunPaths
from encdec.records import read_json_lines
from launchers.nodes.accelerated import arguments, torchrun_variables
from launchers.nodes.parts import NodeJob
from tests.conftest import Lab, agent_of, losses, wait_for_step, wait_until

ACCELERATE = ("--launcher", "accelerate")


def programs_of(paths: RunPaths) -> list[psutil.Process]:
    """The ranks of a running attempt, in order: under Accelerate they are the agent's own children."""
    ranks = [child for child in agent_of(paths).children() if "encdec.train" in child.cmdline()]
    return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))


def outcome(paths: RunPaths, attempt: int = 0) -> dict:
    return json.loads(paths.attempt(attempt).outcome.read_text())


def ledger(paths: RunPaths, kind: str) -> list[dict]:
    return [record for record in read_json_lines(paths.attempt(0).events("node-0")) if record["event"] == kind]


def test_accelerate_computes_what_torchrun_computes(lab: Lab, twin: RunPaths, twin_digest: str):
    paths = RunPaths(lab.root / "costs $$ [1]")
    process = lab.start_submit(paths.root, *ACCELERATE)
    wait_for_step(paths, 5)
    ranks = programs_of(paths)
    assert len(ranks) == 2
    for rank in ranks:  # accelerate launch was there, with the file of the run
        environment = rank.environ()
        assert (environment["ACCELERATE_USE_FSDP"], environment["FSDP_VERSION"]) == ("true", "2")
        assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert losses(paths) == losses(twin)
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest
    ended = outcome(paths)
    assert (ended["cause"], ended["step"], ended["restarts"]) == ("complete", 60, 0)
    assert ended["checkpoint_verified"] and ended["first_loss"] == outcome(twin)["first_loss"]
    assert [line["launcher"] for line in ledger(paths, "agent_ready")] == ["accelerate"]
    assert paths.attempt(0).heartbeat(0).exists()
    logs = {path.name for path in paths.attempt(0).rank_logs(0).iterdir()}
    assert logs == {f"rank-{rank}.restart-0.{stream}" for rank in (0, 1) for stream in ("out", "err")}
    assert f"code: {paths.code / 'encdec'}" in (paths.attempt(0).rank_logs(0) / "rank-0.restart-0.err").read_text()


def test_killed_rank_is_started_again_inside_the_same_attempt(lab: Lab, twin: RunPaths, twin_digest: str):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root, *ACCELERATE)
    wait_for_step(paths, 20)
    programs_of(paths)[1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert paths.attempt_numbers() == [0]
    assert outcome(paths)["restarts"] == 1
    assert "started again in place" in output
    [failure] = ledger(paths, "rank_failed")
    assert "rank 1 ended with exit code -9 by SIGKILL" in failure["detail"]
    assert (failure["rank"], failure["exit_code"], failure["restart"]) == (1, -9, 0)
    assert losses(paths) == losses(twin)
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest


def test_warned_run_goes_on_under_the_other_launcher(lab: Lab, twin: RunPaths, twin_digest: str):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root, *ACCELERATE)
    wait_for_step(paths, 20)
    for warned in [agent_of(paths), *programs_of(paths)]:  # as Slurm may: every process
        warned.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    ended = outcome(paths)
    assert (ended["cause"], ended["checkpoint"], ended["restarts"]) == ("signalled", f"step-{ended['step']}", 0)
    code, output = lab.submit(paths.root)
    assert code == 0, output
    steps = [[record["step"] for record in read_json_lines(paths.attempt(n).steps)] for n in (0, 1)]
    assert steps == [list(range(1, ended["step"] + 1)), list(range(ended["step"] + 1, 61))]
    assert losses(paths) == losses(twin)
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest


def test_early_warning_and_termination_do_not_kill_ranks_that_still_start(lab: Lab):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root, *ACCELERATE)
    logs = paths.attempt(0).rank_logs(0)
    wait_until(lambda: list(logs.glob("*.err")), "the ranks are started")
    for number in (signal.SIGUSR2, signal.SIGTERM):
        for told in [agent_of(paths), *programs_of(paths)]:
            told.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert (outcome(paths)["cause"], outcome(paths)["restarts"]) == ("signalled", 0)


def test_refusal_is_told_and_not_tried_again(lab: Lab):
    paths = RunPaths(lab.root / "run")
    text = lab.root / "text.txt"
    text.write_text("too little for one sample")
    code, output = lab.submit(paths.root, *ACCELERATE, "--set", f"data.dataset_name={text}")
    assert code == 78, output
    assert (outcome(paths)["cause"], outcome(paths)["restarts"]) == ("refused", 0)
    assert json.loads(paths.attempt(0).error.read_text())["message"] == outcome(paths)["message"]


def test_ranks_die_with_their_agent(lab: Lab):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root, *ACCELERATE)
    wait_for_step(paths, 5)
    ranks = programs_of(paths)
    agent_of(paths).send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert len(ranks) == 2 and not alive
    process.communicate(timeout=60)


def test_run_without_accelerate_s_configuration_is_refused(lab: Lab, twin: RunPaths):
    """As every run of an installed package is, which has no configs/."""
    file = twin.code / ACCELERATE_CONFIGS["fsdp"]
    content = file.read_bytes()
    file.unlink()
    try:
        code, output = lab.submit(twin.root, *ACCELERATE)
    finally:
        file.write_bytes(content)
    assert code == 78
    assert output.startswith("error: accelerate launch needs its configuration file") and str(file) in output


@pytest.mark.parametrize(
    ("place", "endpoint", "expected"),
    [
        (
            {"nodes": 1, "node_rank": 0},
            "localhost:0",
            ("1", "0", "4", "localhost", "0", "is_host=True,read_timeout=600"),
        ),
        (
            {"nodes": 3, "node_rank": 2},
            "10.0.0.1:20007",
            ("3", "2", "12", "10.0.0.1", "20007", "is_host=False,read_timeout=600"),
        ),
    ],
    ids=["one node", "the last of three"],
)
def test_arguments_follow_from_the_node_s_place(place: dict, endpoint: str, expected: tuple[str, ...]):
    job = NodeJob(
        run_dir="/runs/a", attempt=5, ranks=4, endpoint=endpoint, rendezvous_id="7.0.0", max_restarts=3, **place
    )
    words = arguments(job, Path("/logs"))
    names = ("num_machines", "machine_rank", "num_processes", "main_process_ip", "main_process_port", "rdzv_conf")
    assert tuple(words[words.index(f"--{name}") + 1] for name in names) == expected
    assert words[words.index("-m") :][:6] == ["-m", "encdec.train", "--run_dir", "/runs/a", "--attempt", "5"]
    assert torchrun_variables(job)["PET_RDZV_ENDPOINT"] == endpoint
