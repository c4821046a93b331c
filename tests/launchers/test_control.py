"""Cancel and requeue: what Slurm is told, in which order, and what a person is told. The real thing: tests/slurm."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from encdec.errors import ConfigError
from encdec.files import RunPaths
from encdec.records import Outcome, read_json_lines, read_record
from launchers import cancel, requeue
from launchers.control import save
from launchers.run_directory import note
from launchers.status import main as status
from tests.conftest import Lab, agent_of, losses, ranks_of, wait_for_step
from tests.launchers.conftest import UNREACHABLE, Play, Story

KILL_WAIT = "Configuration data as of 2026-11-21T09:41:45\nKillWait                = 30 sec\n"
RUNNING = "12|RUNNING|None|2026-11-21T09:39:56\n"


@pytest.fixture
def slurm(play: Play) -> Play:
    """Slurm that does what it is told; squeue lists a job until it is cancelled."""
    play("scontrol", KILL_WAIT)
    lists = play.folder / "listed"
    for command, does in (("squeue", f"cat {lists}"), ("scancel", f"sed -i /^$1/d {lists}")):
        script = play.folder / command
        script.write_text(f'#!/bin/sh\necho "$@" >> {play.folder}/{command}.calls\n{does}\n')
        script.chmod(0o755)
    lists.touch()
    return play


def listed(slurm: Play, text: str) -> None:
    (slurm.folder / "listed").write_text(text)


def run(command, runs: Path, *words: str) -> int:
    return command.main([*words, "--root", str(runs)])


@pytest.fixture
def running(story: Story, slurm: Play) -> Story:
    """Job 12 runs attempt 0 on one node, and everybody listens."""
    story.job("12")
    story.attempt("12", steps=range(1, 10))
    story.runs_in("12")
    story.tell("agent_ready", node=0)
    listed(slurm, RUNNING)
    return story


# ---- cancel


def test_successor_is_cancelled_before_it_could_start(running: Story, runs: Path, slurm: Play, capsys):
    running.runs_in("12", "13")
    listed(slurm, RUNNING + "13|PENDING|Dependency|N/A\n")
    assert run(cancel, runs, "medium") == 0
    assert slurm.calls("scancel") == ["13", "12"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("medium-1: job 13, which was waiting, is cancelled")
    assert "job 12 is cancelled: it finishes its step, saves and ends, nothing is requeued" in second
    assert running.paths.stop_request.exists()  # whatever brings a job back stops at once
    assert status(["medium", "--root", str(runs), "--json"]) == 0
    assert '"state": "cancelled"' in capsys.readouterr().out
    assert run(cancel, runs, "medium") == 0
    assert "medium-1: nothing of it is live: cancelled by user" in capsys.readouterr().out
    assert slurm.calls("scancel") == ["13", "12"]


def test_successor_queued_meanwhile_is_found(running: Story, runs: Path, slurm: Play):
    script = slurm.folder / "scancel"
    late = '{"job": "12", "successor": "14"}'
    queue = f"[ $1 = 12 ] && echo '{late}' > {running.paths.continuation} && echo '14|PENDING|Dependency|N/A' >> "
    script.write_text(script.read_text() + f"{queue}{slurm.folder}/listed\nexit 0\n")
    assert run(cancel, runs, "medium") == 0
    assert slurm.calls("scancel") == ["12", "14"]


def test_cancel_now_kills_the_tasks_before_the_job(running: Story, runs: Path, slurm: Play, capsys):
    assert run(cancel, runs, "medium", "--now") == 0
    assert slurm.calls("scancel") == ["--signal=KILL 12.0", "12"]
    assert "from its newest checkpoint the same submit command continues it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("facts", "stop"),
    [('"seconds": 40.0', 80), ('"seconds": 40.0, "blocking_seconds": 1.0', 120)],
    ids=["written and read back", "another may be on its way in the background"],
)
def test_save_longer_than_slurm_waits_is_left_to_the_request(
    running: Story, runs: Path, slurm: Play, capsys, facts: str, stop: int
):
    with (running.newest.events("rank-0")).open("w") as ledger:
        ledger.write(f'{{"event": "saved", {facts}}}\n')
    running.runs_in("12", "13")
    listed(slurm, RUNNING + "13|PENDING|Dependency|N/A\n")
    assert run(cancel, runs, "medium") == 0
    assert slurm.calls("scancel") == ["13"]
    words = capsys.readouterr().out
    assert f"a stop took up to {stop} s so far, and Slurm kills a cancelled job after 30 s" in words
    assert running.paths.stop_request.exists()


def test_job_that_slurm_will_not_cancel(running: Story, runs: Path, slurm: Play, capsys):
    slurm("squeue", err=UNREACHABLE, code=1)
    slurm("scancel", err="scancel: error: Kill job error on job id 12: Access/permission denied", code=1)
    assert run(cancel, runs, "medium") == 1
    words = capsys.readouterr().err
    assert "job 12 (UNKNOWN): scancel: error: Kill job error on job id 12: Access/permission denied" in words
    assert not list(read_json_lines(running.paths.events))


def test_all_names_are_understood_before_anything_is_cancelled(running: Story, runs: Path, slurm: Play, capsys):
    assert run(cancel, runs, "medium-1", "unknown") == 78
    assert not slurm.calls("scancel")
    assert run(cancel, runs, "medium-1", "medium-1") == 0  # named twice: once, and nobody is asked
    assert slurm.calls("scancel") == ["12"]


def test_run_that_cannot_be_cancelled_spares_no_other(running: Story, runs: Path, slurm: Play, capsys):
    Story(RunPaths(runs / "large")).begin().attempt(host="elsewhere")
    assert run(cancel, runs, "large", "medium") == 78
    assert slurm.calls("scancel") == ["12"]
    assert "attempt 0 on elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "cancelled"), [("y", True), ("", False), ("n", False), (None, False)])
def test_several_runs_are_asked_for_at_a_terminal(
    running: Story, runs: Path, slurm: Play, monkeypatch: pytest.MonkeyPatch, answer: str | None, cancelled: bool
):
    Story(RunPaths(runs / "small")).begin()

    def input_(question: str) -> str:
        assert question == "cancel 2 runs (medium-1, small)? [y/N] "
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", input_)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert run(cancel, runs, "medium-1", "small") == 0
    assert bool(slurm.calls("scancel")) is cancelled


def test_local_run_saves_and_continues(lab: Lab, capfd):
    run_dir = lab.root / "runs" / "tiny"
    process = lab.start_submit(run_dir, "--set", "training.num_train_steps=2000", "--set", "training.save_steps=1000")
    paths = RunPaths(run_dir)
    wait_for_step(paths, 5)
    assert status([str(run_dir)]) == 0
    assert "running here" in capfd.readouterr().out
    assert cancel.main([str(run_dir)]) == 0
    assert "finishes its step, saves and ends" in capfd.readouterr().out
    assert process.wait(60) == 75
    assert read_record(paths.attempt(0).outcome, Outcome).message.startswith("stopped by SIGTERM")
    assert status([str(run_dir)]) == 0
    words = capfd.readouterr().out
    assert "cancelled by user" in words and "next: cd " in words and "-m launchers.submit --phase" in words

    process = lab.start_submit(run_dir, "--set", "training.num_train_steps=2000", "--set", "training.save_steps=1000")
    wait_for_step(paths, max(losses(paths)) + 1, attempt=1)
    agent, ranks = agent_of(paths, 1), ranks_of(paths, 1)
    assert ranks
    assert requeue.main([str(run_dir)]) == 78
    assert "outside Slurm" in capfd.readouterr().err
    assert cancel.main([str(run_dir), "--now"]) == 0
    assert not any(psutil.pid_exists(one.pid) and one.status() != "zombie" for one in [agent, *ranks])
    assert process.wait(60) == 1
    assert not paths.attempt(1).outcome.exists()


def test_run_on_another_machine_is_cancelled_there(story: Story, runs: Path, slurm: Play, capsys):
    story.attempt(host="elsewhere")
    assert run(cancel, runs, "medium") == 78
    assert "attempt 0 on elsewhere" in capsys.readouterr().err


def test_run_of_another_user(story: Story, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    process = psutil.Process(os.getppid())
    story.attempt(host=socket.gethostname(), pid=process.pid)
    record = story.newest.process.read_text().replace('"created": 1001.0', f'"created": {process.create_time()}')
    story.newest.process.write_text(record)

    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr("os.kill", forbidden)
    assert run(cancel, runs, "medium") == 1
    assert "attempt 0 of another user" in capsys.readouterr().err


# ---- save


def test_run_that_lives_is_asked_to_save(running: Story, slurm: Play):
    assert save(running.paths) == "attempt 0 saves at its next step boundary and goes on"
    assert running.paths.save_request.exists()
    assert [record["event"] for record in read_json_lines(running.paths.events)] == ["save_asked"]
    assert not slurm.calls("squeue")


def test_run_that_cannot_see_the_request_is_told_so(story: Story, slurm: Play):
    with pytest.raises(ConfigError, match="not begun"):
        save(story.paths)
    story.attempt("12")
    for sign in (story.newest.heartbeat(0), story.newest.process):
        os.utime(sign, (1000, 1000))
    with pytest.raises(ConfigError, match="attempt 0, not heard of for"):
        save(story.paths)
    story.newest.heartbeat(0).touch()
    story.end("stop_requested", 75)
    with pytest.raises(ConfigError, match="attempt 0, which has ended"):
        save(story.paths)
    assert not story.paths.save_request.exists()


# ---- requeue


def test_running_job_is_warned(running: Story, runs: Path, slurm: Play, capsys):
    assert run(requeue, runs, "medium") == 0
    assert slurm.calls("scancel") == ["--signal=USR2 12"]
    assert "job 12 finishes its step and saves" in capsys.readouterr().out


def test_running_job_is_requeued_now(running: Story, runs: Path, slurm: Play):
    assert run(requeue, runs, "medium", "--now") == 0
    assert slurm.calls("scontrol")[-1] == "requeue 12"
    assert not slurm.calls("scancel")


@pytest.mark.parametrize(
    ("reason", "calls"),
    [
        ("BeginTime", ["update jobid=12 StartTime=now+2"]),
        ("JobHeldUser", ["release 12", "update jobid=12 StartTime=now+2"]),
        ("launch failed requeued held", ["release 12", "update jobid=12 StartTime=now+2"]),
        ("Priority", ["update jobid=12 StartTime=now+2"]),
    ],
)
def test_waiting_job_may_start_now(running: Story, runs: Path, slurm: Play, capsys, reason: str, calls: list[str]):
    listed(slurm, f"12|PENDING|{reason}|N/A\n")
    assert run(requeue, runs, "medium") == 0
    assert slurm.calls("scontrol") == calls
    assert reason in capsys.readouterr().out


def test_job_whose_nodes_do_not_listen_yet_is_left_alone(running: Story, runs: Path, slurm: Play, capsys):
    running.newest.events("node-0").unlink()
    assert run(requeue, runs, "medium") == 78
    assert "0 of 1 in job 12" in capsys.readouterr().err
    assert not slurm.calls("scancel")


def test_last_attempt_that_the_limits_allow_is_not_asked_to_save(running: Story, runs: Path, slurm: Play, capsys):
    running.paths.launch.write_text('{"max_attempts": 1}')
    assert run(requeue, runs, "medium") == 78
    assert "--max-attempts allows 1" in capsys.readouterr().err
    assert not slurm.calls("scancel")


def test_ended_job_needs_the_submit_command(running: Story, runs: Path, slurm: Play, capsys):
    note(running.paths, "command", text="python -m launchers.submit --phase medium", directory="/home/me")
    listed(slurm, "12|FAILED|None|N/A\n")
    assert run(requeue, runs, "medium") == 78
    assert "Start it again: cd /home/me && python -m launchers.submit --phase medium." in capsys.readouterr().err


def test_slurm_says_no(running: Story, runs: Path, slurm: Play, capsys):
    slurm("scancel", err="scancel: error: Kill job error on job id 12: Access/permission denied", code=1)
    assert run(requeue, runs, "medium") == 1
    assert "Access/permission denied" in capsys.readouterr().err
