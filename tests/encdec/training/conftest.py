"""One run of the micro model under each engine, for all that compare with it or continue from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.encdec.training.engine_lab import END, SAVED, Made, Scene
from tests.many_ranks import in_ranks

CHECKPOINTING = "infra.fsdp_activation_checkpointing=true"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made.make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def whole_run(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    """whole_run(engine): four ranks, accumulating, to step END, saved every SAVED steps."""
    scenes: dict[str, Scene] = {}

    def run(engine: str) -> Scene:
        if engine not in scenes:
            settings = [f"training.save_steps={SAVED}", CHECKPOINTING]
            scenes[engine] = Scene(made, engine, tmp_path_factory.mktemp(engine), END, settings=settings)
            in_ranks(4, scenes[engine])
        return scenes[engine]

    return run
