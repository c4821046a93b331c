"""A run.yaml that is not as it was written is refused with its path, what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from encdec.errors import RunDirectoryError
from encdec.files import RunPaths
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import RunConfig, read_run_config, require_same_run, resolve_run
from tests.conftest import MICRO

# what happened to the file -> (its new content, words of the message)
DAMAGED_TEXT: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("name", "field required")),
    "no YAML": (b"name: [1", ("while parsing",)),
    "cut off": (b"name: x\nphase:\n  phase: sanity_check\n", ("phase.num_tokens", "field required")),
    "a list": (b"[1, 2]", ("a list",)),
    "a word": (b"hello", ("a str",)),
    "zeros": (b"\x00" * 512, ("unacceptable character",)),
    "no UTF-8": (b"\xff\xfe\xfd", ("utf-8",)),
    "of another program": (b"title: thesis\n", ("name", "field required")),
    "an alias of itself": (b"name: &a [*a]\n", ("Circular",)),
    "a date that cannot be": (b"name: 2020-13-45\n", ("month must be in 1..12",)),
}

# what happened to the file -> (change of its values, words of the message)
DAMAGED_VALUES: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "without phase": (lambda v: v.pop("phase"), ("phase", "field required")),
    "without configuration": (lambda v: v.pop("config"), ("config", "field required")),
    "without a section": (lambda v: v["config"].pop("model"), ("config.model.", "field required")),
    "without a key that has a default": (lambda v: v["config"]["training"].pop("seed"), ("config.training.seed",)),
    "with an unknown key": (lambda v: v.update(colour="red"), ("colour", "unexpected")),
    "with an unknown key in the configuration": (
        lambda v: v["config"]["data"].update(colour="red"),
        ("config.data.colour", "not permitted"),
    ),
    "with an unknown key in the phase": (lambda v: v["phase"].update(colour="red"), ("phase.colour",)),
    "of no known phase": (lambda v: v["phase"].update(phase="ful"), ("phase.phase", "'full'")),
    "with text for a number": (lambda v: v.update(nodes="2"), ("nodes", "valid integer")),
    "without nodes": (lambda v: v.update(nodes=0), ("nodes", "greater than 0")),
    "with half a step": (lambda v: v.update(num_train_steps=2.5), ("num_train_steps", "valid integer")),
    "with an empty configuration": (lambda v: v.update(config=None), ("config", "object")),
    "with a value that breaks a rule": (lambda v: v["config"]["training"].update(seed=-1), ("config.training.seed",)),
}


@pytest.fixture
def run() -> RunConfig:
    return resolve_run(TrainingPhase.SANITY_CHECK, config_file=MICRO)


@pytest.fixture
def paths(tmp_path: Path, run: RunConfig) -> RunPaths:
    paths = RunPaths(tmp_path)
    run.write(paths.run_yaml)
    return paths


def require_refused(paths: RunPaths, run: RunConfig, words: tuple[str, ...]) -> None:
    for read in (lambda: read_run_config(paths), lambda: require_same_run(paths, run)):
        with pytest.raises(RunDirectoryError) as caught:
            read()
        message = str(caught.value)
        assert caught.value.exit_code == 78
        assert "\n" not in message
        for word in ("run.yaml must be as it was", str(paths.run_yaml), *words, "Restore run.yaml from a copy"):
            assert word in message


@pytest.mark.parametrize("damage", DAMAGED_TEXT)
def test_damaged_text(damage: str, paths: RunPaths, run: RunConfig):
    content, words = DAMAGED_TEXT[damage]
    paths.run_yaml.write_bytes(content)
    require_refused(paths, run, words)


@pytest.mark.parametrize("damage", DAMAGED_VALUES)
def test_damaged_values(damage: str, paths: RunPaths, run: RunConfig):
    change, words = DAMAGED_VALUES[damage]
    values = yaml.safe_load(paths.run_yaml.read_text(encoding="utf-8"))
    change(values)
    paths.run_yaml.write_text(yaml.safe_dump(values), encoding="utf-8")
    require_refused(paths, run, words)


def test_folder_in_its_place(paths: RunPaths, run: RunConfig):
    paths.run_yaml.unlink()
    paths.run_yaml.mkdir()
    require_refused(paths, run, ("Is a directory",))
