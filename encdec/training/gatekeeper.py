"""Gates inside the training loop: when which is judged, and on what.

All ranks come to the same verdicts: what is judged has been reduced over them, and the one clock that counts is rank
0's. What is owed at a step at which training was told to leave is judged at the next start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from encdec import distributed
from encdec.gates import (
    GATES,
    NO_NAN,
    Evidence,
    GateLevel,
    GateReport,
    Measurement,
    ValidationGate,
    judge,
    with_custom,
)
from encdec.training.state import MOVING_WINDOW, LossHistory

SPEED = "tokens_per_second"


def not_finite(count: int, what: str) -> GateReport:
    """The verdict on numbers that are none: ``count`` of them, ``what`` says which and where."""
    return judge((NO_NAN,), {NO_NAN.metric_name: Measurement(float(count), what)})


class NotFiniteError(Exception):
    """A step came to numbers that are none; on every rank, and nothing has been applied."""

    def __init__(self, report: GateReport) -> None:
        super().__init__(report.summary())
        self.report = report


class Gatekeeper:
    """Judges QUICK gates every so many steps, STANDARD and custom ones at scheduled checkpoints after warm-up.

    Once warm-up is over, a custom gate takes the place of those of the same name that are judged; any other is judged
    at checkpoints. The state is plain JSON.

    Args:
        levels: which of QUICK and STANDARD are judged.
        custom: gates of one's own.
        every: steps between QUICK checks.
        warmup_steps: steps that only QUICK gates judge, as the table has them.
    """

    def __init__(
        self, levels: Iterable[GateLevel], custom: Iterable[ValidationGate], *, every: int, warmup_steps: int
    ) -> None:
        levels, self._custom = frozenset(levels), tuple(custom)
        self._quick = GATES[GateLevel.QUICK] if GateLevel.QUICK in levels else ()
        standard = GATES[GateLevel.STANDARD] if GateLevel.STANDARD in levels else ()
        replaced = {gate.name for gate in self._quick} - {gate.name for gate in standard}
        self._standard = with_custom(standard, (gate for gate in self._custom if gate.name not in replaced))
        self._every, self._warmup_steps = every, warmup_steps
        self._state: dict[str, Any] = {"passed": 0, "steps": 0, "grad_norms": 0.0, "evidence": {}}
        self._speeds: list[float] = []

    @property
    def last_passed(self) -> int:
        """The last step at which gates were judged and all passed; 0 before the first."""
        return self._state["passed"]

    @property
    def evidence(self) -> GateReport:
        """The newest verdicts of each level, all passed; empty before the first."""
        levels = self._state["evidence"].values()
        return GateReport(tuple(Evidence(**item) for level in levels for item in level))

    def after_step(self, step: int, grad_norm: float, tokens_per_second: float) -> None:
        """Take in one step; every step comes by here once."""
        self._speeds.append(tokens_per_second)
        if step > self._warmup_steps:
            self._state["steps"] += 1
            self._state["grad_norms"] += grad_norm

    def owed(self, step: int, *, checkpoint: bool, last: bool = False) -> list[GateLevel]:
        """The levels to be judged at ``step``, and not judged there yet; the quickest first.

        Args:
            checkpoint: the step has a scheduled checkpoint.
            last: training ends here: what was asked for is judged once at least, however short it was.
        """
        if step in (0, self.last_passed):
            return []
        at_checkpoint = checkpoint and step > self._warmup_steps
        quick = self._quick and (last or step % self._every == 0)
        return [GateLevel.QUICK] * bool(quick) + [GateLevel.STANDARD] * bool(self._standard and at_checkpoint)

    def judge(self, level: GateLevel, step: int, losses: LossHistory, evaluation: Mapping[str, float]) -> GateReport:
        """The verdicts of one level; collective where a gate asks for the speed.

        Args:
            evaluation: metrics of the evaluation at this very step; empty where there was none.
        """
        gates = self._standard
        if level == GateLevel.QUICK:
            names = {gate.name for gate in self._quick}
            mine = [gate for gate in self._custom if gate.name in names and step > self._warmup_steps]
            gates = with_custom(self._quick, mine)
        if not self._speeds:  # at a start, before a step has been timed: a speed of another place would be judged
            gates = tuple(gate for gate in gates if gate.metric_name != SPEED)
        asked = {gate.metric_name for gate in gates}
        report = judge(gates, self._measure(step, losses, evaluation, asked))
        if report.passed:
            self._state["evidence"] = {
                **self._state["evidence"], str(level): [item.to_json() for item in report.evidence]
            }  # fmt: skip
        return report

    def passed(self, step: int, levels: Iterable[GateLevel]) -> None:
        """All of ``levels``, owed at ``step``, have passed."""
        self._state["passed"] = step
        if GateLevel.STANDARD in levels:
            self._state.update(steps=0, grad_norms=0.0)
            self._speeds.clear()

    def _measure(
        self, step: int, losses: LossHistory, evaluation: Mapping[str, float], asked: Iterable[str]
    ) -> dict[str, Measurement]:
        mean, window = losses.last_mean(MOVING_WINDOW), f"the last {len(losses.recent)} steps, at step {step}"
        measured = {
            "loss": Measurement(mean, f"mean training loss of {window}"),
            "loss_decrease": Measurement(
                losses.first_mean - mean, f"mean of the first {len(losses.first)} steps minus mean of {window}"
            ),
            "nan_count": Measurement(0.0, f"losses and gradient norms of all steps up to {step}"),
            "perplexity": Measurement(math.exp(min(mean, 700.0)), f"exp of the mean training loss of {window}"),
        }
        if steps := self._state["steps"]:
            measured["grad_norm"] = Measurement(
                self._state["grad_norms"] / steps, f"mean of {steps} steps since the last check, at step {step}"
            )
        if evaluation:
            measured["eval_loss"] = Measurement(evaluation["loss"], f"evaluation at step {step}")
            measured["perplexity"] = Measurement(evaluation["perplexity"], f"evaluation at step {step}")
        if SPEED in asked and (speed := self._speed()):
            measured[SPEED] = Measurement(speed, f"median of rank 0's steps since the last check, at step {step}")
        return measured

    def _speed(self) -> float | None:
        """Rank 0's, on every rank: each has its own clock."""
        speeds = sorted(self._speeds)
        return distributed.broadcast(speeds[len(speeds) // 2] if speeds else None)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state.update(state)
        self._speeds.clear()
