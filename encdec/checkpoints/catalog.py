"""What checkpoints there are, as their manifests describe them, and which of them is the best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from encdec.checkpoints import folders
from encdec.checkpoints.manifest import read_manifest
from encdec.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointInfo:
    """One committed checkpoint as its manifest describes it (files not yet verified)."""

    checkpoint_id: str
    step: int
    metrics: dict[str, float]
    bytes: int
    time: float


def committed(root: Path) -> list[CheckpointInfo]:
    """Committed checkpoints under ``root`` with a sound manifest, by step.

    Raises:
        CheckpointError: ``root`` cannot be listed.
    """
    infos = []
    for step in folders.committed_steps(root):
        folder = root / f"step-{step}"
        try:
            manifest = read_manifest(folder)
        except CheckpointError:
            continue
        size = sum(record.bytes for record in manifest.files)
        infos.append(CheckpointInfo(folder.name, manifest.step, manifest.metrics, size, manifest.time))
    return infos


def best(infos: Iterable[CheckpointInfo], metric: str, mode: Literal["min", "max"]) -> CheckpointInfo | None:
    """The one with the least (or the greatest) ``metric``; None where none has it."""
    measured = [info for info in infos if metric in info.metrics]
    choose = min if mode == "min" else max
    return choose(measured, key=lambda info: info.metrics[metric], default=None)


def lines(infos: Iterable[CheckpointInfo], best: CheckpointInfo | None) -> list[str]:
    """One line a checkpoint: id, size, metrics, whether it is the best."""
    shown = []
    for info in infos:
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in sorted(info.metrics.items()))
        mark = "  best" if best and info.checkpoint_id == best.checkpoint_id else ""
        shown.append(f"{info.checkpoint_id:<14} {info.bytes / 1e6:>10.1f} MB  {metrics}{mark}")
    return shown
