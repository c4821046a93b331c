"""Bad input: one paragraph that names rule, value and remedy, exit code 78, and nothing written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers import cluster
from launchers.submit import main
from tests.conftest import MICRO, REPOSITORY

TINY = str(REPOSITORY / "configs" / "tiny.yaml")
RUN = ["--phase", "sanity_check", "--config", str(MICRO), "--cluster", "local"]


def config(folder: Path, text: str) -> list[str]:
    file = folder.parent / "bad.yaml"
    file.write_text(text)
    return ["--phase", "sanity_check", "--cluster", "local", "--config", str(file)]


def empty_corpus(folder: Path) -> list[str]:
    (folder.parent / "text").mkdir()
    (folder.parent / "text" / "a.txt").write_text(" \n\n")
    return [*RUN, "--set", f"data.dataset_name={folder.parent / 'text'}"]


def unwritable(folder: Path) -> list[str]:
    (folder.parent / "file").write_text("not a folder")
    return [*RUN, "--run-dir", str(folder.parent / "file" / "run")]


def foreign(folder: Path) -> list[str]:
    (folder.parent / "mine").mkdir()
    (folder.parent / "mine" / "thesis.tex").write_text("precious")
    return [*RUN, "--run-dir", str(folder.parent / "mine")]


def damaged(folder: Path) -> list[str]:
    (folder.parent / "mine").mkdir()
    (folder.parent / "mine" / "run.yaml").write_text("name: x\nphase:")
    return [*RUN, "--run-dir", str(folder.parent / "mine")]


# name -> (arguments, made in a folder of their own; words that the message must have: rule, value, remedy)
CASES: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "unknown key": (
        lambda f: config(f, "training: {learning_rat: 1e-3}"),
        ("every key must be known", "training.learning_rat", "learning_rate"),
    ),
    "unknown section": (lambda f: config(f, "trainin: {}"), ("every key must be known", "trainin", "Write training")),
    "unknown phase in the file": (lambda f: config(f, "phases: {ful: {}}"), ("phases.ful", "'full'")),
    "wrong type": (lambda f: [*RUN, "--set", "training.seed=abc"], ("valid integer", "'abc'", "--set training.seed")),
    "text for a switch": (lambda f: [*RUN, "--set", "training.bf16='yes'"], ("boolean", "'yes'", "training.bf16")),
    "negative batch size": (
        lambda f: [*RUN, "--set", "training.per_device_train_batch_size=-4"],
        ("greater than 0", "-4", "per_device_train_batch_size"),
    ),
    "setting without a value": (lambda f: [*RUN, "--set", "training.seed"], ("section.key=value", "'training.seed'")),
    "phase that does not exist": (
        lambda f: ["--phase", "medum", "--config", TINY],
        ("invalid choice: 'medum'", "Did you mean medium"),
    ),
    "flag that does not exist": (lambda f: [*RUN, "--node", "2"], ("--node", "--help")),
    "no nodes": (lambda f: [*RUN, "--nodes", "0"], ("--nodes must be at least 1", "0")),
    "unwritable run directory": (unwritable, ("must be writable", "--run-dir")),
    "directory of something else": (foreign, ("holds run.yaml or does not exist yet", "mine", "another")),
    "missing configuration": (
        lambda f: ["--phase", "sanity_check", "--config", "nowhere.yaml"],
        ("must be readable", "/home/nowhere.yaml (No such file", "configs/tiny.yaml", "absolute path"),
    ),
    "default configuration from another directory": (
        lambda f: ["--phase", "sanity_check"],
        ("/home/configs/training_config.yaml (No such file", "Run from the repository's directory", "absolute path"),
    ),
    "section that is a number": (lambda f: config(f, "infra: 3"), ("infra must be a section", "found 3", "below it")),
    "vocabulary too small": (
        lambda f: [*RUN, "--set", "model.train_tokenizer_vocab_size=1"],
        ("model.train_tokenizer_vocab_size", "found 1", "Use 274 or more"),
    ),
    "positions that do not cover the lengths": (
        lambda f: [*RUN, "--set", "model.from_scratch.max_position_embeddings=32"],
        ("max_position_embeddings", "data.max_encoder_length=64", "found 32", "Use 64 or more"),
    ),
    "damaged run directory": (damaged, ("run.yaml must be as it was", "mine/run.yaml", "Restore")),
    "configuration that is no YAML": (lambda f: config(f, "a: [1"), ("must be YAML", "Mend")),
    "configuration that is a list": (lambda f: config(f, "[1, 2]"), ("mapping of sections", "list", "training")),
    "empty corpus": (empty_corpus, ("text", "none in", "data.dataset_name")),
    "corpus that is not there": (
        lambda f: [*RUN, "--set", "data.dataset_name=./nowhere"],
        ("data.dataset_name=nowhere", "no such path", "python-stdlib"),
    ),
    "global batch that does not divide": (
        lambda f: [*RUN, "--set", "training.global_batch_size=9"],
        ("multiple of the number of ranks", "9 on 2 ranks", "Use 8 samples"),
    ),
    "lengths too short": (lambda f: [*RUN, "--set", "data.max_decoder_length=2"], ("must fit", "2", "Raise")),
    "weights that are all zero": (
        lambda f: [*RUN, "--set", "data.ul2_task_weights=[0, 0, 0, 0, 0]"],
        ("not all zero", "[1, 1, 1, 1, 4]"),
    ),
    "option of a later version": (lambda f: [*RUN, "--set", "training.fp16=true"], ("training.fp16", "bf16=true")),
    "tokens of less than a step": (
        lambda f: [*RUN, "--set", "training.total_tokens=10"],
        ("at least one optimizer step", "10 tokens", "Raise"),
    ),
    "several nodes on this machine": (lambda f: [*RUN, "--nodes", "2"], ("this machine alone", "--nodes 2", "Leave")),
    "name with a slash": (lambda f: [*RUN, "--name", "a/b"], ("letters, digits", "'a/b'", "--run-dir")),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_with_rule_value_and_remedy(name: str, tmp_path: Path, monkeypatch, capsys):
    home = tmp_path / "home"
    home.mkdir()
    make, words = CASES[name]
    arguments = make(home)
    monkeypatch.chdir(home)
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 78
    captured = capsys.readouterr()
    message = captured.err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_file_system_that_takes_no_directory_is_refused(capsys):
    """/proc refuses mkdir(2) to everybody, root included."""
    assert main([*RUN, "--run-dir", "/proc/run"]) == 78
    message = capsys.readouterr().err
    assert "must be writable, found /proc/run" in message
    assert "--run-dir" in message


def test_mission_command_without_slurm_names_the_next_ones(tmp_path: Path, monkeypatch, capsys):
    """``--phase medium --nodes 4`` with no Slurm, no GPU and no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "why_no_controller", lambda: "no scontrol on PATH")
    default = str(REPOSITORY / "configs" / "training_config.yaml")
    assert main(["--phase", "medium", "--nodes", "4", "--config", default]) == 78
    message = capsys.readouterr().err
    for word in ("4 nodes", "Slurm controller", "no scontrol on PATH", cluster.HERE, cluster.SANDBOX):
        assert word in message
    assert not list(tmp_path.iterdir())


def test_default_configuration_without_gpus_names_the_next_command(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "why_no_controller", lambda: "no scontrol on PATH")
    monkeypatch.setattr(cluster, "count_gpus", lambda: 0)
    default = str(REPOSITORY / "configs" / "training_config.yaml")
    assert main(["--phase", "medium", "--config", default]) == 78
    message = capsys.readouterr().err
    assert "needs 8 GPUs on this machine, found 0" in message
    assert cluster.HERE in message


def test_sbatch_notice_without_slurm(tmp_path: Path):
    """What ``make install`` puts into .venv/bin where there is no sbatch."""
    notice = tmp_path / "sbatch"
    notice.write_bytes((REPOSITORY / "slurm" / "sbatch-without-slurm").read_bytes())
    notice.chmod(0o755)
    path = f"{tmp_path}:{tmp_path / 'tools'}"
    (tmp_path / "tools").mkdir()
    for tool in ("dirname", "cat", "sh"):
        (tmp_path / "tools" / tool).symlink_to(f"/usr/bin/{tool}")
    done = subprocess.run(
        ["sbatch", "slurm/full.sbatch"], env={"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    for word in ("sbatch needs Slurm", cluster.HERE, cluster.SANDBOX):
        assert word in done.stderr
    real = tmp_path / "tools" / "sbatch"
    real.write_text('#!/bin/sh\necho "real sbatch got $*"\n')
    real.chmod(0o755)
    done = subprocess.run(
        ["sbatch", "slurm/full.sbatch"], env={"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "real sbatch got slurm/full.sbatch\n"
