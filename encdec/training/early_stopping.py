"""Stops a run whose loss no longer falls or whose gradients explode; plain JSON state, so exact across restarts."""

from __future__ import annotations

from typing import Any

from encdec.gates import GateReport, Measurement, ValidationGate, judge
from encdec.training.config import TrainingConfig

EXEMPT_STEPS = 50
"""Steps at the start that are never judged."""


class EarlyStopping:
    """Plateau of the mean training loss, or consecutive gradient spikes.

    Args:
        training: its ``early_stopping_*`` and ``grad_spike_*`` fields.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._rules = training
        self._state: dict[str, Any] = {"best_loss": None, "checks_without_improvement": 0, "spikes": 0, "reason": None}

    @property
    def reason(self) -> str | None:
        """Why training has ended for good, also after a restart; None while it may go on."""
        return self._state["reason"] if self._rules.early_stopping_enabled else None

    @property
    def fatal_spikes(self) -> int:
        """Consecutive gradient spikes, if there are enough of them to end training."""
        spikes = self._state["spikes"] if self.reason else 0
        return spikes if spikes >= self._rules.grad_spike_patience else 0

    def spikes_report(self) -> GateReport | None:
        """The closed gate ``gradient_spikes``, where it is they that end training."""
        spikes = self.fatal_spikes
        gate = ValidationGate("gradient_spikes", "consecutive_gradient_spikes", self._rules.grad_spike_patience, "<")
        source = f"steps in a row with a gradient norm above {self._rules.grad_spike_threshold:g}"
        return judge((gate,), {gate.metric_name: Measurement(float(spikes), source)}) if spikes else None

    def judge(self, step: int, grad_norm: float, mean_loss: float) -> str | None:
        """Reason to stop, or None. Every step must come by here once, also one at which the run is told to leave."""
        if not self.after_step(step, grad_norm) and step % self._rules.eval_steps == 0:
            self.at_check(step, mean_loss)
        return self.reason

    def after_step(self, step: int, grad_norm: float) -> str | None:
        """Reason to stop after this step, or None."""
        if not self._rules.early_stopping_enabled or step <= EXEMPT_STEPS:
            return None
        self._state["spikes"] = self._state["spikes"] + 1 if grad_norm > self._rules.grad_spike_threshold else 0
        if self._state["spikes"] < self._rules.grad_spike_patience:
            return None
        self._state["reason"] = (
            f"gradient norm above {self._rules.grad_spike_threshold:g} for {self._state['spikes']} consecutive steps, "
            f"last {grad_norm:.4g}"
        )
        return self.reason

    def at_check(self, step: int, mean_loss: float) -> str | None:
        """Reason to stop at a check (one an evaluation interval), or None."""
        if not self._rules.early_stopping_enabled or step <= EXEMPT_STEPS:
            return None
        best = self._state["best_loss"]
        if best is None or mean_loss < best - self._rules.early_stopping_min_delta:
            self._state.update(best_loss=mean_loss, checks_without_improvement=0)
            return None
        self._state["checks_without_improvement"] += 1
        if self._state["checks_without_improvement"] < self._rules.early_stopping_patience:
            return None
        checks = self._rules.early_stopping_patience
        self._state["reason"] = f"mean loss {mean_loss:.4f} has not fallen below {best:.4f} for {checks} checks"
        return self.reason

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state.update(state)
