"""What came of the scales: one record a scale, as JSON lines for programs and as one table for people. No torch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from encdec.errors import ExitCode
from encdec.gates import GateLevel, GateReport
from encdec.pipeline.scales import ModelScale, in_short
from encdec.records import JsonLinesWriter

EXIT_CODES = {
    "complete": ExitCode.COMPLETE, "gate": ExitCode.GATE_NOT_PASSED,
    "signalled": ExitCode.CONTINUE_ME, "stop_requested": ExitCode.CONTINUE_ME, "refused": ExitCode.CONFIG_WRONG,
}  # fmt: skip
"""By cause; of any other: CRASHED."""


@dataclass(frozen=True, kw_only=True)
class ScaleResult:
    """What came of one scale."""

    experiment: str
    scale: ModelScale
    success: bool
    """Trained to its end, and (where validation is strict) every required gate passed."""
    cause: str
    """complete | gate | signalled | stop_requested | refused | crash"""
    reason: str
    """One line for a person: what ended it, the failed gates by name among it."""
    final_loss: float
    """Mean of the last steps, nats; nan if there was no step."""
    training_time_seconds: float
    """Spent in optimizer steps, over all attempts."""
    step: int
    parameters: int
    run_dir: str
    checkpoint: str | None
    """The one that was judged."""
    gates: dict[GateLevel, GateReport] = field(default_factory=dict)
    """By level, in the order in which they were judged."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.cause, ExitCode.CRASHED)

    @property
    def failures(self) -> list[str]:
        """Names of the required gates that did not pass."""
        return [item.gate for report in self.gates.values() for item in report.failures]

    @property
    def verdict(self) -> str:
        """success | stopped (the same command continues) | FAILED"""
        if self.success:
            return "success"
        return "stopped" if self.exit_code == ExitCode.CONTINUE_ME else "FAILED"

    def summary(self) -> str:
        """One line for a person."""
        return f"{self.scale}: {self.verdict}, {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; JSON has no nan, so a loss that is none is null."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "scale": str(self.scale),
            "final_loss": self.final_loss if math.isfinite(self.final_loss) else None,
            "gates": {str(level): report.to_json() for level, report in self.gates.items()},
            "failures": self.failures,
        }


def append_results(path: Path, results: Iterable[ScaleResult]) -> None:
    """Add a line a result to a JSON-lines file, durably.

    Raises:
        OSError: storage did not take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with JsonLinesWriter(path) as writer:
        for result in results:
            writer.write(result.to_json())
        writer.sync()


def results_table(results: Sequence[ScaleResult], planned: Sequence[ModelScale] = ()) -> Table:
    """One line a scale.

    Args:
        planned: all scales that were to be done; those that were not begun say so.
    """
    table = Table(title="Scales", box=None, pad_edge=False, header_style="bold")
    for name in ("scale", "parameters", "steps", "final loss", "training", *GateLevel, "verdict"):
        table.add_column(name, justify="right" if name in ("parameters", "steps", "final loss", "training") else "left")
    done = {result.scale: result for result in results}
    for scale in planned or list(done):
        result = done.get(scale)
        if result is None:
            table.add_row(scale, *[""] * (4 + len(GateLevel)), "not begun", style="dim")
            continue
        gates = (_gates_in_words(result.gates.get(level)) for level in GateLevel)
        table.add_row(
            scale, in_short(result.parameters), f"{result.step:,}", f"{result.final_loss:.4f}",
            f"{result.training_time_seconds:,.1f} s", *gates,
            f"{result.verdict}: {result.reason}", style="red" if result.verdict == "FAILED" else "",
        )  # fmt: skip
    return table


def _gates_in_words(report: GateReport | None) -> str:
    if report is None:
        return ""
    good = sum(item.passed for item in report.evidence)
    return f"{good} of {len(report.evidence)}"


def print_results(
    results: Sequence[ScaleResult], planned: Sequence[ModelScale] = (), console: Console | None = None
) -> None:
    """Show the table; without a terminal every scale has its line, however long."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 300)
    console.print(results_table(results, planned))
