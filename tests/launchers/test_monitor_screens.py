"""What the live view shows, as text, in a small terminal and in a large one.

After a change that is meant: ``python -m tests.launchers.test_monitor_screens`` writes the golden files anew.
"""

from __future__ import annotations

import asyncio
import io
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

from launchers.monitor.app import Monitor
from launchers.monitor.observatory import Observatory
from launchers.names import runs_under
from launchers.slurm import Listing
from launchers.views.slurm_watch import SlurmWatch
from tests.launchers.monitor_scenes import HOST, NOW, SCENES

GOLDEN = Path(__file__).parent / "golden" / "monitor"
SIZES = ((80, 24), (160, 50))
KEYS = {"failed-gate": ("down",), "fifty-runs": ("end",)}
"""Pressed before the picture is taken."""
CASES = [(scene, size) for scene in SCENES for size in SIZES]


def observe(root: Path, listing: Listing) -> Observatory:
    """Looks at a scene, twelve seconds after Slurm was asked."""
    slurm = SlurmWatch(clock=lambda: NOW, listing=listing, asked=NOW - 12.5 if listing.states else None)
    return Observatory(lambda: runs_under(root), slurm, clock=lambda: NOW)


def text_of(app: Monitor) -> str:
    """What stands on the screen, line by line."""
    width, height = app.size
    console = Console(width=width, height=height, file=io.StringIO(), record=True, force_terminal=True)
    console.print(app.screen._compositor.render_update(full=True))
    lines = console.export_text().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def picture(scene: Callable[[Path], Listing], root: Path, size: tuple[int, int], *keys: str) -> str:
    """The screen of a scene after some keys."""

    async def look() -> str:
        observatory = observe(root, scene(root))
        app = Monitor(observatory, on_its_own=False)
        async with app.run_test(size=size) as pilot:
            app.show(observatory.look())
            await pilot.pause()
            await pilot.press(*keys)
            await pilot.pause()
            return text_of(app)

    return asyncio.run(look())


def golden(scene: str, size: tuple[int, int]) -> Path:
    return GOLDEN / f"{scene}-{size[0]}x{size[1]}.txt"


@pytest.mark.parametrize(("scene", "size"), CASES, ids=[golden(*case).stem for case in CASES])
def test_golden(scene: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    assert picture(SCENES[scene], tmp_path, size, *KEYS.get(scene, ())) == golden(scene, size).read_text()


def write_golden_files() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for scene, size in CASES:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(socket, "gethostname", return_value=HOST):
            golden(scene, size).write_text(picture(SCENES[scene], Path(folder), size, *KEYS.get(scene, ())))


if __name__ == "__main__":
    write_golden_files()
