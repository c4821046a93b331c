"""The checklist: what each check finds in a real run directory, on this disk, and at a hub that answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from encdec.files import RunPaths
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import RunConfig, resolve_run
from launchers.planning.footprint import most_checkpoints
from launchers.preflight import Check, checklist, failed, lines
from launchers.preflight.check import amount
from launchers.preflight.needs import check_configuration, check_memory, check_text, check_weights, device_memory_gb
from launchers.preflight.storage import check_place, check_resume, check_room, damage
from launchers.preflight.trackers import check_trackers, check_wandb
from tests.conftest import MICRO, REPOSITORY

DEFAULT = REPOSITORY / "configs" / "training_config.yaml"


def resolved(*settings: str, config: Path = MICRO, phase: str = "sanity_check", nodes: int = 1) -> RunConfig:
    return resolve_run(TrainingPhase(phase), config_file=config, settings=settings, nodes=nodes)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


# ---- as a whole


def run_preflight(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launchers.preflight", *arguments],
        capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert not {"torch", "transformers"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return done.returncode, done.stdout


def test_command_says_that_all_is_well(tmp_path: Path):
    code, output = run_preflight("--phase", "sanity_check", "--config", str(MICRO), "--run-dir", str(tmp_path / "run"))
    assert code == 0, output
    names = [line.split()[:2] for line in output.splitlines()]
    expected = ["configuration", "text", "weights", "memory", "directory", "disk", "inodes", "resume"]
    assert [name for name in names if name[1] != "inodes"] == [["ok", n] for n in expected if n != "inodes"]
    assert not (tmp_path / "run").exists()


def test_command_ends_in_78_where_something_must_be_mended(tmp_path: Path):
    code, output = run_preflight(
        "--phase", "sanity_check", "--config", str(MICRO), "--resume", str(tmp_path / "step-3"), "--run-dir",
        str(tmp_path / "run"),
    )  # fmt: skip
    assert code == 78
    assert "fail  configuration  --resume must be" in output


def test_configuration_that_is_none_is_the_first_failure():
    code, output = run_preflight("--phase", "full", "--config", str(MICRO), "--set", "training.max_lr=-1")
    assert code == 78
    assert output.startswith("fail  configuration")
    assert "training.learning_rate" in output


def test_checklist_can_be_called(tmp_path: Path):
    checks = checklist(resolved(), RunPaths(tmp_path / "run"), gpu_memory_gb=80.0, environment={})
    assert not failed(checks)
    assert {"configuration", "text", "weights", "memory", "disk", "resume"} <= by_name(checks).keys()


def test_lines_name_what_to_do_only_where_it_matters():
    checks = [Check("a", "ok", "fine", "nothing"), Check("b", "warn", "hm", "look"), Check("c", "fail", "no", "mend")]
    assert [line.split() for line in lines(checks)] == [
        ["ok", "a", "fine"], ["warn", "b", "hm"], ["look"], ["fail", "c", "no"], ["mend"],
    ]  # fmt: skip
    assert failed(checks)
    assert not failed(checks[:2])


@pytest.mark.parametrize(("nbytes", "words"), [(0, "0.0 MB"), (12.44e9, "12.4 GB"), (3_140_000, "3.1 MB")])
def test_amounts(nbytes: float, words: str):
    assert amount(nbytes) == words


# ---- configuration, text, weights


@pytest.mark.parametrize(
    ("settings", "verdict", "word"),
    [
        ((), "ok", "60 steps of"),
        (("training.eval_samples=0",), "warn", "no evaluation"),
        (("training.save_steps=60",), "warn", "no checkpoint before the last step"),
        (("training.save_steps=59",), "ok", "60 steps"),
        (("training.save_steps=60", "training.save_every=auto"), "ok", "60 steps"),
    ],
)
def test_configuration(settings: tuple[str, ...], verdict: str, word: str):
    check = check_configuration(resolved(*settings))
    assert check.verdict == verdict
    assert word in check.message


@pytest.fixture
def a_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A hub on this machine that answers every question with the status that a test gives it."""
    status = [200]

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0])
            self.end_headers()
            self.wfile.write(json.dumps({"id": self.path}).encode())

        def log_message(self, *words: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield lambda code: status.__setitem__(0, code)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("code", "verdict"), [(200, "ok"), (404, "fail"), (401, "fail"), (503, "warn")])
def test_text_and_weights_on_a_hub(a_hub: Callable[[int], None], code: int, verdict: str):
    a_hub(code)
    run = resolved(config=DEFAULT, phase="full")
    text, weights = check_text(run), check_weights(run)
    assert text.verdict == verdict
    assert "HuggingFaceFW/fineweb-edu" in text.message
    assert weights.verdict in (verdict, "ok")  # ok where this user has fetched it before


def test_hub_that_nobody_answers_for_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    check = check_text(resolved(config=DEFAULT, phase="full"))
    assert check.verdict == "warn"
    assert "does not answer from here" in check.message
    assert "data.packed_dir" in check.remedy


def test_local_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text\n")
    assert check_text(resolved(f"data.dataset_name={tmp_path}")).verdict == "ok"
    (tmp_path / "a.txt").write_text(" \n")
    check = check_text(resolved(f"data.dataset_name={tmp_path}"))
    assert check.verdict == "fail"
    assert "at least one document" in check.message


@pytest.mark.parametrize(
    ("files", "verdict"), [([], "fail"), (["config.json"], "fail"), (["config.json", "model.safetensors"], "ok")]
)
def test_local_weights(tmp_path: Path, files: list[str], verdict: str):
    for name in files:
        (tmp_path / name).write_text("{}")
    run = resolved(f"model.model_name_or_path={tmp_path}", config=DEFAULT, phase="full")
    assert check_weights(run).verdict == verdict
    assert check_weights(resolved()).message == "random initial weights"


# ---- memory


@pytest.mark.parametrize(
    ("settings", "gigabytes", "verdict", "word"),
    [
        ((), 80.0, "ok", "of 80.0 GB"),
        ((), 9.0, "warn", "of 9.0 GB"),  # nearly all of it, by an estimate that is 20 % above at most
        ((), 7.0, "fail", "of 7.0 GB"),
        ((), None, "warn", "not known here"),
        (("training.per_device_train_batch_size=64", "training.global_batch_size=512"), 24.0, "fail", "64 samples"),
        (("training.per_device_train_batch_size=auto", "training.global_batch_size=512"), 80.0, "ok", "auto finds"),
        (("model.model_name_or_path=someone/else",), 80.0, "warn", "someone/else are not known"),
    ],
)
def test_memory(settings: tuple[str, ...], gigabytes: float | None, verdict: str, word: str):
    check = check_memory(resolved(*settings, config=DEFAULT, phase="full"), gigabytes)
    assert check.verdict == verdict, check
    assert word in check.message


def test_memory_of_gpus_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = resolved(config=DEFAULT, phase="full")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_memory_gb(run) is None
    for output, found in (("81559\\n40960\\n", 40_960 * 2**20 / 1e9), ("no devices\\n", None)):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{output}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert device_memory_gb(run) == found
    assert device_memory_gb(resolved()) > 0  # type: ignore[operator]
    assert device_memory_gb(resolved(nodes=2)) is None


# ---- disk


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ((), 6),  # 4 of them in 60 steps, one that a signal asks for, one being written
        (("training.save_steps=1",), 8),  # the newest, the best, five of the average; one being written
        (("training.save_steps=1", "training.eval_samples=0"), 7),
        (("training.save_steps=1", "training.save_total_limit=20"), 21),
        (("training.save_steps=1", "training.average_last=1", "training.save_total_limit=1"), 3),
        (("training.save_every=auto",), 8),
    ],
)
def test_most_checkpoints(settings: tuple[str, ...], most: int):
    assert most_checkpoints(resolved(*settings)) == most


def test_run_directory_must_be_one_that_can_be_made(tmp_path: Path, mounts: Callable[..., None]):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    mounts("-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(sealed))
    places = {"run": "ok", ".": "ok", "a/b/run": "ok"} | dict.fromkeys(
        ("file", "file/run", "nowhere", "sealed/x"), "fail"
    )
    for place, verdict in places.items():
        assert (place, check_place(RunPaths(tmp_path / place)).verdict) == (place, verdict)


def test_room_is_counted_where_the_run_will_lie(tmp_path: Path, mounts: Callable[..., None]):
    small = tmp_path / "small"
    small.mkdir()
    mounts("-t", "tmpfs", "-o", "size=1m,nr_inodes=40", "tmpfs", str(small))
    checks = by_name(check_room(resolved(), RunPaths(small / "not" / "yet")))
    assert checks["disk"].verdict == "fail"
    assert f"free in {small}" in checks["disk"].message
    assert checks["inodes"].verdict == "fail"
    room = by_name(check_room(resolved(), RunPaths(tmp_path / "run")))
    assert (room["disk"].verdict, room.get("inodes", room["disk"]).verdict) == ("ok", "ok")


def test_what_lies_there_already_is_not_asked_for_again(tmp_path: Path):
    paths = RunPaths(tmp_path)
    before = by_name(check_room(resolved(), paths))["disk"].message
    paths.checkpoints.mkdir()
    (paths.checkpoints / "file").write_bytes(bytes(2_000_000))
    after = by_name(check_room(resolved(), paths))["disk"].message
    assert before.startswith("2.7 MB more")
    assert after.startswith("0.7 MB more")


def test_packed_text_of_a_hub_is_named(tmp_path: Path):
    run = resolved(f"data.packed_dir={tmp_path}", config=DEFAULT, phase="full")
    check = by_name(check_room(run, RunPaths(tmp_path)))["packed text"]
    assert "tokens that this run reads take" in check.message
    assert "packed text" not in by_name(check_room(resolved(), RunPaths(tmp_path)))


# ---- the checkpoint to go on from


@pytest.fixture
def finished(twin: RunPaths, tmp_path: Path) -> RunPaths:
    """A run directory with the checkpoints of a real run."""
    shutil.copytree(twin.checkpoints, tmp_path / "run" / "checkpoints", symlinks=True)
    return RunPaths(tmp_path / "run")


def truncate(folder: Path) -> None:
    file = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(file, 10)


def lose(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()


def tear(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": [')


def empty(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


DAMAGES = {truncate: "10 bytes instead of", lose: "trainer_state.json is missing", tear: "damaged", empty: "damaged"}


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
def test_damage_is_seen_and_the_one_before_is_named(finished: RunPaths, harm: Callable[[Path], None]):
    newest, before = finished.checkpoints / "step-60", finished.checkpoints / "step-45"
    assert damage(newest) is None
    assert check_resume(resolved(), finished, None).verdict == "ok"
    harm(newest)
    assert DAMAGES[harm] in str(damage(newest))
    check = check_resume(resolved(), finished, None)
    assert check.verdict == "warn"
    assert "step-60" in check.message
    assert "goes on from step-45" in check.message
    assert check_resume(resolved(), finished, newest).verdict == "fail"
    assert check_resume(resolved(), finished, before).verdict == "ok"
    for folder in finished.checkpoints.glob("step-*"):
        shutil.rmtree(folder / "fsdp2")
    assert check_resume(resolved(), finished, None).verdict == "fail"


def test_another_runs_checkpoint_is_told(finished: RunPaths):
    check = check_resume(resolved("training.seed=7"), finished, finished.checkpoints / "step-60")
    assert check.verdict == "ok"
    assert "another configuration" in check.message
    assert check_resume(resolved(), RunPaths(finished.root / "new"), None).message.startswith("no checkpoint yet")


# ---- trackers


@pytest.mark.parametrize(
    ("environment", "login", "verdict", "word"),
    [
        ({}, None, "warn", "nobody is logged in"),
        ({"WANDB_API_KEY": "x"}, None, "ok", "WANDB_API_KEY is set"),
        ({"WANDB_MODE": "offline"}, None, "ok", "WANDB_MODE=offline"),
        ({}, "api.wandb.ai", "ok", "has a login for api.wandb.ai"),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "api.wandb.ai", "warn", "none for wandb.example.org"),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "wandb.example.org", "ok", "has a login"),
        ({}, "not a netrc", "warn", "cannot be read"),
    ],
)
def test_wandb(tmp_path: Path, environment: dict[str, str], login: str | None, verdict: str, word: str):
    if login is not None:
        text = f"machine {login} login user password secret\n" if " " not in login else login
        (tmp_path / ".netrc").write_text(text)
        (tmp_path / ".netrc").chmod(0o600)
    check = check_wandb({"HOME": str(tmp_path), **environment})
    assert check.verdict == verdict
    assert word in check.message
    assert "secret" not in check.message


def test_each_tracker_is_looked_at():
    run = resolved("training.report_to=[wandb, tensorboard]")
    checks = check_trackers(run, {"WANDB_MODE": "offline"})
    assert [(check.name, check.verdict) for check in checks] == [("wandb", "ok"), ("tensorboard", "ok")]
    assert check_trackers(resolved(), {}) == []
