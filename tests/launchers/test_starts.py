"""Whoever starts the rank program, and on however many ranks, it computes the same; or it says why it will not."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from encdec.files import RunPaths
from encdec.training.run_config import resolve_run
from tests.conftest import MICRO, REPOSITORY, Lab, losses

BIN = Path(sys.executable).parent


def torchrun(ranks: int) -> tuple[str, ...]:
    return (str(BIN / "torchrun"), "--nproc-per-node", str(ranks))


def accelerate(ranks: int, *extra: str) -> tuple[str, ...]:
    config = str(REPOSITORY / "configs" / "accelerate_fsdp2.yaml")
    return (str(BIN / "accelerate"), "launch", *extra, "--config_file", config, "--num_processes", str(ranks))


def train(lab: Lab, name: str, launcher: tuple[str, ...], *extra: str) -> tuple[int, str, RunPaths]:
    paths = RunPaths(lab.root / name)
    arguments = ("--phase", "sanity_check", "--output_dir", str(paths.root), *lab.arguments(*extra))
    code, output = lab.run("encdec.train", *arguments, launcher=launcher)
    return code, output, paths


@pytest.mark.parametrize("launcher", [torchrun(2), accelerate(2)], ids=["torchrun", "accelerate"])
def test_other_launchers_compute_what_the_agent_computes(lab: Lab, twin: RunPaths, twin_digest: str, launcher):
    code, output, paths = train(lab, "run", launcher)
    assert code == 0, output
    assert "FSDP2 over 2 ranks" in output  # the proof of sharding
    assert losses(paths) == losses(twin)
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest


@pytest.mark.parametrize("ranks", [1, 4])
def test_loss_curve_does_not_depend_on_the_world_size(lab: Lab, twin: RunPaths, ranks: int):
    # 30 steps at an ordinary learning rate: at the micro model's own, 1e-2, AdamW blows rounding up within 20 steps
    settings = ("--set", "training.num_train_steps=30", "--set", "training.learning_rate=1e-3")
    code, output, paths = train(lab, "run", torchrun(ranks), *settings, "--set", f"infra.num_gpus={ranks}")
    assert code in (0, 3), output  # so few steps may miss the phase's bound
    reference = RunPaths(lab.root / "reference")
    code, output = lab.submit(reference.root, *settings)
    assert code in (0, 3), output
    ours, expected = losses(paths), losses(reference)
    assert list(ours) == list(range(1, 31))
    assert max(abs(ours[step] - expected[step]) for step in ours) < 1e-4


def test_resume_at_another_world_size_continues_the_same_curve(lab: Lab, twin: RunPaths):
    """The twin's two-rank checkpoint of step 30 goes on with one rank: same samples, same losses within rounding,
    for as long as AdamW at the micro model's high learning rate does not blow the rounding up.
    """
    root = lab.root / "run"
    shutil.copytree(twin.checkpoints / "step-30", root / "checkpoints" / "step-30")
    code, output, paths = train(lab, "run", torchrun(1), "--set", "infra.num_gpus=1")
    assert code == 0, output
    ours, expected = losses(paths), losses(twin)
    assert list(ours) == list(range(31, 61))
    assert max(abs(ours[step] - expected[step]) for step in range(31, 39)) < 1e-4


def test_start_that_would_not_shard_is_refused(lab: Lab):
    code, output, paths = train(lab, "run", accelerate(2, "--cpu"))
    assert code != 0
    assert "must have the 2 ranks that the configuration asks for, found 1" in " ".join(output.split())
    assert not paths.root.exists()


def test_wrong_number_of_ranks_is_refused(lab: Lab):
    code, output, paths = train(lab, "run", torchrun(1))
    assert code != 0
    assert "must have the 2 ranks" in output
    assert not paths.root.exists()


def test_directory_of_another_run_is_refused(lab: Lab, twin: RunPaths):
    before = sorted(twin.root.rglob("*"))
    arguments = ("--phase", "sanity_check", "--output_dir", str(twin.root), *lab.arguments("--set", "training.seed=7"))
    code, output = lab.run("encdec.train", *arguments, launcher=torchrun(2))
    assert code != 0
    assert "config.training.seed: 42 there, 7 now" in output
    assert sorted(twin.root.rglob("*")) == before


def test_what_stops_all_ranks_is_told_once(lab: Lab):
    code, output, paths = train(lab, "run", torchrun(2), "--set", "training.sed=1")
    assert code != 0
    assert output.count("every key must be known, found training.sed. Write seed instead.") == 1
    assert "error: " in output
    assert not paths.root.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--confg", "x"), ("--config", "python -m encdec.train --help")),
        (("--config", str(MICRO), "--phase", "ful"), ("'ful'", "Did you mean full?")),
        (
            ("--config", str(MICRO), "--set", "infra.num_gpus=1", "--output_dir", "/proc/run"),
            ("run directory must be writable", "/proc/run (", "--output_dir"),
        ),
    ],
    ids=["unknown flag", "unknown phase", "unwritable directory"],
)
def test_mistake_is_one_paragraph(lab: Lab, arguments: tuple[str, ...], words: tuple[str, ...]):
    code, output = lab.run("encdec.train", *arguments)
    assert code == 78
    assert output.startswith("error: ") and output.count("\n") == 1
    for word in words:
        assert word in output


SHORT = ("infra.num_gpus=1", "training.num_train_steps=2", "training.eval_samples=0")


def as_settings(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_output_directory_of_the_configuration_is_the_flag_s(lab: Lab):
    """``--set infra.output_dir`` counts, and it is the same run; with standard input closed, nothing is asked."""
    paths = RunPaths(lab.root / "by setting")
    closed = ("sh", "-c", 'exec "$0" "$@" <&-', sys.executable)
    arguments = lab.arguments(*as_settings(*SHORT))
    code, output = lab.run("encdec.train", *arguments, "--set", f"infra.output_dir={paths.root}", launcher=closed)
    assert code == 0, output
    assert list(losses(paths)) == [1, 2]
    code, output = lab.run("encdec.train", *arguments, "--output_dir", str(paths.root), launcher=closed)
    assert code == 0, output
    assert "continuing from step 2" in output


@pytest.mark.parametrize("answer", [b"\x04", b"n\n"], ids=["end of input", "no"])
def test_run_that_is_not_to_be_continued_is_left_alone(lab: Lab, answer: bytes):
    paths = RunPaths(lab.root / "run")
    paths.make()
    settings = [*SHORT, f"data.packed_dir={lab.packed}"]
    resolve_run(None, config_file=MICRO, settings=settings).write(paths.run_yaml)
    person, terminal = pty.openpty()
    os.write(person, answer)
    arguments = ["--config", str(MICRO), *as_settings(*settings), "--output_dir", str(paths.root)]
    command = [sys.executable, "-m", "encdec.train", *arguments]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, stdin=terminal, capture_output=True, text=True, check=False)
    finally:
        os.close(person)
        os.close(terminal)
    assert done.returncode == 78
    assert "Continue it?" in done.stdout
    assert done.stderr.startswith("error: A run directory holds one run")
    assert paths.attempt_numbers() == []
