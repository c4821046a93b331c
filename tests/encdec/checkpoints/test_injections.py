"""Some hundred damages of every kind that ``benchmarks.corruption`` injects, and what is no damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from benchmarks.damages import CONTROLS, DAMAGES
from benchmarks.injections import Field, Material, open_field
from encdec.checkpoints import CheckpointManager
from tests.encdec.checkpoints.damage import Lab

OF_A_KIND = 12


def checkpoints(root: Path, *, seed: int, attempt: int = 0, identity: str = "of this run") -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    manager, lab = CheckpointManager(root, attempt=attempt, run_identity=identity), Lab(seed)
    for _ in range(3):
        lab.step()
        lab.save(manager)
    return root


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    root = tmp_path_factory.mktemp("material")
    material = Material(
        run=checkpoints(root / "run", seed=0),
        other_attempt=checkpoints(root / "attempt", seed=1, attempt=1),
        other_run=checkpoints(root / "other", seed=2, identity="of another"),
    )
    with open_field(material, Random(0)) as opened:
        yield opened


@pytest.fixture
def failures(field: Field) -> list[str]:
    field.tally.failures.clear()
    return field.tally.failures


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_named_and_passed_over(field: Field, failures: list[str], kind: str):
    for _ in range(OF_A_KIND):
        field.inject(kind)
    assert failures == []


@pytest.mark.parametrize("kind", CONTROLS)
def test_no_damage_is_not_objected_to(field: Field, failures: list[str], kind: str):
    field.control(kind)
    assert failures == []
