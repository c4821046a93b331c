"""Runs as Prometheus reads them: by its own parser, from a file and over HTTP."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from encdec.errors import MissingPrerequisite
from encdec.files import RunPaths
from encdec.records import JsonLinesWriter, read_last_steps
from launchers import metrics
from launchers.views.gauges import GAUGES, STATE, Runs
from launchers.views.standing import State
from tests.conftest import REPOSITORY, wait_until
from tests.launchers.conftest import Play, Story, step_record

Read = dict[tuple[str, str], float]
"""(name of the gauge, run or state) -> value."""


def read(text: str) -> Read:
    found: Read = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, sample.labels.get("state") or sample.labels["run"]] = sample.value
    return found


def written(runs: Path, *extra: str) -> Read:
    file = runs.parent / "encdec.prom"
    assert metrics.main(["--root", str(runs), "--file", str(file), *extra]) == 0
    return read(file.read_text())


def test_a_run_s_numbers(story: Story, runs: Path, play: Play):
    story.attempt("12", steps=range(1, 41))
    story.end("signalled", 75)
    story.attempt("12", steps=range(38, 91))
    story.tell("restarting", restart=1)
    story.tell("restarting", restart=2)
    plan = {"nodes": 2, "ranks_per_node": 4, "forecast": {"flops_per_step": 8e12, "gpu": "h100"}}
    story.paths.plan.write_text(json.dumps(plan))
    saved = story.paths.checkpoints / "step-75"
    saved.mkdir()
    os.utime(saved, (5000.0, 5000.0))
    before = time.time()
    found = written(runs)
    after = time.time()
    run = "medium-1"
    assert found["encdec_run_step", run] == 90
    assert found["encdec_run_total_steps", run] == 60  # the micro sanity check
    assert found["encdec_run_loss", run] == step_record(90).loss
    assert found["encdec_run_tokens_per_second", run] == pytest.approx(9000)
    assert found["encdec_run_tokens_seen", run] == 384 * 90
    assert found["encdec_run_data_wait_ratio", run] == 0
    assert found["encdec_run_attempt", run] == 1
    assert found["encdec_run_restarts", run] == 2
    assert found["encdec_run_checkpoint_timestamp_seconds", run] == 5000
    assert before - 5000 <= found["encdec_run_checkpoint_age_seconds", run] <= after - 5000
    peak = 8 * 989e12
    assert found["encdec_run_mfu_ratio", run] == pytest.approx(8e12 / (0.04 * peak), rel=1e-3)
    assert ("encdec_run_gate_passed", run) not in found  # no verdict yet


def test_exactly_one_state_is_a_run_s(story: Story, runs: Path, play: Play):
    story.attempt(steps=range(1, 10))
    story.end("complete", 0)
    found = written(runs)
    assert [state for state in State if found[STATE, str(state)] == 1] == [State.COMPLETE]
    assert len([key for key in found if key[0] == STATE]) == len(State)
    assert found["encdec_run_gate_passed", "medium-1"] == 1


def test_values_that_are_not_known_are_left_out(story: Story, runs: Path, play: Play):
    with JsonLinesWriter(story.paths.attempt(story.attempt()).steps) as steps:
        steps.write({**step_record(3).to_json(), "loss": float("nan")})
    (runs / "damaged" / "attempts").mkdir(parents=True)
    (runs / "damaged" / "run.yaml").write_text("no: run\n")
    found = written(runs)
    assert ("encdec_run_loss", "medium-1") not in found and ("encdec_run_mfu_ratio", "medium-1") not in found
    assert found["encdec_run_step", "medium-1"] == 3
    assert [name for name, of in found if of == "damaged"] == [STATE]


def test_no_runs_are_a_valid_file(runs: Path, play: Play):
    assert written(runs) == {}
    assert set(GAUGES) <= set((runs.parent / "encdec.prom").read_text().split())


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_file_is_replaced_whole_and_readable_for_all(runs: Path, play: Play, umask: int):
    file = runs.parent / "encdec.prom"
    file.write_text("half a")
    before = os.umask(umask)
    try:
        written(runs)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o644
    assert not [path for path in runs.parent.iterdir() if path.name.startswith("encdec.prom.")]


def test_slurm_is_asked_once_a_look_however_often_it_is_scraped(story: Story, runs: Path, play: Play):
    story.attempt("12", steps=range(1, 4))
    story.runs_in("12")
    looks = Runs(lambda: [story.paths], interval=3600)
    for _ in range(5):
        list(looks.collect())
    assert len(play.calls("squeue")) == 1


def test_scrapes_at_the_same_time_share_a_look(story: Story, runs: Path, play: Play):
    story.attempt("12", steps=range(1, 4))
    story.runs_in("12")
    together = threading.Barrier(4)
    found = []

    def find() -> list[RunPaths]:
        found.append(story.paths)
        time.sleep(0.2)  # the others come meanwhile
        return [story.paths]

    looks = Runs(find, interval=3600)

    def scrape() -> None:
        together.wait()
        list(looks.collect())

    scrapes = [threading.Thread(target=scrape) for _ in range(4)]
    for each in scrapes:
        each.start()
    for each in scrapes:
        each.join()
    assert (len(found), len(play.calls("squeue"))) == (1, 1)


def test_accounting_is_asked_once_of_a_job_that_has_ended(story: Story, play: Play):
    story.attempt("12", steps=range(1, 4))
    story.runs_in("12")
    play("squeue", "")
    play("sacct", "12|TIMEOUT\n")
    looks = Runs(lambda: [story.paths], interval=0.0)
    for _ in range(3):
        list(looks.collect())
    assert (len(play.calls("squeue")), len(play.calls("sacct"))) == (3, 1)


def test_run_named_twice_is_one(story: Story, runs: Path, play: Play):
    story.attempt(steps=range(1, 4))
    written(runs, "medium-1", "medium-1")
    lines = (runs.parent / "encdec.prom").read_text().splitlines()
    assert len([line for line in lines if line.startswith("encdec_run_step{")]) == 1


def test_trouble_between_two_writes_passes(story: Story, runs: Path, play: Play, tmp_path: Path):
    story.attempt(steps=range(1, 4))
    folder = tmp_path / "collected"
    folder.mkdir()
    file = folder / "a.prom"
    command = [sys.executable, "-m", "launchers.metrics", "--root", str(runs), "--file", str(file), "--interval", "1"]
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, stderr=subprocess.PIPE) as process:
        try:
            wait_until(file.is_file, "the first write")
            folder.rename(tmp_path / "away")
            assert process.stderr is not None
            assert "Metrics need a place that takes them" in process.stderr.readline()
            folder.mkdir()
            wait_until(file.is_file, "a write after the trouble")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()


def test_trouble_with_the_runs_is_not_called_one_of_the_file(runs: Path, tmp_path: Path):
    def find() -> list[RunPaths]:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(MissingPrerequisite, match=r"run directories that can be read.*Input/output error"):
        metrics.write(tmp_path / "a.prom", Runs(find, interval=0.0))


REFUSALS = {
    "name": (["--file", "a.txt"], "end in .prom"),
    "interval": (["--file", "a.prom", "--interval", "0"], "--interval must be at least 1 s"),
    "nowhere": (["--file", "/nowhere/a.prom"], "/nowhere/a.prom (No such file or directory)"),
    "both": (["--file", "a.prom", "--port", "1"], "not allowed with"),
    "neither": ([], "one of the arguments --file --port is required"),
    "run": (["--file", "a.prom", "nobody"], "'nobody'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, runs: Path, play: Play, capsys: pytest.CaptureFixture[str]):
    arguments, words = REFUSALS[case]
    assert metrics.main(["--root", str(runs), *arguments]) == 78
    assert words in capsys.readouterr().err


def test_missing_library_is_said(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if "prometheus" in name else find(name))
    assert metrics.main(["--root", str(runs), "--file", "a.prom"]) == 78
    assert "pip install" in capsys.readouterr().err


@pytest.fixture
def served(story: Story, runs: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    story.attempt(steps=range(1, 8))
    port = free_port()
    command = [sys.executable, "-m", "launchers.metrics", "--root", str(runs), "--port", str(port), "--interval", "1"]
    process = subprocess.Popen(command, cwd=REPOSITORY, text=True, stderr=subprocess.PIPE)
    yield process, port
    process.kill()
    process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_over_http(served: tuple[subprocess.Popen[str], int], story: Story):
    process, port = served

    def scraped() -> Read:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                return read(answer.read().decode())
        except OSError:
            return {}

    wait_until(lambda: scraped().get(("encdec_run_step", "medium-1")) == 7, "the run is served")
    with JsonLinesWriter(story.newest.steps) as steps:
        steps.write(step_record(8).to_json())
    wait_until(lambda: scraped().get(("encdec_run_step", "medium-1")) == 8, "it is looked at again")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_last_steps_of_a_long_file(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    assert read_last_steps(path, 5) == []
    with JsonLinesWriter(path) as steps:
        for step in range(1, 2001):
            steps.write(step_record(step).to_json())
    assert path.stat().st_size > 1 << 17
    with path.open("a") as stream:
        stream.write('{"step": 2001, "lo')
    assert [record["step"] for record in read_last_steps(path, 3)] == [1998, 1999, 2000]
