"""What checkpoints there are, as their manifests describe them, and which of them is the best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from encdec.checkpoints import folders
from encdec.checkpoints.manifest import Manifest, read_manifest
from encdec.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointInfo:
    """One committed checkpoint as its manifest describes it (files not yet verified)."""

    checkpoint_id: str
    step: int
    metrics: dict[str, float]
    bytes: int
    time: float
    scheduled: bool = True
    """Whether the schedule of steps asked for it."""
    run_identity: str = ""
    """Of the run that made it; empty where it had none."""
    samples_consumed: int = 0
    """Its position in the sample stream."""


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
        infos.append(described(manifest))
    return infos


def described(manifest: Manifest) -> CheckpointInfo:
    """A step checkpoint as its manifest describes it."""
    size = sum(record.bytes for record in manifest.files)
    return CheckpointInfo(
        f"step-{manifest.step}", manifest.step, manifest.metrics, size, manifest.time,
        scheduled=manifest.scheduled, run_identity=manifest.run_identity, samples_consumed=manifest.samples_consumed,
    )  # fmt: skip


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
