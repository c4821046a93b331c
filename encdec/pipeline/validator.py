"""Judges a model by the gates of a level: measures what is not known yet, keeps the verdicts, stops who is strict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from encdec.errors import GateNotPassed
from encdec.gates import GATES, NOT_MEASURED, GateLevel, GateReport, Measurement, ValidationGate, judge, with_custom
from encdec.pipeline.evaluators import Batches, Evaluation, Evaluator, Measured, measure

LEVELS = list(GateLevel)
FIRST_LEVEL: Mapping[str, GateLevel] = {
    "loss": GateLevel.QUICK, "nan_count": GateLevel.QUICK, "grad_norm": GateLevel.STANDARD,
    "perplexity": GateLevel.STANDARD, "loss_decrease": GateLevel.STANDARD,
}  # fmt: skip
"""Where a metric begins to be measured; all others at FULL."""
CustomGates = Iterable[ValidationGate] | Mapping[GateLevel, Iterable[ValidationGate]]


def gates_at(level: GateLevel, custom: CustomGates = ()) -> tuple[ValidationGate, ...]:
    """The table's gates of a level with the user's own laid over them.

    Args:
        custom: by level, or without (see ``asked_at``).
    """
    if isinstance(custom, Mapping):
        return with_custom(GATES[level], custom.get(level, ()))
    return with_custom(GATES[level], [gate for gate in custom if asked_at(level, gate)])


def asked_at(level: GateLevel, gate: ValidationGate) -> bool:
    """Whether a gate that names no level is asked for at ``level``: it replaces the one of its name wherever the table
    has that; one of a new name is asked for from the first level on that measures its metric.
    """
    homes = [home for home, gates in GATES.items() if any(row.name == gate.name for row in gates)]
    first = FIRST_LEVEL.get(gate.metric_name, GateLevel.FULL)
    return level in homes if homes else LEVELS.index(level) >= LEVELS.index(first)


@dataclass(frozen=True)
class Verdict:
    """One round of judging."""

    level: GateLevel
    step: int | None
    report: GateReport
    model: str = ""
    """What was judged, where several are."""


class PipelineValidator:
    """Judges by the gates of QUICK, STANDARD, FULL and PRODUCTION.

    A metric that nobody measured passes no gate. A required gate that does not pass raises where ``strict``, after the
    verdict has been kept in ``results``; otherwise it is only reported.

    Args:
        strict: whether a required gate that does not pass raises.
        custom_gates: laid over the table's (see ``asked_at``).
        tokenizer: belongs to the models; the task suites need it.
        benchmarks: metric -> JSON-lines file of questions and answers.
        evaluators: metric -> evaluator, besides those that are registered.
        generations: most held-out samples for which something is generated.
    """

    def __init__(
        self,
        strict: bool = True,
        custom_gates: CustomGates = (),
        *,
        tokenizer: Any = None,
        benchmarks: Mapping[str, str | Path] | None = None,
        evaluators: Mapping[str, Evaluator] | None = None,
        generations: int = 64,
    ) -> None:
        self.strict = strict
        self.custom_gates = custom_gates if isinstance(custom_gates, Mapping) else tuple(custom_gates)
        self.tokenizer, self.benchmarks, self.evaluators = tokenizer, dict(benchmarks or {}), dict(evaluators or {})
        self.generations = generations
        self.model_name = ""
        """Goes into the verdicts from now on."""
        self.results: list[Verdict] = []

    def gates(self, level: GateLevel) -> tuple[ValidationGate, ...]:
        """What is asked for at ``level``."""
        return gates_at(level, self.custom_gates)

    def validate_quick(self, model: nn.Module | None, loss: float, step: int) -> GateReport:
        """Is this a training run at all: judges a loss, nats, and looks for values that are no numbers.

        Args:
            model: its weights and gradients are looked at; None: only the loss is.

        Raises:
            GateNotPassed: a required gate did not pass, and ``strict``.
        """
        source = f"training, step {step}"
        known = {"loss": Measurement(loss, source)}
        bad = 0 if math.isfinite(loss) else 1
        if model is not None:
            found = measure(["nan_count"], Evaluation(model, step=step)).values["nan_count"]
            bad, source = bad + int(found.value), f"the loss and {found.source}"
        return self.judge(GateLevel.QUICK, model, known | {"nan_count": Measurement(bad, source)}, step=step)

    def validate_standard(
        self, model: nn.Module, eval_dataloader: Batches | None = None, *,
        measured: Mapping[str, Measurement] | None = None, step: int | None = None,
    ) -> GateReport:  # fmt: skip
        """At checkpoints; loss and perplexity on ``eval_dataloader``, the gradient norm as ``measured`` or as the model
        holds it.

        Raises:
            GateNotPassed: a required gate did not pass, and ``strict``.
            DataError: a suite's file is not what it must be.
        """
        return self.judge(GateLevel.STANDARD, model, measured, eval_dataloader, step)

    def validate_full(
        self, model: nn.Module, eval_dataloader: Batches | None = None, *,
        measured: Mapping[str, Measurement] | None = None, step: int | None = None,
    ) -> GateReport:  # fmt: skip
        """Before the next scale. Raises as ``validate_standard``."""
        return self.judge(GateLevel.FULL, model, measured, eval_dataloader, step)

    def validate_production(
        self, model: nn.Module, eval_dataloader: Batches | None = None, *,
        measured: Mapping[str, Measurement] | None = None, step: int | None = None,
    ) -> GateReport:  # fmt: skip
        """Before anybody else uses the model. Raises as ``validate_standard``."""
        return self.judge(GateLevel.PRODUCTION, model, measured, eval_dataloader, step)

    def judge(
        self,
        level: GateLevel,
        model: nn.Module | None,
        measured: Mapping[str, Measurement] | None = None,
        eval_dataloader: Batches | None = None,
        step: int | None = None,
    ) -> GateReport:
        """Measure what ``measured`` lacks, judge, keep the verdict.

        Args:
            model: plain; None: only what ``measured`` has is known.
            measured: by metric; goes before any evaluator.
            eval_dataloader: held-out batches.
            step: of the model's weights.

        Raises:
            GateNotPassed: a required gate did not pass, and ``strict``.
        """
        gates = self.gates(level)
        found = Measured(dict(measured or {}), {})
        if model is not None:
            evaluation = Evaluation(
                model, eval_dataloader, self.tokenizer, self.benchmarks, step, generations=self.generations
            )
            metrics = [gate.metric_name for gate in gates]
            found = measure(metrics, evaluation, known=measured, evaluators=self.evaluators)
        report = with_reasons(judge(gates, found.values), found.missing)
        self.keep(level, report, step)
        if self.strict and not report.passed:
            raise GateNotPassed(
                f"Every required gate of level {level} must pass",
                found="; ".join(item.line() for item in report.failures) or "no gate at all",
                remedy=_remedy(report),
            )
        return report

    def keep(self, level: GateLevel, report: GateReport, step: int | None) -> None:
        """Add a verdict to ``results``, also one that was reached elsewhere."""
        self.results.append(Verdict(level, step, report, self.model_name))

    def print_summary(self, console: Console | None = None) -> None:
        """Show all verdicts so far; without a terminal every gate has its line, however long."""
        console = console or Console()
        if not console.is_terminal:
            console.width = max(console.width, 200)
        console.print(verdict_table(self.results))


def with_reasons(report: GateReport, missing: Mapping[str, str]) -> GateReport:
    """The evidence of what nobody measured says why."""
    return GateReport(
        tuple(
            replace(item, measured=f"{NOT_MEASURED}: {missing[item.metric]}") if item.metric in missing else item
            for item in report.evidence
        )
    )


def _remedy(report: GateReport) -> str:
    missing = [item for item in report.failures if item.value is None]
    if missing:
        return f"Have it measured ({missing[0].metric}: {missing[0].measured.removeprefix(NOT_MEASURED + ': ')})"
    return "Train longer or otherwise, or lay a gate of your own over it"


def verdict_table(results: Iterable[Verdict]) -> Table:
    """One line a gate."""
    table = Table(title="Gates", box=None, pad_edge=False, header_style="bold")
    for name in ("model", "level", "step", "gate", "value", "must be", "verdict", "measured"):
        table.add_column(name, justify="right" if name in ("step", "value") else "left")
    for verdict in results:
        for item in verdict.report.evidence:
            word = "passed" if item.passed else "FAILED" if item.required else "not passed, not required"
            table.add_row(
                verdict.model, verdict.level, "" if verdict.step is None else f"{verdict.step:,}", item.gate,
                "none" if item.value is None else f"{item.value:.4g}", f"{item.comparison} {item.threshold:g}", word,
                item.measured, style="" if item.passed else "red" if item.required else "yellow",
            )  # fmt: skip
    return table
