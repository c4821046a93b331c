"""What people, disks and other machines do to a run directory: one paragraph and a way on, never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from encdec.files import RunPaths
from launchers.run_status import read_status
from launchers.submit import main
from launchers.views.show import sparkline
from tests.conftest import REPOSITORY, Lab, agent_of, losses, wait_for_step, wait_until

MANY_STEPS = ("--set", "training.save_steps=1000", "--set", "training.num_train_steps=2000")


def complaint(output: str) -> str:
    """The one error line."""
    assert "Traceback" not in output, output
    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def ended(lab: Lab, twin: RunPaths) -> RunPaths:
    """A copy of the twin, to be ill-treated."""
    shutil.copytree(twin.root, lab.root / "run", symlinks=True)
    return RunPaths(lab.root / "run")


DAMAGES = [
    ("outcome", ""),
    ("outcome", "{}"),
    ("outcome", "[1]"),
    ("outcome", '{"cause": "complete"'),
    ("outcome", "\0\0\0\0"),
    ("process", "{}"),
    ("process", '{"host": 3, "pid": "x", "created": null}'),
    ("job", "{}"),
]


@pytest.mark.parametrize(("record", "content"), DAMAGES)
def test_damaged_record_is_named(lab: Lab, ended: RunPaths, capsys, record: str, content: str):
    attempt = ended.attempt(0)
    attempt.outcome.unlink()
    damaged = {"outcome": attempt.outcome, "process": attempt.process, "job": ended.job}[record]
    damaged.write_text(content)
    command = ["--phase", "sanity_check", "--cluster", "local", "--run-dir", str(ended.root), *lab.arguments()]
    assert main(command) == 78
    words = complaint(capsys.readouterr().err)
    assert "must be whole" in words and f"found {damaged} (" in words
    assert ended.attempt_numbers() == [0]


def test_damaged_outcome_may_be_deleted_as_the_message_says(lab: Lab, ended: RunPaths):
    ended.attempt(0).outcome.unlink()
    code, output = lab.submit(ended.root)
    assert code == 0, output
    assert ended.attempt_numbers() == [0, 1]


def test_strange_things_among_the_attempts_do_no_harm(lab: Lab, ended: RunPaths):
    (ended.attempts / "7").write_text("a file")
    (ended.attempts / "notes").mkdir()
    with ended.attempt(0).steps.open("a") as steps:
        steps.write('{}\n{"step": "a"}\n[]\n')
    code, output = lab.submit(ended.root)
    assert code == 0 and "nothing left to do" in output and "60 of 60" in output
    ended.attempt(0).outcome.unlink()
    code, output = lab.submit(ended.root)
    assert code == 0, output
    assert ended.attempt_numbers() == [0, 8]


@pytest.mark.parametrize("folder", ["attempts", "checkpoints", "gates", "control"])
def test_file_in_the_place_of_a_folder_is_refused(lab: Lab, ended: RunPaths, folder: str):
    ended.attempt(0).outcome.unlink()
    shutil.rmtree(ended.root / folder)
    (ended.root / folder).touch()
    code, output = lab.submit(ended.root)
    assert code == 78
    assert str(ended.root / folder) in complaint(output)


def test_closed_output_is_no_error(lab: Lab, twin: RunPaths):
    closed = ("sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable)
    arguments = ["--phase", "sanity_check", "--cluster", "local", "--run-dir", str(twin.root), *lab.arguments()]
    code, output = lab.run("launchers.submit", *arguments, launcher=closed)
    assert (code, output) == (0, "")


def test_deleted_attempts_are_not_missed(lab: Lab, ended: RunPaths):
    ended.attempt(0).root.rename(ended.attempt(4).root)
    code, output = lab.submit(ended.root)
    assert code == 0, output
    assert "attempts    1" in output and "attempts/4/logs" in " ".join(output.split())


def test_read_only_directory_of_an_unfinished_run_is_refused(lab: Lab, ended: RunPaths, mounts: Callable[..., None]):
    ended.attempt(0).outcome.unlink()
    mounts("--bind", str(ended.root), str(ended.root))
    mounts("-o", "remount,ro,bind", str(ended.root))
    code, output = lab.submit(ended.root)
    assert code == 78
    assert "must be readable and writable" in complaint(output) and "Read-only file system" in complaint(output)


def test_full_disk_is_named_and_the_run_goes_on_once_there_is_space(
    lab: Lab, twin: RunPaths, twin_digest: str, mounts: Callable[..., None]
):
    place = lab.root / "small"
    place.mkdir()
    mounts("-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place))
    paths = RunPaths(place / "run")
    process = lab.start_submit(paths.root)
    wait_for_step(paths, 20)
    filler = os.open(place / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(filler, bytes(1 << 16)):
            continue
    os.close(filler)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    said = " ".join(output.replace("│", " ").split())
    assert "the disk is full" in said and "free space, then give the same command again" in said
    code, output = lab.submit(paths.root)
    assert code != 0 and "Traceback" not in output
    (place / "filler").unlink()
    code, output = lab.submit(paths.root)
    assert code == 0, output
    assert losses(paths) == losses(twin)
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest


def test_new_run_on_a_disk_without_room_leaves_nothing(lab: Lab, mounts: Callable[..., None]):
    place = lab.root / "small"
    place.mkdir()
    mounts("-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place))
    code, output = lab.submit(place / "run")
    assert code == 78
    assert "must be writable" in complaint(output) and "No space left on device" in complaint(output)
    assert not any(place.iterdir())


def test_directory_whose_path_no_job_can_carry_is_refused(lab: Lab):
    code, output = lab.submit(lab.root / "a:b")
    assert code == 78
    assert "without ':'" in complaint(output)
    assert not (lab.root / "a:b").exists()


def test_deleted_snapshot_is_not_replaced_by_whatever_is_installed(lab: Lab, ended: RunPaths):
    ended.attempt(0).outcome.unlink()
    trainer = ended.code / "encdec" / "training" / "trainer.py"
    with trainer.open("a") as source:
        source.write("x = (\n")
    code, output = lab.submit(ended.root)
    assert code == 78
    assert f"found {trainer}, which is changed" in complaint(output)
    shutil.rmtree(ended.code / "encdec")
    code, output = lab.submit(ended.root)
    assert code == 78
    assert "goes on with the code it was made with" in complaint(output) and "is missing" in complaint(output)
    assert ended.attempt_numbers() == [0]


def test_job_started_with_other_code_refuses(lab: Lab, ended: RunPaths):
    code, output = lab.run("launchers.job", str(ended.root))
    assert code == 78
    assert "runs the code of its run directory" in complaint(output)
    assert ended.attempt_numbers() == [0]


def test_brackets_and_blanks_in_a_path_are_shown_as_they_are(lab: Lab, twin: RunPaths):
    root = lab.root / "my [bold]run[/bold]"
    shutil.copytree(twin.root, root)
    code, output = lab.submit(root)
    assert code == 0, output
    unfolded = "".join(output.replace("│", "").split())
    assert f"verify'{lab.root}/my[bold]run[/bold]/checkpoints/step-60'" in unfolded  # quoted for the shell


def test_terminal_without_utf8(lab: Lab, twin: RunPaths):
    plain = ("env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0", sys.executable)
    arguments = ["--phase", "sanity_check", "--cluster", "local", "--run-dir", str(twin.root), *lab.arguments()]
    code, output = lab.run("launchers.submit", *arguments, launcher=plain)
    assert code == 0, output
    assert "complete (nothing left to do)" in output and output.isascii()


def test_sparkline_of_no_numbers():
    assert sparkline([float("nan")]) == ""


def test_run_that_lives_on_another_machine_is_not_started_twice(lab: Lab, ended: RunPaths):
    attempt = ended.attempt(0)
    attempt.outcome.unlink()
    record = json.loads(attempt.process.read_text()) | {"host": "elsewhere"}
    attempt.process.write_text(json.dumps(record))
    attempt.heartbeat(0).touch()
    code, output = lab.submit(ended.root)
    assert code == 78
    assert "in one place at a time" in complaint(output) and "on elsewhere" in complaint(output)
    long_ago = time.time() - 3600
    for sign in (attempt.heartbeat(0), attempt.process):
        os.utime(sign, (long_ago, long_ago))
    code, output = lab.submit(ended.root)
    assert code == 0, output
    assert json.loads(ended.attempt(1).process.read_text())["host"] == socket.gethostname()


def test_two_commands_at_once_start_one_attempt(lab: Lab):
    paths = RunPaths(lab.root / "run")
    both = [lab.start_submit(paths.root) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert paths.attempt_numbers() == [0]
    assert sum("running already" in output for output in outputs) == 1


@pytest.mark.parametrize("moment", ["directory", "submitted", "claimed"])
def test_early_ctrl_c_leaves_nothing_running_unseen(lab: Lab, moment: str):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root, *MANY_STEPS)
    conditions = {
        "directory": paths.run_yaml.is_file,
        "submitted": lambda: paths.submitit.is_dir() and any(paths.submitit.glob("*.pkl")),
        "claimed": lambda: paths.newest_attempt() is not None,
    }
    wait_until(conditions[moment], moment)
    process.send_signal(2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (75, 130), output
    assert "Traceback" not in output
    assert not read_status(paths).running
    if process.returncode == 75:
        assert "finishing the step" in output


def test_second_ctrl_c_stops_watching_only(lab: Lab):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root, *MANY_STEPS)
    wait_for_step(paths, 3)
    agent = agent_of(paths)
    for child in agent.children(recursive=True):
        child.suspend()  # so that the save takes long
    process.send_signal(2)
    time.sleep(0.5)
    process.send_signal(2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "goes on: it saves, then ends" in output
    for child in agent.children(recursive=True):
        child.resume()
    wait_until(paths.attempt(0).outcome.is_file, "the save")


def test_no_wait_lets_go_of_the_callers_output(lab: Lab):
    paths = RunPaths(lab.root / "run")
    arguments = ["--phase", "sanity_check", "--cluster", "local", "--run-dir", str(paths.root), "--no-wait"]
    command = [sys.executable, "-m", "launchers.submit", *arguments, *lab.arguments(*MANY_STEPS)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    assert "started; the same command follows it" in done.stdout
    assert read_status(paths).running  # the pipe was closed although the attempt goes on
    paths.stop_request.touch()
    wait_until(paths.attempt(0).outcome.is_file, "the stop")
