"""The checklist before a long run, as ``python -m launchers.preflight`` and for ``launchers.submit``.

Each check is a function of the resolved run and of what it looks at. It says what it found, never guesses what it
cannot know, and names what to do. Nothing is written, no torch is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from encdec.files import RunPaths
from encdec.training.run_config import RunConfig
from launchers.preflight.check import Check, failed, lines
from launchers.preflight.needs import check_configuration, check_memory, check_text, check_weights, device_memory_gb
from launchers.preflight.storage import check_place, check_resume, check_room
from launchers.preflight.trackers import check_trackers

__all__ = ["Check", "checklist", "failed", "lines"]


def checklist(
    run: RunConfig,
    paths: RunPaths,
    *,
    resume: Path | None = None,
    gpu_memory_gb: float | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[Check]:
    """All checks, in the order in which a run would meet what they look at.

    Args:
        paths: of the run directory, which need not exist yet.
        resume: checkpoint folder that the run is to go on from; None: whatever the run directory holds.
        gpu_memory_gb: of one GPU, GB of 10**9 bytes; None: asked of nvidia-smi, if there is one here.
        environment: where trackers find their keys.
    """
    return [
        check_configuration(run),
        check_text(run),
        check_weights(run),
        check_memory(run, gpu_memory_gb or device_memory_gb(run)),
        check_place(paths),
        *check_room(run, paths),
        check_resume(run, paths, resume),
        *check_trackers(run, environment),
    ]
