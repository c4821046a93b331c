"""Secrets of the environment reach the job and nothing else; what a run writes nobody else can read."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from encdec.errors import ConfigError, MissingPrerequisite
from encdec.files import RunPaths, make_private, staged_directory
from encdec.redaction import NAMED_SECRETS, Redacting, redact, secrets_in
from launchers import env_secrets
from launchers.launch_options import LaunchOptions
from tests.conftest import REPOSITORY, Lab
from tests.launchers.secret_lab import CANARIES, command_lines, found_below, found_in, reached_by_others, views

VALUE = "v4lue-that-nobody-reads"


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


# ---- the flag


@pytest.mark.parametrize("word", [f"TOKEN={VALUE}", VALUE, "", "1A", "A B", "A\n"])
def test_a_value_in_the_place_of_the_name_is_refused_unseen(word: str):
    with pytest.raises(ConfigError, match="never its value") as refusal:
        env_secrets.require_names(["HF_TOKEN", word])
    assert VALUE not in str(refusal.value) and "number 2" in str(refusal.value)


def test_a_variable_that_no_job_gets_is_refused():
    with pytest.raises(ConfigError, match="SBATCH_TOKEN, which is Slurm's"):
        env_secrets.require_names(["SBATCH_TOKEN"])


@pytest.mark.parametrize("environment", [{}, {"HF_TOKEN": ""}])
def test_a_secret_that_is_not_there_is_refused_before_anything_starts(environment: dict[str, str]):
    with pytest.raises(MissingPrerequisite, match=r"no HF_TOKEN.*read -rs HF_TOKEN"):
        env_secrets.require_values(["WANDB_API_KEY", "HF_TOKEN"], {"WANDB_API_KEY": VALUE, **environment})


@pytest.mark.parametrize(
    ("flags", "kept"), [("job_comment,job_env", True), ("job_env", True), ("job_script", False), ("(null)", False)]
)
def test_accounting_that_shows_environments_is_refused(play: Callable[..., None], flags: str, kept: bool):
    play("scontrol", f"AccountingStorageType   = accounting_storage/slurmdbd\nAccountingStoreFlags    = {flags}\n")
    env_secrets.require_unkept([])  # nobody is asked
    if kept:
        with pytest.raises(MissingPrerequisite, match="job_env"):
            env_secrets.require_unkept(["HF_TOKEN"])
    else:
        env_secrets.require_unkept(["HF_TOKEN"])


def test_a_job_without_the_secret_says_which(tmp_path: Path):
    paths = RunPaths(tmp_path)
    environment = {"HF_TOKEN": VALUE}
    env_secrets.take_over(paths, environment)  # no flag was given
    assert NAMED_SECRETS not in environment
    LaunchOptions(env_secrets=("HF_TOKEN", "LAB_WORD")).write(paths)
    with pytest.raises(MissingPrerequisite, match="no LAB_WORD in its environment"):
        env_secrets.take_over(paths, environment)
    environment["LAB_WORD"] = "w"
    env_secrets.take_over(paths, environment)
    assert environment[NAMED_SECRETS] == "HF_TOKEN LAB_WORD"


# ---- what is logged


def test_values_of_secrets_are_masked_wherever_they_stand(monkeypatch: pytest.MonkeyPatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(NAMED_SECRETS, "LAB_PASSPHRASE")
    try:
        raise ConnectionError(f"https://user:{CANARIES['HF_TOKEN']}@example.invalid")
    except ConnectionError as error:
        record = logging.LogRecord("x", 40, "f", 1, "%s", (" ".join(CANARIES.values()),), (type(error), error, None))
    text = Redacting("%(message)s").format(record)
    assert not found_in(text)
    assert "https://user:***@example.invalid" in text


def test_short_values_and_names_of_files_mask_nothing():
    environment = {"API_KEY": "ab", "HF_TOKEN_PATH": "/home/me/token", "NCCL_DEBUG": "WARNING", "A_SECRET": "abcdef"}
    assert secrets_in(environment) == ["abcdef"]
    assert redact("the abcdefg", secrets_in(environment)) == "the ***g"


def test_numbers_are_secrets_only_where_they_are_named():
    environment = {"API_TOKEN": "20260101", "A_PASS": "abcdefg", "GH_PAT": "hijklmn", "TEAM_WEBHOOK": "opqrstu"}
    assert sorted(secrets_in(environment)) == ["abcdefg", "hijklmn", "opqrstu"]
    assert "20260101" in secrets_in(environment, named=["API_TOKEN"])
    assert "20260101" in secrets_in({**environment, NAMED_SECRETS: "API_TOKEN"})


def test_passwords_in_addresses_are_masked():
    assert redact("see postgres://me:p@ss:w0rd@db:5432/x", []) == "see postgres://me:***@db:5432/x"
    harmless = '{"at": "http://10.0.0.1:9400","mail":"a@b"} https://me@host/a:b@c http://h:80?to=a@b'
    assert redact(harmless, []) == harmless


def test_the_addresses_of_notifications_are_not_said_either(tmp_path: Path):
    environment = {"LAB_NOTIFY": f"mailto://x {VALUE}"}
    env_secrets.take_over(RunPaths(tmp_path), environment, notify_env="LAB_NOTIFY")
    assert VALUE in secrets_in(environment)


@pytest.mark.parametrize("flags", ["job_env", "job_script"])
def test_inside_a_job_accounting_that_shows_environments_is_a_warning(play: Callable[..., None], capsys, flags: str):
    play("scontrol", f"AccountingStoreFlags    = {flags}\n")
    env_secrets.warn_of_accounting(["HF_TOKEN"])
    output = capsys.readouterr()
    assert ("HF_TOKEN" in output.err) == (flags == "job_env") and output.out == ""  # stdout is the run directory


# ---- what others can read


def test_folders_are_their_user_s_alone_under_any_umask(tmp_path: Path, no_umask: None):
    make_private(tmp_path / "a" / "b" / "run")
    with staged_directory(tmp_path / "c" / "d" / "run") as staging:
        (staging / "file").touch()
    for name in ("a/b", "c/d"):
        assert not reached_by_others(tmp_path / name / "run")
        assert (tmp_path / name).stat().st_mode & 0o022 == 0  # nor can anybody put another run in its place


# ---- a real run


def test_a_whole_run_here_keeps_secrets_and_is_nobody_else_s(lab: Lab, no_umask: None, monkeypatch):
    lab.packed = lab.root / "text" / "packed"
    lab.packed.parent.mkdir(mode=0o700)
    home = lab.root / "home"
    for name, value in {**CANARIES, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home))
    monkeypatch.setenv("LAB_NOTIFY", f"json://127.0.0.1:1/{CANARIES['OPENAI_API_KEY']}")  # nobody listens on port 1
    run = RunPaths(lab.root / "runs" / "run")
    extra = [
        "--env-secret", "LAB_PASSPHRASE", "--env-secret", "WANDB_API_KEY", "--set", "infra.notify_env=LAB_NOTIFY",
        "--set", 'training.report_to=["wandb","tensorboard"]',
        "--set", f"infra.checkpoint_mirror={lab.root / 'mirror'}",
    ]  # fmt: skip
    with command_lines() as seen:
        planned = lab.submit(run.root, *extra, "--dry-run")
        code, output = lab.submit(run.root, *extra)
    pages = [lab.root / "report.html", lab.root / "runs.html"]
    shown = [lab.run(f"launchers.{view}", *more, str(run.root)) for view, *more in views(*pages)]
    assert not found_below(pages) and not any(reached_by_others(page) for page in pages)
    assert (planned[0], code) == (0, 0), output
    assert json.loads(run.launch.read_text())["env_secrets"] == ["LAB_PASSPHRASE", "WANDB_API_KEY"]
    assert list(run.root.rglob("*.wandb")) and list(run.root.rglob("*tfevents*"))
    assert any("launchers.submit" in line for line in seen) and any("wandb" in line for line in seen)
    for text in (planned[1], output, *(text for _, text in shown), *seen):
        assert not found_in(text), text
    written = [run.root, lab.packed, lab.root / "mirror", home]
    assert not found_below(written)
    assert not reached_by_others(run.root)
    shared = [lab.packed, lab.root / "mirror"]  # several runs may use them: what each puts there is nobody else's
    assert [path for folder in shared for path in reached_by_others(folder)] == shared
    assert all(folder.stat().st_mode & 0o022 == 0 for folder in (run.root.parent, *shared))


def test_a_standalone_run_is_nobody_else_s(lab: Lab, no_umask: None):
    run = RunPaths(lab.root / "out" / "run")
    few = ["--set", "phases.sanity_check.num_train_steps=4", "--set", "phases.sanity_check.min_loss_decrease=-9"]
    code, output = lab.run(
        "encdec.train", *lab.arguments("--phase", "sanity_check", "--set", "infra.num_gpus=1", *few),
        "--output_dir", str(run.root),
    )  # fmt: skip
    assert code == 0, output
    assert not reached_by_others(run.root)


def test_the_command_refuses_a_value_and_leaves_nothing(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "launchers.submit", "--phase", "sanity_check", "--config", "configs/tiny.yaml",
         "--run-dir", str(tmp_path / "run"), "--env-secret", f"TOKEN={VALUE}"],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert "never its value" in done.stderr and VALUE not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
