from __future__ import annotations

from pathlib import Path

import pytest

from encdec.checkpoints import CheckpointManager
from tests.encdec.checkpoints.damage import Lab


@pytest.fixture
def saved(tmp_path: Path) -> tuple[CheckpointManager, Lab]:
    """Checkpoints of steps 1, 2 and 3."""
    manager, lab = CheckpointManager(tmp_path / "checkpoints"), Lab()
    for _ in range(3):
        lab.step()
        lab.save(manager)
    return manager, lab
