"""A real Slurm cluster for every test that asks for one: the fixtures `sandbox` and `workspace`."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from encdec.errors import MissingPrerequisite
from launchers.sandbox import preflight
from launchers.sandbox.cluster import Sandbox
from launchers.sandbox.layout import Shape


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm: needs root and Slurm's packages; runs on a real sandbox cluster")


@pytest.fixture(scope="session")
def new_folder() -> Iterator[Callable[[], Path]]:
    """Makes folders that every user may enter and write (pytest's own are closed to other users)."""
    made: list[Path] = []

    def make() -> Path:
        made.append(Path(tempfile.mkdtemp(prefix="sandbox-", dir="/var/tmp")))
        made[-1].chmod(0o777)
        return made[-1]

    yield make
    for folder in made:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def able() -> None:
    """Skips where no sandbox can come up, and says how one could."""
    try:
        preflight.check()
    except MissingPrerequisite as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def sandbox(able: None, new_folder: Callable[[], Path]) -> Iterator[Sandbox]:
    """A cluster of 4 nodes with 8 fake GPUs each. Whoever breaks a node heals it."""
    cluster = Sandbox(new_folder() / "cluster")
    cluster.up(Shape(nodes=4, gpus=8))
    yield cluster
    cluster.down()


@pytest.fixture
def workspace(new_folder: Callable[[], Path]) -> Path:
    """A folder that all nodes and all users can write."""
    return new_folder()


@pytest.fixture
def eventually() -> Callable[..., None]:
    """eventually(condition, seconds): waits until condition() holds, or fails."""

    def wait(condition: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.2)

    return wait
