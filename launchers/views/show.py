"""What a person sees: the plan before, the summary after."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.table import Table

from encdec.errors import ExitCode
from encdec.files import RunPaths
from encdec.records import Outcome, read_record, read_steps
from encdec.training.run_config import RunConfig, read_run_config
from launchers.planning.plan import Plan
from launchers.run_directory import why_no_room
from launchers.views import forecast
from launchers.views.progress import make_console

NOT_ASKED = -1e6
"""A fall of the loss below which nothing is asked for."""
UNBOUNDED_STEPS = 10**12
"""From here on nobody has set a bound."""
SPARKS = "▁▂▃▄▅▆▇█"
ASCII_SPARKS = "_.-:=+*#"


def make_printable() -> None:
    """Characters that the terminal's encoding lacks are replaced, not fatal; nor is an output that is closed."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the program runs
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def table_of(rows: dict[str, str]) -> Table:
    """Two columns, names in bold."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def plan(plan: Plan, *, continues: bool) -> None:
    """Print the plan."""
    ranks = plan.nodes * plan.ranks_per_node
    spare = plan.steps_by_tokens if plan.bound_by == "steps" else plan.steps_by_table
    other = "tokens" if plan.bound_by == "steps" else "steps"
    micro_batch = (
        f"the largest micro-batch that fits, at most {plan.micro_batch_size}, on {ranks} ranks"
        if plan.micro_batch_found
        else f"{plan.micro_batch_size} a micro-batch x {plan.gradient_accumulation_steps} accumulated x {ranks} ranks"
    )
    make_console().print(
        table_of(
            {
                "phase": f"{plan.phase}: {plan.description.lower()}",
                "run": plan.name + (" (exists, will be continued)" if continues else ""),
                "where": f"{plan.cluster}: {plan.why_cluster}",
                "ranks": f"{plan.nodes} node(s) x {plan.ranks_per_node} {plan.device} rank(s), {plan.sharding}",
                "batch": f"{plan.global_batch_size} samples x {plan.sample_length} tokens = {plan.tokens_per_step:,} "
                f"tokens a step ({micro_batch})",
                "steps": f"{plan.num_train_steps:,}, {plan.tokens:,} tokens: {plan.bound_by} bind, "
                + (f"{other} would allow {spare:,} steps" if spare < UNBOUNDED_STEPS else f"{other} set no bound"),
                "schedule": f"peak learning rate {plan.learning_rate:g}, {plan.warmup_steps} warm-up steps",
                "checkpoints": f"every {plan.save_steps:,} steps, {plan.checkpoints} in all"
                f"{', more when the clock asks for them' if plan.saves_between else ''}; "
                f"evaluation every {plan.eval_steps:,}",
                "passes if": f"{loss_asked(plan)}; gates while it trains: {', '.join(plan.gates) or 'none'}",
                "text": plan.text,
                "weights": plan.weights,
                "directory": plan.run_dir,
                **forecast.rows(plan),
            }
        )
    )


def loss_asked(plan: Plan) -> str:
    """What a phase asks of its loss; a scale of the pipeline asks nothing, its gates do."""
    if plan.min_loss_decrease < NOT_ASKED:
        return "all steps are done"
    return f"the loss falls by at least {plan.min_loss_decrease:g} and ends at or below {plan.max_loss_after_warmup:g}"


def chain(root: Path, plans: Sequence[Plan], states: Sequence[str], *, asked: str) -> None:
    """Print the plan of a chain: what its phases share, then a line for each.

    Args:
        states: of each phase: passed | closed | goes on | new.
        asked: the first phase that was asked for by name.
    """
    last = plans[-1]
    before = [plan.phase for plan in plans].index(asked)
    missing = [plan.phase for plan, state in list(zip(plans, states, strict=True))[:before] if state != "passed"]
    console, phases = make_console(), Table(box=None, pad_edge=False, header_style="bold")
    console.print(
        table_of(
            {
                "chain": " -> ".join(plan.phase for plan in plans)
                + (f"; {', '.join(missing)} first: not passed yet" if missing else ""),
                "where": f"{last.cluster}: {last.why_cluster}",
                "ranks": f"{last.nodes} node(s) x {last.ranks_per_node} {last.device} rank(s), {last.sharding}",
                "batch": f"{last.global_batch_size} samples x {last.sample_length} tokens = {last.tokens_per_step:,} "
                "tokens a step",
                "text": last.text,
                "weights": f"{plans[0].weights}; then those that have passed the gate of the phase before",
                "passes if": "the loss falls by so much from the chain's first steps, and ends so low (nats)",
                "directory": str(root),
            }
        )
    )
    for name in ("phase", "state", "steps", "tokens", "by", "time", "eval", "save", "falls", "ends"):
        phases.add_column(name, justify="left" if name in ("phase", "state", "by") else "right", no_wrap=True)
    for plan, state in zip(plans, states, strict=True):
        phases.add_row(
            plan.phase, state, f"{plan.num_train_steps:,}", f"{plan.tokens:,}", plan.bound_by, forecast.how_long(plan),
            f"{plan.eval_steps:,}", f"{plan.save_steps:,}", f">= {plan.min_loss_decrease:g}",
            f"<= {plan.max_loss_after_warmup:g}",
        )  # fmt: skip
    console.print(phases)
    warnings = dict.fromkeys(warning for plan in plans for warning in plan.warnings)
    if warnings:
        console.print(table_of({"warnings": "\n".join(warnings)}))


def as_json(plans: Sequence[Plan], scripts: Sequence[str | None]) -> int:
    """Print plans for programs, each with its batch script (null on this machine); exit code 0."""
    rows = [plan.to_mapping() | {"sbatch": script} for plan, script in zip(plans, scripts, strict=True)]
    print(json.dumps(rows, indent=2))
    return 0


def script(text: str) -> None:
    """Print the batch script as it is: no line is folded, so that it can be saved and read by sbatch."""
    print(f"\nThe batch script, as sbatch would get it:\n\n{text}")


def summary(paths: RunPaths, *, already: bool = False, cancelled: bool = False) -> int:
    """Print how the run stands and what to type next; returns the exit code of its newest attempt.

    Args:
        already: nothing was left to do.
        cancelled: a user has cancelled the job.
    """
    run = read_run_config(paths)
    newest = paths.newest_attempt()
    written = newest is not None and paths.attempt(newest).outcome.is_file()
    outcome = read_record(paths.attempt(newest).outcome, Outcome) if newest is not None and written else None
    cause = "cancelled by user" if cancelled else outcome.cause if outcome else "ended without an outcome"
    title = f"{run.phase.phase if run.phase else 'training'}: {cause}{' (nothing left to do)' if already else ''}"
    color = "green" if cause == "complete" else "red"
    rows = table_of(summary_rows(paths, run, outcome))
    make_console().print(Panel(rows, title=title, title_align="left", border_style=color, expand=False))
    return outcome.exit_code if outcome else ExitCode.CRASHED


def attached(paths: RunPaths) -> None:
    """Say that an attempt runs already."""
    make_console().print(f"attempt {paths.newest_attempt()} is running already; following it")


def followed(job: str, paths: RunPaths) -> None:
    """Say that a Slurm job runs or waits already."""
    make_console().print(f"job {job} is this run's already; its files are in {paths.root}")


def queued(job: str, paths: RunPaths) -> int:
    """Say that a Slurm job is left alone, and how to follow, see and stop it; exit code 0."""
    make_console().print(
        f"job {job}: the same command with --wait follows it, squeue -j {job} shows it, "
        f"touch {paths.stop_request} saves and stops it; submitted as {paths.sbatch}"
    )
    return 0


def left_running(paths: RunPaths) -> None:
    """Say that nobody watches any more, and that the attempt goes on."""
    make_console().print(
        f"attempt {paths.newest_attempt()} goes on: it saves, then ends; the same command follows it, and its files "
        f"are in {paths.root}"
    )


def started(paths: RunPaths) -> int:
    """Say that an attempt has been started and is left alone; exit code 0."""
    make_console().print(f"started; the same command follows it, and its files are in {paths.root}")
    return 0


def summary_rows(paths: RunPaths, run: RunConfig, outcome: Outcome | None) -> dict[str, str]:
    """The summary's lines, by name."""
    numbers = paths.attempt_numbers()
    restarts = outcome.restarts if outcome else 0
    rows = {
        "run": run.name,
        "attempts": f"{len(numbers)}" + (f"; ranks started again in place {restarts} time(s)" if restarts else ""),
        **progress_rows(paths, run, outcome),
    }
    if outcome and outcome.checkpoint:
        verified = "read back at the end, every digest matched" if outcome.checkpoint_verified else "NOT verified"
        rows["checkpoint"] = f"{outcome.checkpoint}: {verified}"
    rows["directory"] = str(paths.root)
    logs = paths.attempt(numbers[-1]).rank_logs(0) if numbers else paths.submitit
    rows["logs"] = str(logs.parent if numbers and run.nodes > 1 else logs)
    rows["ended"] = outcome.message if outcome else f"the job ended without a word; see {paths.submitit}"
    if no_room := why_no_room(paths):
        rows["disk"] = no_room[0]
    rows["next"] = what_next(paths, outcome)
    return rows


def progress_rows(paths: RunPaths, run: RunConfig, outcome: Outcome | None) -> dict[str, str]:
    """Steps, loss and speed, as far as there are any."""
    steps = merged_steps(paths)
    if not steps:
        return {}
    rows = {"steps": f"{steps[-1]['step']:,} of {run.num_train_steps:,}; {steps[-1]['tokens_seen']:,} tokens"}
    spark = sparkline([record["loss"] for record in steps])
    if outcome and outcome.first_loss is not None and outcome.last_loss is not None:
        first, last = outcome.first_loss, outcome.last_loss
        least = run.phase.min_loss_decrease if run.phase else NOT_ASKED
        asked = f", at least {least:g} asked" if least > NOT_ASKED else ""
        rows["loss"] = f"{first:.4f} -> {last:.4f}  {spark}  fell by {first - last:.4f}{asked}"
    else:
        rows["loss"] = f"{steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}  {spark}"
    speeds = sorted(record["tokens_per_second"] for record in steps)
    rows["speed"] = f"{speeds[len(speeds) // 2]:,.0f} tokens/s (median step)"
    return rows


def what_next(paths: RunPaths, outcome: Outcome | None) -> str:
    """The command to type next."""
    cause = outcome.cause if outcome else ""
    if outcome and outcome.checkpoint and cause == "complete":
        return f"python -m encdec.checkpoints verify {shlex.quote(str(paths.checkpoints / outcome.checkpoint))}"
    if cause in ("refused", "gate"):
        return (
            "correct what the line above names, then give the command again; another configuration is another run: "
            "with another --run-dir or --name, if one was given"
        )
    no_room = why_no_room(paths)
    first = f"{no_room[1]}, then " if no_room else ""
    return f"{first}give the same command again: it continues from the newest valid checkpoint"


def merged_steps(paths: RunPaths) -> list[dict[str, Any]]:
    """Step records of all attempts by step; where a step was computed twice the newest counts."""
    records = (record for number in paths.attempt_numbers() for record in read_steps(paths.attempt(number).steps))
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """``values`` as ``width`` bars, each the mean of its share; values that are no numbers are left out."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    # a live view puts a catcher without an encoding in the place of the standard output
    encoding = getattr(sys.stdout, "encoding", None) or getattr(sys.__stdout__, "encoding", None) or ""
    sparks = SPARKS if "utf" in encoding.lower() else ASCII_SPARKS
    width = min(width, len(values))
    shares = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(sparks[min(7, int((mean - low) / span * 8))] for mean in means)
