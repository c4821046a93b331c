"""What a step boundary comes to: training goes on, is complete, is closed by a gate, or has diverged. It only decides.

The same on all ranks: it rests on reduced values, and on what has become of earlier steps, which is plain JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from encdec.checkpoints import CheckpointManager
from encdec.gates import GateLevel, GateReport, ValidationGate
from encdec.records import StepRecord
from encdec.training.config import TrainingConfig
from encdec.training.early_stopping import EarlyStopping
from encdec.training.gatekeeper import Gatekeeper
from encdec.training.recovery import Divergence, Recovery
from encdec.training.state import MOVING_WINDOW, LossHistory, TrainingState


class End(NamedTuple):
    """How training ends."""

    cause: str
    message: str
    gates: GateReport | None = None
    """The verdicts among which is the one that ends it."""


class Closed(NamedTuple):
    """A required gate that is not passed."""

    report: GateReport
    divergence: Divergence | None
    """As which it may be rolled back; None: as none."""

    def end(self) -> End:
        return End("gate", closed_by(self.report), self.report)

    def facts(self) -> dict[str, Any]:
        """For the ledger."""
        failed = self.report.failures
        said = "; ".join(f"{item.line()} ({item.measured})" for item in failed)
        return {
            "gates": [item.gate for item in failed],
            "message": said,
            "evidence": [item.to_json() for item in failed],
        }


def closed_by(report: GateReport) -> str:
    """The required gates that are not passed, by name."""
    return "gate not passed: " + "; ".join(item.line() for item in report.failures)


class Judgement:
    """Early stopping, gates and recovery, and the losses that they look at.

    Args:
        training: their fields.
        checkpoints: what a run can be rolled back to.
        gates, custom_gates: judged while training goes on.
        warmup_steps, total_steps: of the run.
        global_batch_size: samples per step.
    """

    def __init__(
        self, training: TrainingConfig, checkpoints: CheckpointManager, gates: Iterable[GateLevel],
        custom_gates: Iterable[ValidationGate], *, warmup_steps: int, total_steps: int, global_batch_size: int,
    ) -> None:  # fmt: skip
        self._total_steps, self._global_batch_size = total_steps, global_batch_size
        self.losses = LossHistory(total_steps)
        self.early_stopping = EarlyStopping(training)
        self.gatekeeper = Gatekeeper(gates, custom_gates, every=training.gate_steps, warmup_steps=warmup_steps)
        self.recovery = Recovery(training, checkpoints, warmup_steps=warmup_steps, global_batch_size=global_batch_size)

    def after_step(self, record: StepRecord) -> Divergence | None:
        """What a step has shown that may be rolled back. Every step comes by here once, whatever is asked for."""
        self.gatekeeper.after_step(record.step, record.grad_norm, record.tokens_per_second)
        self.early_stopping.judge(record.step, record.grad_norm, self.losses.last_mean(MOVING_WINDOW))
        return self.recovery.after_step(
            record.step, record.samples_consumed, self.losses.recent, self.early_stopping.fatal_spikes
        )

    def completion(self, step: int) -> End | None:
        """That training has come to its end after ``step``, and why; None while it goes on."""
        reason = self.early_stopping.reason
        if reason and (report := self.early_stopping.spikes_report()):  # weights that explode have earned nothing
            return End("gate", f"stopped early: {reason}; {closed_by(report)}", report)
        if reason:
            return End("complete", f"stopped early: {reason}")
        return End("complete", f"all {self._total_steps} steps done") if step >= self._total_steps else None

    def gates(self, state: TrainingState, *, checkpoint: bool) -> Closed | None:
        """Judge the gates that are owed at the present step, once; the first report that closes one.

        Args:
            checkpoint: the step has a scheduled checkpoint.
        """
        step = state.global_step
        levels = self.gatekeeper.owed(step, checkpoint=checkpoint, last=bool(self.completion(step)))
        for level in levels:
            report = self.gatekeeper.judge(level, step, self.losses, state.metrics)
            if report.failures:
                divergence = self.recovery.at_gate(
                    report.failures[0].gate, step, state.samples_consumed, self.losses.recent,
                    self.gatekeeper.last_passed,
                )  # fmt: skip
                return Closed(report, divergence if level == GateLevel.QUICK else None)
        if levels:
            self.gatekeeper.passed(step, levels)
        return None

    def not_finite(self, report: GateReport, state: TrainingState, *, applied: bool) -> Closed:
        """What was computed after the present step, or (``applied``) what came of it, is no number."""
        samples = state.samples_consumed + (0 if applied else self._global_batch_size)
        return Closed(report, self.recovery.not_finite(state.global_step, samples, self.losses.recent))

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
            "gates": self.gatekeeper.state_dict(),
            "rollbacks": self.recovery.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.load_state_dict(state["losses"])
        self.early_stopping.load_state_dict(state["early_stopping"])
        self.gatekeeper.load_state_dict(state.get("gates", {}))  # older states have none, nor roll-backs
        self.recovery.take_up(state.get("rollbacks", []))
