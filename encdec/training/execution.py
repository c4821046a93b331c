"""The phases as a table, and the arithmetic that goes with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict

from encdec.estimates import estimate_steps_for_tokens, estimate_training_time
from encdec.gates import END_METRICS, GATES, LOOP_METRICS, GateLevel, ValidationGate, with_custom

__all__ = [
    "PHASE_CONFIGS",
    "PhaseConfig",
    "StartingPoint",
    "TrainingPhase",
    "estimate_steps_for_tokens",
    "estimate_training_time",
    "previous_phases",
]


AT_END = (GateLevel.FULL, GateLevel.PRODUCTION)


class TrainingPhase(StrEnum):
    """The phases, in the order in which they are earned."""

    SANITY_CHECK = "sanity_check"
    VALIDATION = "validation"
    MEDIUM = "medium"
    FULL = "full"


class LoopGates(NamedTuple):
    """What is judged while training goes on."""

    levels: tuple[GateLevel, ...] = (GateLevel.QUICK,)
    custom: tuple[ValidationGate, ...] = ()


@dataclass(frozen=True)
class PhaseConfig:
    """One row of the phase table.

    ``num_tokens`` counts raw tokens without padding; losses are in nats. A step field that is None leaves the value of
    the ``training:`` section. A run stops at whichever of tokens and steps comes first.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    phase: TrainingPhase
    num_tokens: int
    description: str
    num_train_steps: int | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    logging_steps: int | None = None
    max_loss_after_warmup: float = 10.0
    min_loss_decrease: float = 0.1
    gates: tuple[GateLevel, ...] = (GateLevel.QUICK, GateLevel.STANDARD)
    """QUICK and STANDARD are judged while training, FULL and PRODUCTION at the end."""
    custom_gates: tuple[ValidationGate, ...] = ()
    """Beside those, or in the place of those of the same name."""

    @property
    def gates_in_loop(self) -> LoopGates:
        """Those that the training loop measures."""
        return LoopGates(self.gates, tuple(gate for gate in self.custom_gates if gate.metric_name in LOOP_METRICS))

    @property
    def gates_at_end(self) -> tuple[ValidationGate, ...]:
        """Those that are judged on the plain model at the end of the phase; of two with one name the later."""
        levels = [gate for level in self.gates if level in AT_END for gate in GATES[level]]
        own = [gate for gate in self.custom_gates if gate.metric_name in END_METRICS]
        return with_custom((), [*levels, *own])

    def to_mapping(self) -> dict[str, Any]:
        """Plain nested values, as ``run.yaml`` has them."""
        return asdict(self) | {
            "phase": str(self.phase),
            "gates": [str(level) for level in self.gates],
            "custom_gates": [asdict(gate) for gate in self.custom_gates],
        }


@dataclass(frozen=True)
class StartingPoint:
    """What a phase starts from instead of the weights that its configuration names."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Literal["gate", "weights", "checkpoint"]
    """gate: the weights with which the phase before it passed its gate. Given by a person, unproved: weights;
    checkpoint: all that another run's training continues from."""
    source: str
    """Run directory of the phase before it; or a checkpoint's folder, a Hugging Face directory or a hub id."""
    identity: str
    """Identity of that run, whose gate must have been passed; or what tells the given weights from others."""

    @classmethod
    def at_checkpoint(cls, kind: Literal["gate", "weights", "checkpoint"], folder: Path, digest: str) -> StartingPoint:
        """A checkpoint's folder whose manifest carries ``digest``."""
        return cls(kind, str(folder), f"checkpoint {digest}")


def previous_phases(phase: TrainingPhase) -> list[TrainingPhase]:
    """The phases that are to be earned before this one, in order."""
    return list(TrainingPhase)[: list(TrainingPhase).index(phase)]


def _row(
    phase: TrainingPhase, tokens: int, text: str, steps: tuple[int, int, int, int], bounds: tuple[float, float],
    *gates: GateLevel,
) -> PhaseConfig:  # fmt: skip
    return PhaseConfig(phase, tokens, text, *steps, *bounds, gates or PhaseConfig.gates)


# phase -> tokens, (steps, eval, save, log), (max loss after warm-up, min decrease), gates where not QUICK and STANDARD
PHASE_CONFIGS: dict[TrainingPhase, PhaseConfig] = {
    row.phase: row
    for row in (
        _row(
            TrainingPhase.SANITY_CHECK, 10**7, "Does it run and learn at all", (100, 50, 100, 1), (15.0, 0.1),
            GateLevel.QUICK,
        ),
        _row(TrainingPhase.VALIDATION, 10**9, "Does the loss fall as it should", (5_000, 500, 1_000, 10), (8.0, 0.5)),
        _row(TrainingPhase.MEDIUM, 10**11, "A model worth evaluating", (50_000, 1_000, 5_000, 10), (5.0, 1.0)),
        _row(TrainingPhase.FULL, 5 * 10**11, "The model to publish", (100_000, 500, 10_000, 10), (4.0, 1.5)),
    )
}  # fmt: skip
