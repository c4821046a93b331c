"""Where a run's time went, for a terminal."""

from __future__ import annotations

from rich.table import Table

from launchers.bookkeeping.ledger import GROUPS, Part
from launchers.views.progress import make_console
from launchers.views.retrospect import Retrospect
from launchers.views.tables import print_table
from launchers.views.units import duration, moment, share

WORDS = {part: str(part).replace("_", " ") for part in Part}
MOST_ALERTS = 5


def numbers_table(*names: str) -> Table:
    """A table without lines whose first column is words, and the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, name in enumerate(names):
        table.add_column(name, justify="right" if column else "left")
    return table


def headline(found: Retrospect) -> list[str]:
    """What matters most, a line each."""
    ledger, records = found.ledger, found.records
    foretold = {"the formula says": found.predicted_ettr, "the plan expected": found.planned_ettr}
    words = "".join(f"; {who} {value:.3f}" for who, value in foretold.items() if value is not None)
    return [
        f"{found.view.name}: {found.view.standing.words}; {records.phase}, "
        f"{ledger.steps:,} of {records.total_steps:,} steps in {len(records.attempts)} attempt(s)",
        f"from {moment(ledger.began)} to {moment(ledger.ended)}: {duration(ledger.wall)}",
        f"ETTR {ledger.ettr:.3f}: {duration(ledger.productive)} productive; {ledger.ettr_while_running:.3f} without "
        f"the time in the queue{words}",
    ]


def parts_table(found: Retrospect) -> Table:
    """Each group of parts, its parts below it where there are several."""
    totals, wall = found.ledger.totals, found.ledger.wall
    table = numbers_table("wall time", "time", "share")
    for group, parts in GROUPS.items():
        seconds = sum(totals[part] for part in parts)
        table.add_row(group, duration(seconds), share(seconds, wall), style="" if seconds else "dim")
        for part in parts if len(parts) > 1 else ():
            if totals[part]:
                table.add_row(f"  {WORDS[part]}", duration(totals[part]), share(totals[part], wall), style="dim")
    table.add_row("all", duration(sum(totals.values())), share(sum(totals.values()), wall), style="bold")
    return table


def causes_table(found: Retrospect) -> Table:
    """What each cause has cost: steps computed again and the time in them, and the time that made up for it."""
    table = numbers_table("lost to", "times", "steps", "in", "queue wait", "start-up", "down", "in all")
    for cause in found.causes:
        spent = (cause.lost_seconds, cause.queue_seconds, cause.start_up_seconds, cause.down_seconds, cause.seconds)
        words = [duration(seconds) if seconds else "" for seconds in spent]
        table.add_row(cause.cause, str(cause.times), f"{cause.lost_steps:,}" if cause.lost_steps else "", *words)
    return table


def show(found: Retrospect) -> None:
    """Print the account of a run."""
    console = make_console()
    for line in headline(found):
        console.print(line)
    console.print()
    print_table(parts_table(found))
    if found.causes:
        console.print()
        print_table(causes_table(found))
    alerts = found.alerts
    if alerts:
        console.print()
        console.print(f"{len(alerts)} alert(s)" + (f", the last {MOST_ALERTS}:" if len(alerts) > MOST_ALERTS else ":"))
    for attempt, alert in alerts[-MOST_ALERTS:]:
        console.print(f"  attempt {attempt}, step {alert.get('step')}: {alert.get('message')}")
