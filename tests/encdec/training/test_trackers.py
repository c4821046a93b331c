"""Trackers: one curve a run over all its attempts, told by a process that training never waits for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from google.protobuf.message import DecodeError

from encdec.files import RunPaths
from encdec.records import StepRecord, read_steps
from encdec.training.run_config import resolve_run
from encdec.training.tracking.backends import LONGEST_RUN_ID, kept_run_id
from encdec.training.tracking.observer import SECONDS_TO_FLUSH_HURRIED, TrackerObserver
from encdec.training.tracking.speed import step_seconds_at_peak
from encdec.training.tracking.wandb_files import (
    BLOCK,
    FULL,
    HEADER_OF_A_CHUNK,
    HEADER_OF_A_FILE,
    last_step,
    read_records,
)
from tests.conftest import MICRO, REPOSITORY, Lab, losses, wait_for_step, wait_until
from tests.encdec.training.tracker_lab import (
    tensorboard_curve,
    tensorboard_texts,
    wandb_alerts,
    wandb_curve,
    wandb_files,
    wandb_ids,
)

KEY = "c0ffee" * 7
"""As long as W&B asks of a key."""
AN_ALERT = {"type": "loss_spike", "step": 7, "value": 9.0, "threshold": 8.0, "message": "loss 9 is above 8"}


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    paths.make()
    resolve_run(None, config_file=MICRO).write(paths.run_yaml)
    return paths


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B as where nobody is logged in; what it keeps for a user lies in the test's folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def record(step: int, loss: float | None = None) -> StepRecord:
    return StepRecord(
        step=step, loss=10.0 - step / 8 if loss is None else loss, grad_norm=1.0, learning_rate=1e-3,
        tokens_seen=384 * step, tokens_per_second=9000.0, step_seconds=0.5, data_seconds=0.25,
        samples_consumed=8 * step, memory_gb=0.5, attempt=0, restart=0,
    )  # fmt: skip


def observer_of(name: str, paths: RunPaths, **changes: Any) -> TrackerObserver:
    settings = {"logging_steps": 1, "total_steps": 100, "samples_per_epoch": 64, **changes}
    return TrackerObserver.of_run(name, paths, **settings)


def attempt(name: str, paths: RunPaths, steps: range, *, killed: bool = False) -> None:
    """One attempt that tells of ``steps``; ``killed``: its rank ends without a word."""
    observer = observer_of(name, paths)
    for step in steps:
        observer.on_step(record(step), 2.5)
    if killed:
        os.close(observer._pipe)
        assert observer._process is not None
        observer._process.wait(60)
    else:
        observer.close()


def is_told(paths: RunPaths) -> bool:
    """Whether W&B has opened its file."""
    return bool(wandb_files(paths.root))


def in_the_end(steps: range) -> list[tuple[int, float]]:
    return [(step, 10.0 - step / 8) for step in steps]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_steps_that_are_computed_again_are_one_curve(name: str, paths: RunPaths):
    attempt(name, paths, range(1, 9), killed=True)
    attempt(name, paths, range(5, 7), killed=True)  # from the checkpoint of step 4, twice
    attempt(name, paths, range(5, 13))
    curve = tensorboard_curve if name == "tensorboard" else wandb_curve
    assert curve(paths.root / name, "train/loss") == in_the_end(range(1, 13))
    if name == "wandb":
        assert len(set(wandb_ids(paths.root))) == 1 and len(wandb_files(paths.root)) == 3


def test_tensorboard_shows_a_roll_back_once(paths: RunPaths):
    observer = observer_of("tensorboard", paths)
    for step in range(1, 6):
        observer.on_step(record(step), 2.5)
    observer.on_event("rolled_back", {"from_step": 5, "to_step": 2, "cause": "spike"})
    for step in range(3, 5):
        observer.on_step(record(step, loss=1.0), 2.5)
    observer.close()
    assert tensorboard_curve(paths.root / "tensorboard", "train/loss") == [*in_the_end(range(1, 3)), (3, 1.0), (4, 1.0)]


def test_wandb_takes_nothing_back_and_overlaps_nothing(paths: RunPaths):
    observer = observer_of("wandb", paths)
    for step in range(1, 6):
        observer.on_step(record(step), 2.5)
    observer.on_event("rolled_back", {"from_step": 5, "to_step": 2, "cause": "spike"})
    for step in range(3, 8):
        observer.on_step(record(step, loss=1.0), 2.5)
    observer.close()
    told = wandb_curve(paths.root / "wandb", "train/loss")
    assert told == [*in_the_end(range(1, 6)), (6, 1.0), (7, 1.0)]
    assert [title for title, _ in wandb_alerts(paths.root / "wandb")] == ["events/rolled_back"]


def test_points_are_every_logging_step_the_first_and_the_last(paths: RunPaths):
    observer = observer_of("tensorboard", paths, logging_steps=5, total_steps=12)
    for step in range(2, 13):
        observer.on_step(record(step), 2.5)
    observer.on_evaluation(12, {"loss": 1.5})
    observer.close()
    folder = paths.root / "tensorboard"
    assert [step for step, _ in tensorboard_curve(folder, "train/loss")] == [2, 5, 10, 12]
    assert tensorboard_curve(folder, "eval/loss") == [(12, 1.5)]
    assert tensorboard_curve(folder, "train/epoch")[-1] == (12, 1.5)
    assert tensorboard_curve(folder, "throughput/data_wait_share")[-1] == (12, 0.5)


def test_utilization_is_told_where_the_gpu_is_known(paths: RunPaths):
    run = resolve_run(None, config_file=MICRO)
    at_peak = step_seconds_at_peak(run, 8, "NVIDIA H100 80GB HBM3")
    assert at_peak is not None
    assert step_seconds_at_peak(run, 4, "NVIDIA H100 80GB HBM3") == pytest.approx(2 * at_peak)
    assert step_seconds_at_peak(run, 8, "") is None
    observer = observer_of("tensorboard", paths, step_seconds_at_peak=0.2)
    observer.on_step(record(1), 2.5)
    observer.close()
    assert tensorboard_curve(paths.root / "tensorboard", "throughput/mfu") == [(1, pytest.approx(0.4))]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_an_alert_before_the_first_step_is_shown_and_voids_no_point(name: str, paths: RunPaths):
    attempt(name, paths, range(1, 8))
    observer = observer_of(name, paths)
    observer.on_alert(AN_ALERT)
    observer.on_save_failed(8, "No space left on device", "step-6")
    observer.close()
    if name == "tensorboard":
        folder = paths.root / "tensorboard"
        assert tensorboard_texts(folder, "alert/loss_spike") == [(7, "loss 9 is above 8")]
        assert tensorboard_texts(folder, "checkpoint/failed") == [(8, "No space left on device; the newest is step-6")]
        assert tensorboard_curve(folder, "train/loss") == in_the_end(range(1, 8))
    else:
        assert wandb_alerts(paths.root)[0] == ("alert/loss_spike", "step 7: loss 9 is above 8")


def test_a_run_s_id_is_kept_and_no_other_run_s(tmp_path: Path):
    name = "a run: 50% #1?" * 20
    first = kept_run_id(tmp_path / "one", name)
    assert first == kept_run_id(tmp_path / "one", "renamed")
    assert first != kept_run_id(tmp_path / "two", name)
    assert len(first) <= LONGEST_RUN_ID and not set(first) & set("/\\#?%: ")


@pytest.mark.parametrize("cut", [0, 1, 100, 40_000])
def test_the_last_step_of_a_torn_file_is_found(paths: RunPaths, cut: int):
    attempt("wandb", paths, range(1, 401))
    [file] = wandb_files(paths.root)
    size = file.stat().st_size
    assert size > 3 * BLOCK
    os.truncate(file, size - cut)
    whole = [step for step, _ in wandb_curve(paths.root, "train/loss")]
    assert whole == list(range(1, len(whole) + 1)) and (len(whole) == 400) == (cut < 2)
    assert last_step(paths.root) == len(whole)


def test_a_damaged_file_of_an_earlier_attempt_costs_its_own_rows_alone(paths: RunPaths):
    attempt("wandb", paths, range(1, 5))
    [file] = wandb_files(paths.root)
    attempt("wandb", paths, range(5, 9))
    [later] = set(wandb_files(paths.root)) - {file}
    header = HEADER_OF_A_CHUNK.pack(0, 4, FULL)
    later.write_bytes(later.read_bytes()[:HEADER_OF_A_FILE] + header + b"\xff" * 4)
    with pytest.raises(DecodeError):
        list(read_records(later))
    assert last_step(paths.root) == 4
    later.unlink()
    later.mkdir()
    assert last_step(paths.root) == 4


def test_only_the_end_of_a_long_file_is_read(paths: RunPaths, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("encdec.training.tracking.wandb_files.BLOCKS_OF_AN_END", 1)
    attempt("wandb", paths, range(1, 401))
    assert last_step(paths.root) == 400


# ---- trackers that fail


def test_a_tracker_that_ends_is_one_warning(caplog: pytest.LogCaptureFixture):
    observer = TrackerObserver("t", ["/bin/true"], logging_steps=1, total_steps=99, samples_per_epoch=8)
    observer.on_step(record(1), 2.5)
    assert observer._process is not None
    observer._process.wait(60)
    for step in range(2, 99):
        observer.on_step(record(step), 2.5)
    observer.close()
    assert [r.message for r in caplog.records] == ["t is told nothing more, training goes on: Broken pipe"]


def test_a_tracker_that_cannot_be_started_is_one_warning(caplog: pytest.LogCaptureFixture):
    observer = TrackerObserver("t", ["/nowhere/t"], logging_steps=1, total_steps=9, samples_per_epoch=8)
    observer.on_alert(AN_ALERT)
    for step in range(1, 4):
        observer.on_step(record(step), 2.5)
    observer.close()
    assert [r.message for r in caplog.records] == [
        "t is told nothing more, training goes on: No such file or directory"
    ]


def test_a_tracker_that_takes_nothing_is_never_waited_for(caplog: pytest.LogCaptureFixture):
    observer = TrackerObserver("t", ["/bin/sleep", "600"], logging_steps=1, total_steps=9, samples_per_epoch=8)
    for step in range(1, 20_000):  # far more than a pipe holds
        observer.on_step(record(step), 2.5)
    observer.on_end({"cause": "signalled", "step": 9, "message": ""})
    observer.close()
    assert observer._process is not None and observer._process.poll() == -signal.SIGKILL
    assert [r.message for r in caplog.records] == [
        "t is slow, and is told less: training does not wait for it",
        f"t has not taken everything within {SECONDS_TO_FLUSH_HURRIED:.0f} s: the rest is left out",
    ]


def test_a_tracker_without_its_library_says_so_once(paths: RunPaths, tmp_path: Path, monkeypatch, capfd):
    (tmp_path / "tensorboard.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorboard'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    observer = observer_of("tensorboard", paths)
    observer.on_step(record(1), 2.5)
    assert observer._process is not None
    observer._process.wait(60)
    for step in range(2, 9):
        observer.on_step(record(step), 2.5)
    observer.close()
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].endswith(
        "tensorboard is told nothing more, training goes on: ModuleNotFoundError: No module named 'tensorboard'"
    )


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and answers none."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_does_not_answer_leaves_offline_records(paths: RunPaths, silent_server, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    observer = observer_of("wandb", paths)
    for step in range(1, 6):
        observer.on_step(record(step), 2.5)
    wait_until(lambda: list(paths.root.rglob("offline-run-*/*.wandb")), "it is recorded")
    observer.close()
    assert wandb_curve(paths.root / "wandb", "train/loss") == in_the_end(range(1, 6))
    said = capfd.readouterr().err
    assert said.count("recording offline") == 1 and len(said.splitlines()) == 1
    assert KEY not in said
    assert not [path for path in paths.root.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_what_a_cluster_sends_to_all_processes_ends_no_tracker(paths: RunPaths):
    observer = observer_of("wandb", paths)
    observer.on_step(record(1), 2.5)
    assert observer._process is not None
    wait_until(lambda: is_told(paths), "W&B has begun")
    tracker = psutil.Process(observer._process.pid)
    for process in (tracker, *tracker.children(recursive=True)):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            process.send_signal(number)
    observer.on_step(record(2), 2.5)
    observer.close()
    assert wandb_curve(paths.root / "wandb", "train/loss") == in_the_end(range(1, 3))


def test_a_tracker_without_its_rank_ends(paths: RunPaths):
    program = (
        "import sys, time; from encdec.files import RunPaths; from pathlib import Path; "
        "from tests.encdec.training.test_trackers import observer_of, record; "
        "o = observer_of('wandb', RunPaths(Path(sys.argv[1]))); o.on_step(record(1), 2.5); "
        "print(o._process.pid, flush=True); time.sleep(600)"
    )
    rank = subprocess.Popen(
        [sys.executable, "-c", program, str(paths.root)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert rank.stdout is not None
    tracker = psutil.Process(int(rank.stdout.readline()))
    wait_until(lambda: is_told(paths), "W&B has begun")
    family = [tracker, *tracker.children(recursive=True)]
    rank.kill()
    rank.communicate()
    psutil.wait_procs(family, timeout=60)
    assert not [process for process in family if process.is_running()]
    assert wandb_curve(paths.root / "wandb", "train/loss") == in_the_end(range(1, 2))


# ---- a real run


def test_a_run_that_is_killed_and_continued_is_one_curve(lab: Lab):
    run = RunPaths(lab.root / "run")
    arguments = lab.arguments(
        "--phase", "sanity_check", "--set", "infra.num_gpus=1", "--set", 'training.report_to=["wandb","tensorboard"]',
        "--set", "training.logging_steps=1", "--output_dir", str(run.root),
    )  # fmt: skip
    first = lab.start("encdec.train", *arguments)
    wait_for_step(run, 23)
    children = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.communicate()
    psutil.wait_procs(children, timeout=60)
    lost = max(r["step"] for r in read_steps(run.attempt(0).steps))
    code, output = lab.run("encdec.train", *arguments)
    assert code == 0, output
    again = min(r["step"] for r in read_steps(run.attempt(1).steps))
    assert 1 < again <= lost
    computed = losses(run)
    told = {"wandb": wandb_curve, "tensorboard": tensorboard_curve}
    for curve in (read(run.root / name, "train/loss") for name, read in told.items()):
        assert [step for step, _ in curve] == sorted({step for step, _ in curve})
        assert dict(curve) == pytest.approx({step: computed[step] for step, _ in curve}, abs=1e-6)
        assert set(range(1, 61)) - {step for step, _ in curve} <= {lost, lost + 1}  # what the pipe still held
    assert len(set(wandb_ids(run.root))) == 1 and len(wandb_files(run.root)) == 2
