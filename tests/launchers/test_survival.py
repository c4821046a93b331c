"""Kills and stops of real local runs: each ends bit-identical to the run that nobody disturbed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from encdec.checkpoints import logical_digest
from encdec.files import RunPaths
from encdec.records import read_json_lines
from tests.conftest import Lab, agent_of, kill_everything, losses, ranks_of, wait_for_step, wait_until


def outcome(paths: RunPaths, attempt: int = 0) -> dict:
    return json.loads(paths.attempt(attempt).outcome.read_text())


def test_uninterrupted_run_ends_complete_and_verified(twin: RunPaths):
    ended = outcome(twin)
    assert (ended["cause"], ended["exit_code"], ended["step"], ended["restarts"]) == ("complete", 0, 60, 0)
    assert ended["checkpoint_verified"] is True
    assert ended["first_loss"] - ended["last_loss"] >= 0.2
    assert sorted(losses(twin)) == list(range(1, 61))
    assert json.loads((twin.gates / "sanity_check.json").read_text())["passed"] is True


def test_killed_rank_is_started_again_inside_the_same_attempt(lab: Lab, twin: RunPaths, twin_digest: str):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root)
    wait_for_step(paths, 20)
    ranks_of(paths)[-1].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert paths.attempt_numbers() == [0]
    assert outcome(paths)["restarts"] == 1
    assert "started again in place" in output
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest
    assert losses(paths) == losses(twin)


def test_killed_job_is_resumed_by_the_same_command(lab: Lab, twin: RunPaths, twin_digest: str):
    paths = RunPaths(lab.root / "run")
    first = lab.start_submit(paths.root)
    wait_for_step(paths, 40)
    ranks = ranks_of(paths)
    kill_everything(paths)
    output, _ = first.communicate(timeout=60)
    assert first.returncode != 0
    assert "give the same command again" in output
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    code, output = lab.submit(paths.root)
    assert code == 0, output
    assert paths.attempt_numbers() == [0, 1]
    resumed_at = min(record["step"] for record in read_json_lines(paths.attempt(1).steps))
    assert resumed_at == 31  # the newest checkpoint before step 40 is step-30
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest
    assert losses(paths) == losses(twin)


def test_ranks_die_with_their_agent(lab: Lab):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root)
    wait_for_step(paths, 5)
    ranks = ranks_of(paths)
    assert len(ranks) >= 2
    agent_of(paths).send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    process.communicate(timeout=60)


def test_warning_signal_saves_at_the_step_and_loses_none(lab: Lab, twin: RunPaths, twin_digest: str):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root)
    wait_for_step(paths, 20)
    agent_of(paths).send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    ended = outcome(paths)
    assert ended["cause"] == "signalled"
    assert ended["checkpoint"] == f"step-{ended['step']}"
    code, output = lab.submit(paths.root)
    assert code == 0, output
    assert min(r["step"] for r in read_json_lines(paths.attempt(1).steps)) == ended["step"] + 1  # none computed twice
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest
    assert losses(paths) == losses(twin)


def test_ctrl_c_finishes_the_step_and_saves(lab: Lab):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root)
    wait_for_step(paths, 20)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "finishing the step" in output
    assert outcome(paths)["checkpoint_verified"] is True
    assert outcome(paths)["message"].startswith("stopped by SIGINT")


def test_control_files_save_and_stop(lab: Lab):
    paths = RunPaths(lab.root / "run")
    no_schedule = ("--set", "training.save_steps=1000", "--set", "training.num_train_steps=300")
    process = lab.start_submit(paths.root, *no_schedule)
    wait_for_step(paths, 3)
    paths.save_request.touch()
    wait_until(lambda: not paths.save_request.exists(), "the save request is taken")
    paths.stop_request.touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    saved = [r["step"] for r in read_json_lines(paths.attempt(0).events("rank-0")) if r["event"] == "saved"]
    assert len(saved) == 2  # one asked for by SAVE, one made by STOP
    assert saved[0] < saved[1] < 300
    assert outcome(paths)["cause"] == "stop_requested"
    code, output = lab.submit(paths.root, *no_schedule)  # the old request does not stop the new attempt
    assert code == 0, output


def test_deterministic_crash_is_given_up(lab: Lab):
    """A rank that dies again and again without a new step is not restarted for ever."""
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root)
    for restart in range(5):
        log = paths.attempt(0).rank_logs(0) / f"rank-1.restart-{restart}.err"
        wait_until(lambda log=log: log.exists() or process.poll() is not None, f"start {restart} of the ranks")
        if process.poll() is not None:
            break
        wait_until(lambda: len(ranks_of(paths)) >= 2 or process.poll() is not None, "ranks run")
        for rank in ranks_of(paths)[-1:]:
            rank.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert outcome(paths)["cause"] == "crash"
    assert "SIGKILL" in outcome(paths)["message"]


def kill_at(paths: RunPaths, folder: Path, pattern: str) -> None:
    """SIGKILL everything while ``folder`` holds a ``pattern``.

    Such moments are milliseconds: the ranks run in slices of one, and are looked at while they stand still.
    """
    wait_until(lambda: paths.attempt(0).process.exists() and len(ranks_of(paths)) >= 2, "the ranks are there")
    ranks = ranks_of(paths)
    while all(rank.is_running() for rank in ranks):
        for rank in ranks:
            rank.suspend()
        if any(folder.glob(pattern)):
            kill_everything(paths)
            assert any(folder.glob(pattern))
            return
        for rank in ranks:
            rank.resume()
        time.sleep(0.001)
    pytest.fail(f"the ranks ended before {folder} was seen with {pattern}")


@pytest.mark.parametrize("written", ["fsdp2/.metadata", "manifest.json"])
def test_kill_in_the_middle_of_a_save(lab: Lab, twin: RunPaths, twin_digest: str, written: str):
    """The payload is complete without a manifest; the manifest is there, but the folder has not got its name."""
    paths = RunPaths(lab.root / "run")
    often = ("--set", "training.save_steps=4")
    process = lab.start_submit(paths.root, *often)
    wait_for_step(paths, 4)
    kill_at(paths, paths.checkpoints, f"step-*.tmp-0/{written}")
    process.communicate(timeout=60)
    code, output = lab.submit(paths.root, *often)
    assert code == 0, output
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest
    assert losses(paths) == losses(twin)
    assert not list(paths.checkpoints.glob("*.tmp-*"))


@pytest.mark.parametrize("made", ["tokenizer", "packed"])
def test_kill_while_text_is_prepared(lab: Lab, twin: RunPaths, twin_digest: str, made: str):
    paths = RunPaths(lab.root / "run")
    lab.packed = lab.root / "packed"
    process = lab.start_submit(paths.root)
    kill_at(paths, lab.packed, f".{made}-*.tmp")
    assert not list(lab.packed.glob(f"{made}-*[!k]"))  # but for its .lock
    process.communicate(timeout=60)
    code, output = lab.submit(paths.root)
    assert code == 0, output
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest
    assert losses(paths) == losses(twin)


def test_run_that_is_killed_after_it_stopped_early_goes_no_further(lab: Lab):
    """No fall of the loss counts: the check at step 52 sets the mark, the next one ends the run."""
    settings = {"eval_steps": 4, "early_stopping_min_delta": 100.0, "early_stopping_patience": 1}
    strict = [word for name, value in settings.items() for word in ("--set", f"training.{name}={value}")]
    alone, paths = RunPaths(lab.root / "alone"), RunPaths(lab.root / "run")
    code, output = lab.submit(alone.root, *strict)
    assert code == 0, output
    assert outcome(alone)["step"] == 56
    assert "stopped early" in outcome(alone)["message"]
    process = lab.start_submit(paths.root, *strict)
    wait_for_step(paths, 50)
    kill_at(paths, paths.checkpoints, "step-56")
    process.communicate(timeout=60)
    assert not paths.attempt(0).outcome.exists()
    code, output = lab.submit(paths.root, *strict)
    assert code == 0, output
    same = ("cause", "step", "message", "first_loss", "last_loss")
    assert [outcome(paths, attempt=1)[name] for name in same] == [outcome(alone)[name] for name in same]
    assert logical_digest(paths.checkpoints / "step-56") == logical_digest(alone.checkpoints / "step-56")
    assert losses(paths) == losses(alone)
