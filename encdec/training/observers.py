"""What is told about training as it goes: step records, log lines, a progress bar. Rank 0 only."""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from encdec.checkpoints import Saved
from encdec.records import JsonLinesWriter, StepRecord, event

log = logging.getLogger("encdec.train")


class Observer(Protocol):
    """Told by the trainer after the fact; must not raise for a reason that is not worth the run.

    Those that inherit leave out what is nothing to them.
    """

    def on_step(self, record: StepRecord, moving_loss: float) -> None:
        return

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        return

    def on_save(self, saved: Saved) -> None:
        return

    def on_save_failed(self, step: int, reason: str, last: str | None) -> None:
        return

    def on_event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """A turn in the run's life: a closed gate, a roll-back, an early stop."""
        return

    def on_alert(self, alert: Mapping[str, Any]) -> None:
        """``type, step, value, threshold, message``; maybe ``occurrences``, how many of its type there have been."""
        return

    def on_end(self, ending: Mapping[str, Any]) -> None:
        """Once, before ``close``: ``cause, step, message`` of how the attempt ended, an error's too."""
        return

    def close(self) -> None:
        return


class Records(Observer):
    """Every step and every save as one JSON line. What lies before a checkpoint is as durable as the checkpoint: a run
    that goes on from it does not write it again.

    Args:
        steps: file of step records.
        events: this node's ledger.
    """

    def __init__(self, steps: Path, events: Path) -> None:
        self._steps, self._events = JsonLinesWriter(steps), JsonLinesWriter(events)

    def on_step(self, record: StepRecord, moving_loss: float) -> None:
        self._steps.write(record.to_json())

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._events.write(event("evaluated", step=step, **metrics))

    def on_save(self, saved: Saved) -> None:
        self._events.write(
            event(
                "saved",
                step=saved.step,
                checkpoint=saved.checkpoint_id,
                seconds=saved.seconds,
                blocking_seconds=saved.blocking_seconds,
            )
        )
        self._steps.sync()
        self._events.sync()

    def on_save_failed(self, step: int, reason: str, last: str | None) -> None:
        self._events.write(event("save_failed", step=step, reason=reason, checkpoint=last))

    def on_alert(self, alert: Mapping[str, Any]) -> None:
        # JSON has no nan and no infinity; the message has them
        facts = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in alert.items()}
        self._events.write(event("alert", **facts))

    def on_event(self, kind: str, facts: Mapping[str, Any]) -> None:
        self._events.write(event(kind, **facts))
        self._events.sync()  # such events are rare, and what follows from them may kill this process

    def close(self) -> None:
        self._steps.close()
        self._events.close()


class TextLog(Observer):
    """A line every ``logging_steps``; a progress bar with ETA from the last 50 steps where a terminal looks on.

    Args:
        total_steps: steps at which the run is complete.
        logging_steps: steps between lines.
    """

    def __init__(self, total_steps: int, logging_steps: int) -> None:
        self._total, self._every = total_steps, logging_steps
        self._seconds: deque[float] = deque(maxlen=50)
        self._saved = 0
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, speed_estimate_period=120)
            self._task = self._bar.add_task("", total=total_steps)
            self._bar.start()

    def on_step(self, record: StepRecord, moving_loss: float) -> None:
        self._seconds.append(record.step_seconds)
        self._saved = self._saved or record.step - 1  # a run that goes on counts from where it went on
        if self._bar:
            text = f"loss {moving_loss:.4f}  {record.tokens_per_second:,.0f} tok/s"
            self._bar.update(self._task, completed=record.step, description=text)
        elif record.step % self._every == 0 or record.step == self._total:
            log.info("%s", self._line(record, moving_loss))

    def _line(self, record: StepRecord, moving_loss: float) -> str:
        left = (self._total - record.step) * sum(self._seconds) / len(self._seconds)
        return (
            f"step {record.step}/{self._total}  loss {record.loss:.4f} (50-step mean {moving_loss:.4f})  "
            f"grad norm {record.grad_norm:.3f}  lr {record.learning_rate:.3e}  "
            f"{record.tokens_per_second:,.0f} tokens/s  "
            f"memory {record.memory_gb:.2f} GB  since checkpoint {record.step - self._saved}  ETA {left:.0f} s"
        )

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        log.info("evaluation at step %d: %s", step, "  ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def on_save(self, saved: Saved) -> None:
        self._saved = saved.step
        log.info(
            "checkpoint %s committed in %.2f s, training stood still for %.2f s",
            saved.checkpoint_id,
            saved.seconds,
            saved.blocking_seconds,
        )

    def on_save_failed(self, step: int, reason: str, last: str | None) -> None:
        log.error("no checkpoint of step %d: %s; the newest is %s", step, reason, last or "none")

    def on_alert(self, alert: Mapping[str, Any]) -> None:
        log.warning("alert %s at step %d: %s", alert["type"], alert["step"], alert["message"])

    def on_event(self, kind: str, facts: Mapping[str, Any]) -> None:
        log.warning("%s", in_words(kind, facts))

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def in_words(kind: str, facts: Mapping[str, Any]) -> str:
    """An entry of the ledger as one line; lists of records are for programs."""
    told = (f"{name} {value}" for name, value in facts.items() if name != "evidence")
    return f"{kind.replace('_', ' ')}: " + ", ".join(told)
