"""From a step's record to alerts, and from alerts to those who should know: observers that tell other observers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

from encdec.errors import TrainingDiverged
from encdec.records import StepRecord
from encdec.redaction import redact
from encdec.training.config import TrainingConfig
from encdec.training.detectors import NOT_FINITE, Alert, alert, find_not_finite
from encdec.training.monitor import TrainingMonitor
from encdec.training.notifications import Message, Sender, Tone
from encdec.training.observers import Observer
from encdec.training.rate_limit import RateLimit
from encdec.training.schedule import Schedule

log = logging.getLogger("encdec.train")
SECONDS_BETWEEN_NOTIFICATIONS = 600.0
"""Of one type: a person reads them."""
SECONDS_TO_DRAIN = 5.0
"""That an attempt's end waits for its notifications."""
SECONDS_TO_DRAIN_HURRIED = 1.0
"""The same, where a cluster is about to kill the attempt."""
TONES: Mapping[str, Tone] = {"complete": "success", "signalled": "info", "stop_requested": "info"}
"""Cause of an end -> how it is told; every other is a failure."""


class Watch(Observer):
    """Feeds the monitor from each step's record and tells the others of its alerts.

    Its windows are empty at each start, so that nothing is compared with a time before, and a restart is no alert.

    Args:
        monitor: judges the steps.
        schedule: what the learning rate should be; the trainer's own, so that a changed peak is no mismatch.
        observers: told of alerts; may contain this one, which is left out.
        steps_between: steps between two alerts of one type.
    """

    def __init__(
        self, monitor: TrainingMonitor, schedule: Schedule, observers: Iterable[Observer], steps_between: int
    ) -> None:
        self.monitor, self._schedule, self._observers = monitor, schedule, observers
        self._limit = RateLimit(steps_between)

    @classmethod
    def from_config(cls, training: TrainingConfig, schedule: Schedule, observers: Iterable[Observer]) -> Watch:
        """With the thresholds of ``training``."""
        monitor = TrainingMonitor(
            training.monitor_loss_spike,
            training.monitor_grad_norm,
            throughput_share=training.monitor_throughput_share,
            data_wait_share=training.monitor_data_wait_share,
            memory_growth=training.monitor_memory_growth,
        )
        return cls(monitor, schedule, observers, training.monitor_alert_steps)

    def on_step(self, record: StepRecord, moving_loss: float) -> None:
        raised = self.monitor.update(
            record.step,
            record.loss,
            record.grad_norm,
            record.learning_rate,
            record.tokens_per_second,
            record.step <= self._schedule.warmup_steps,
            expected_learning_rate=self._schedule.learning_rate(record.step - 1),
            data_seconds=record.data_seconds,
            step_seconds=record.step_seconds,
            memory_gb=record.memory_gb,
        )
        for each in raised:
            held = self._limit.admit(each["type"], record.step)
            if held is None:
                continue
            more = f" (so at {held} more steps since the last alert of this kind)" if held else ""
            told = {**each, "message": each["message"] + more, "occurrences": self.monitor.occurrences[each["type"]]}
            for observer in self._observers:
                if observer is not self:
                    observer.on_alert(told)

    def on_alert(self, alert: Mapping[str, Any]) -> None:
        """One that another has raised."""
        self.monitor.record(cast("Alert", dict(alert)))

    def close(self) -> None:
        counts = self.monitor.occurrences
        if counts:
            log.info("alerts of this attempt: %s", ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))


def tell_not_finite(observers: Iterable[Observer], step: int, loss: float, squares: float) -> None:
    """Tell of a step that ends training before it has a record.

    Args:
        squares: sum of squared gradients.
    """
    finding = find_not_finite(loss, math.sqrt(squares))
    if finding:
        for observer in observers:
            observer.on_alert(alert(NOT_FINITE, step, finding))


class Notifier(Observer):
    """Sends alerts, closed gates and the ends of attempts to people.

    Args:
        name: the run's.
        attempt: its number.
        sender: sends them, without waiting.
    """

    def __init__(self, name: str, attempt: int, sender: Sender) -> None:
        self._name, self._attempt, self._sender = name, attempt, sender
        self._limit = RateLimit(SECONDS_BETWEEN_NOTIFICATIONS)
        self._patience = SECONDS_TO_DRAIN

    def on_alert(self, alert: Mapping[str, Any]) -> None:
        tone: Tone = "failure" if alert["type"] == NOT_FINITE else "warning"
        self._send_seldom(alert["type"], f"step {alert['step']}: {alert['message']}", tone)

    def on_save_failed(self, step: int, reason: str, last: str | None) -> None:
        self._send_seldom("save_failed", f"no checkpoint of step {step}: {reason}; the newest is {last}", "warning")

    def on_end(self, ending: Mapping[str, Any]) -> None:
        cause = ending["cause"]
        what = "a gate is closed" if cause == "gate" else cause
        if cause == "signalled":
            self._patience = SECONDS_TO_DRAIN_HURRIED
        self._send(what, f"step {ending['step']}: {ending['message']}", TONES.get(cause, "failure"))

    def close(self) -> None:
        self._sender.close(self._patience)

    def _send_seldom(self, kind: str, body: str, tone: Tone) -> None:
        held = self._limit.admit(kind, time.monotonic())
        if held is not None:
            self._send(kind, body + (f" (and {held} more since the last message)" if held else ""), tone)

    def _send(self, what: str, body: str, tone: Tone) -> None:
        self._sender.send(Message(f"{self._name}: {what}", f"attempt {self._attempt}, {body}", tone))


def ending_of(error: BaseException, step: int) -> dict[str, Any]:
    """How an attempt ended that an error ended."""
    cause = "diverged" if isinstance(error, TrainingDiverged) else "crash"
    return {"cause": cause, "step": step, "message": redact(f"{type(error).__name__}: {error}")}
