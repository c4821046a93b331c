"""What a person sees: the plan, the progress, the summary."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from encdec.files import AttemptPaths, RunPaths
from encdec.records import read_json_lines
from encdec.training.run_config import read_run_config
from launchers import plan as planning

SECONDS_BETWEEN_LINES = 5.0
"""Without a terminal, a line this often instead of a bar."""
SPARKS = "▁▂▃▄▅▆▇█"


def console() -> Console:
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def plan(decided: planning.Plan, *, continues: bool) -> None:
    """Print the plan."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    other = "tokens" if decided.bound_by == "steps" else "steps"
    others = decided.steps_by_tokens if other == "tokens" else decided.steps_by_table
    rows = {
        "phase": f"{decided.phase}: {decided.description.lower()}",
        "run": decided.name + (" (exists, will be continued)" if continues else ""),
        "where": f"{decided.cluster} ({decided.why_cluster}), {decided.nodes} node(s) x {decided.ranks_per_node} {decided.device} rank(s)",
        "sharding": decided.sharding,
        "batch": f"{decided.global_batch_size} samples x {decided.sample_length} tokens = {decided.tokens_per_step:,} tokens a step "
        f"({decided.micro_batch_size} a micro-batch, {decided.gradient_accumulation_steps} accumulated, "
        f"{decided.nodes * decided.ranks_per_node} ranks)",
        "steps": f"{decided.num_train_steps:,} = {decided.tokens:,} tokens; {decided.bound_by} bind ({other} would allow {others:,} steps)",
        "schedule": f"peak {decided.learning_rate:g}, {decided.warmup_steps} warm-up steps",
        "checkpoints": f"every {decided.save_steps:,} steps, {decided.checkpoints} in all; evaluation every {decided.eval_steps:,}",
        "passes if": f"the loss falls by {decided.min_loss_decrease:g} and ends at or below {decided.max_loss_after_warmup:g}",
        "text": decided.text,
        "weights": decided.weights,
        "directory": decided.run_dir,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console().print(table)


def attached(paths: RunPaths) -> None:
    console().print(f"attempt {paths.newest_attempt()} is running already; following it")


def started(paths: RunPaths) -> int:
    console().print(f"started; the same command follows it, and its files are in {paths.root}")
    return 0


class Progress:
    """Follows one attempt's step records: a bar on a terminal, else a line now and then.

    Args:
        attempt: the attempt's files.
        total_steps: steps at which the run is complete.
    """

    def __init__(self, attempt: AttemptPaths, total_steps: int) -> None:
        self._attempt, self._total = attempt, total_steps
        self._offset = 0
        self._latest: dict[str, Any] | None = None
        self._seconds: list[float] = []
        self._next_line = 0.0
        self._said = -1
        self._console = console()
        self._status = self._console.status("starting") if sys.stdout.isatty() else None
        if self._status:
            self._status.start()

    def refresh(self) -> None:
        """Read what is new and show it."""
        if not self._attempt.steps.is_file():
            return
        with self._attempt.steps.open("rb") as stream:
            stream.seek(self._offset)
            fresh = stream.read()
        whole, newline, _ = fresh.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            self._take(line)
        self._show()

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            return  # torn by a kill
        if self._latest and record["restart"] > self._latest["restart"]:
            self.say(f"a rank died; started again in place, continuing from step {record['step']}")
        self._latest = record
        self._seconds = [*self._seconds[-49:], record["step_seconds"]]

    def _show(self) -> None:
        if self._latest is None:
            return
        step = self._latest["step"]
        left = (self._total - step) * sum(self._seconds) / len(self._seconds)
        line = f"step {step}/{self._total}  loss {self._latest['loss']:.4f}  {self._latest['tokens_per_second']:,.0f} tokens/s  ETA {left:.0f} s"
        if self._status:
            self._status.update(line)
        elif step != self._said and (time.monotonic() >= self._next_line or step == self._total):
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self._said = step
            self._console.print(line)

    def say(self, text: str) -> None:
        self._console.print(text)

    def close(self) -> None:
        if self._status:
            self._status.stop()


def summary(paths: RunPaths, *, already: bool = False) -> int:
    """Print how the run stands and what to type next; returns the exit code of its newest outcome."""
    run = read_run_config(paths)
    numbers = paths.attempt_numbers()
    steps = merged_steps(paths)
    newest = paths.attempt(numbers[-1]) if numbers else None
    outcome = json.loads(newest.outcome.read_text()) if newest and newest.outcome.is_file() else None
    exit_code = outcome["exit_code"] if outcome else 1
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, value in summary_rows(paths, run, steps, outcome, len(numbers)).items():
        table.add_row(name, value)
    good = outcome is not None and outcome["cause"] == "complete"
    title = f"{run.phase.phase}: {'complete' if good else outcome['cause'] if outcome else 'ended without an outcome'}"
    title += " (nothing left to do)" if already else ""
    console().print(
        Panel(table, title=title, title_align="left", border_style="green" if good else "red", expand=False)
    )
    return exit_code


def summary_rows(
    paths: RunPaths, run: Any, steps: list[dict[str, Any]], outcome: dict[str, Any] | None, attempts: int
) -> dict[str, str]:
    """The summary's lines, by name."""
    rows = {"run": run.name}
    restarts = outcome["restarts"] if outcome else 0
    rows["attempts"] = f"{attempts}" + (f", ranks started again in place {restarts} time(s)" if restarts else "")
    if steps:
        losses = [record["loss"] for record in steps]
        rows["steps"] = f"{steps[-1]['step']:,} of {run.num_train_steps:,}, {steps[-1]['tokens_seen']:,} tokens"
        if outcome and outcome["first_loss"] is not None:
            first, last = outcome["first_loss"], outcome["last_loss"]
            rows["loss"] = (
                f"{first:.4f} -> {last:.4f} (fell by {first - last:.4f}, at least {run.phase.min_loss_decrease:g} asked)  {sparkline(losses)}"
            )
        speeds = sorted(record["tokens_per_second"] for record in steps)
        rows["speed"] = f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median of steps)"
    if outcome and outcome["checkpoint"]:
        verified = "read back, every digest matches" if outcome["checkpoint_verified"] else "NOT verified"
        rows["checkpoint"] = f"{paths.checkpoints / outcome['checkpoint']} ({verified})"
    rows["logs"] = str(paths.attempt(attempts - 1).rank_logs(0)) if attempts else str(paths.submitit)
    rows["why"] = outcome["message"] if outcome else f"the job ended without a word; see {paths.submitit}"
    rows["next"] = what_next(paths, run, outcome)
    return rows


def what_next(paths: RunPaths, run: Any, outcome: dict[str, Any] | None) -> str:
    """The command to type next."""
    if outcome and outcome["cause"] == "complete":
        return f"python -m encdec.checkpoints verify {paths.checkpoints / outcome['checkpoint']}"
    if outcome and outcome["cause"] in ("refused", "gate"):
        return "correct what the line above names, then give the same command"
    return "give the same command again: it continues from the newest valid checkpoint"


def merged_steps(paths: RunPaths) -> list[dict[str, Any]]:
    """Step records of all attempts by step; where a step was computed twice the newest counts."""
    records = (record for number in paths.attempt_numbers() for record in read_json_lines(paths.attempt(number).steps))
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def sparkline(values: list[float], width: int = 24) -> str:
    """``values`` as ``width`` bars, each the mean of its share."""
    width = min(width, len(values))
    shares = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(SPARKS[min(7, int((mean - low) / span * 8))] for mean in means)
