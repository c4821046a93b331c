"""Promotion by evidence: a phase's gate file, and what the next phase asks of it. Without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from encdec.errors import GateNotPassed
from encdec.files import RunPaths, atomic_write_json
from encdec.gates import Evidence
from encdec.records import read_record
from encdec.training.execution import StartingPoint, TrainingPhase


@dataclass(frozen=True, kw_only=True)
class GateFile:
    """``gates/<phase>.json``: what a phase came to, judged."""

    phase: TrainingPhase
    passed: bool
    identity: str
    """RunConfig.identity of the run that was judged."""
    step: int
    """Last step of the phase."""
    checkpoint: str | None
    """Name of the checkpoint that holds the weights that were judged."""
    weights_digest: str | None
    """Of those weights (encdec.checkpoints.weights.digest), 64 hex digits."""
    first_loss: float | None
    """From which the loss has fallen, nats: the mean over the first steps of the first phase of the chain."""
    last_loss: float | None
    """Mean over the last steps, nats."""
    time: float
    """Seconds since the epoch."""
    evidence: Sequence[Evidence] = field(default_factory=tuple)

    @property
    def failures(self) -> list[Evidence]:
        """The required gates that did not pass."""
        return [item for item in self.evidence if item.required and not item.passed]

    def why_closed(self) -> str:
        """The named gates that did not pass, with what was measured."""
        return "; ".join(item.line() for item in self.failures) or "no evidence"

    def write(self, paths: RunPaths) -> None:
        """Replace the phase's gate file."""
        paths.gates.mkdir(exist_ok=True)
        values = asdict(self) | {"evidence": [item.to_json() for item in self.evidence]}
        atomic_write_json(gate_path(paths, self.phase), values)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which weights a run has begun from: ``origin.json``, written once. Later attempts need no other run directory."""

    kind: str
    """gate | weights | checkpoint (StartingPoint.kind)"""
    source: str
    """Folder of a checkpoint, Hugging Face directory, or hub id."""
    proved: bool
    """Whether they have passed the gate of the phase before."""
    weights_digest: str
    """Of the weights as they were loaded."""
    first_loss: float | None = None
    """From which the loss of the chain is measured, nats; None: from this phase's own first steps."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gate_path(paths: RunPaths, phase: TrainingPhase) -> Path:
    return paths.gates / f"{phase}.json"


def read_gate(paths: RunPaths, phase: TrainingPhase) -> GateFile | None:
    """The verdict on a phase; None before there is one.

    Raises:
        RunDirectoryError: a damaged file.
    """
    path = gate_path(paths, phase)
    try:
        there = path.name in os.listdir(path.parent)  # NFS caches the absence of a name until its folder is opened
    except OSError:
        return None
    return read_record(path, GateFile) if there else None


def phase_before(phase: TrainingPhase) -> TrainingPhase:
    """The phase whose gate opens this one.

    Raises:
        GateNotPassed: the first phase has none.
    """
    order = list(TrainingPhase)
    if phase == order[0]:
        raise GateNotPassed(
            f"{phase} is the first phase", found="a gate before it", remedy="Start it from its configured weights"
        )
    return order[order.index(phase) - 1]


def require_passed(start: StartingPoint, phase: TrainingPhase) -> GateFile:
    """The evidence on which ``phase`` may start.

    Raises:
        GateNotPassed: there is none, it is of another configuration, or a gate in it is closed.
        RunDirectoryError: a damaged file.
    """
    before, paths = phase_before(phase), RunPaths(Path(start.source))
    gate = read_gate(paths, before)
    why = None
    if gate is None:
        why = f"no verdict in {gate_path(paths, before)}"
    elif gate.identity != start.identity:
        why = f"a verdict on another configuration in {gate_path(paths, before)}"
    elif not gate.passed or gate.checkpoint is None or gate.weights_digest is None:
        why = f"closed by {gate.why_closed()}"
    if why is not None:
        raise GateNotPassed(
            f"{phase} starts only from weights that have passed the gate of {before}",
            found=why,
            remedy=f"Give the submit command again: it goes on at {before}; --from-weights starts without proof",
        )
    assert gate is not None
    return gate


def read_origin(paths: RunPaths) -> Origin | None:
    """What the run has begun from; None where its configuration says it all, or before it has begun.

    Raises:
        RunDirectoryError: a damaged file.
    """
    return read_record(paths.origin, Origin) if paths.origin.is_file() else None
