"""README tells the truth: its commands exist, its files are there, its set-up is exactly two commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
MODULES = sorted(set(re.findall(r"python -m ([\w.]+)", README)))
HEAVY = {"torch", "transformers", "datasets", "wandb", "accelerate", "deepspeed"}


def test_set_up_is_exactly_two_commands():
    section = README.split("## Set up")[1].split("\n## ")[0]
    assert re.findall(r"^make \w+$", section, re.MULTILINE) == ["make demo", "make test"]
    assert re.findall(r"make [\w]+$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)[-1] == "make test"


@pytest.mark.parametrize("module", MODULES)
def test_command_in_readme_has_help(module: str):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_files_in_readme_exist():
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_house_in_readme_names_real_modules():
    house = README.split("## The house")[1].split("```")[1]
    launchers = re.findall(r"^  (?:\w+(?:\.py|/)\s+)+", house.split("encdec/ ")[0], re.MULTILINE)
    names = {name for line in launchers for name in line.split()}
    assert len(names) >= 12
    assert [name for name in names if not (REPOSITORY / "launchers" / name).exists()] == []
    real = {path.name for path in (REPOSITORY / "launchers").glob("*.py")} - {"__init__.py"}
    assert real <= names


def test_every_make_target_in_readme_is_there():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"`make (\w+)`", README + (REPOSITORY / "CONTRIBUTING.md").read_text())):
        assert f"\n{target}:" in makefile


def test_login_node_loads_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "launchers.submit", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "launchers.submit" in done.stdout
    assert "pydantic" in loaded  # the measurement sees imports at all
    assert not HEAVY & {name.partition(".")[0] for name in loaded}


def test_command_line_surface_is_frozen():
    """A flag that scripts rely on does not go away unnoticed."""
    done = subprocess.run(
        [sys.executable, "-m", "launchers.submit", "--help"], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout))
    assert flags >= {
        "--phase", "--config", "--set", "--name", "--run-dir", "--resume", "--cluster", "--nodes", "--gpus-per-node",
        "--dry-run", "--wait", "--no-wait", "--launcher", "--continue-by", "--max-attempts",
    }  # fmt: skip
