"""A run's report as one page that needs nothing else: no script, no request, every word of the run escaped."""

from __future__ import annotations

from typing import Any

import jinja2
from markupsafe import Markup

from encdec.records import STEP_FIELDS
from launchers.bookkeeping.ledger import GROUPS, Part
from launchers.bookkeeping.run_story import is_number
from launchers.views.account import WORDS
from launchers.views.charts import Note, chart
from launchers.views.history import trouble
from launchers.views.retrospect import Retrospect
from launchers.views.timeline import bars, percent, ticks
from launchers.views.units import compact, duration, moment, share

MOST_ATTEMPTS = 40
"""Shown one by one, the newest; a page of thousands helps nobody."""
MOST_ALERTS = 100
MOST_TURNS = 50
MOST_CHARACTERS = 400
"""Of one text."""


def clean(value: Any) -> Any:
    """Text without characters that no page may hold or that turn it around (controls, lone surrogates, marks of
    direction), and not longer than a person reads.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    cut = value if len(value) <= MOST_CHARACTERS else value[: MOST_CHARACTERS - 1] + "…"
    return "".join(character if character.isprintable() else " " if character.isspace() else "�" for character in cut)


def group_class(group: str) -> str:
    """Name of a group of parts in the style sheet."""
    return group.replace(" ", "-")


def render(found: Retrospect, *, now: float) -> str:
    """The page.

    Args:
        now: when it is made, seconds since the epoch.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launchers.views", "."), autoescape=True, finalize=clean,
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    filters = {
        "duration": duration, "moment": moment, "compact": compact, "group_class": group_class, "cleaned": clean,
    }  # fmt: skip
    environment.filters.update(filters)
    page = environment.get_template("report.html.jinja")
    return page.render(**facts(found, now=now))


def facts(found: Retrospect, *, now: float) -> dict[str, Any]:
    """What the template shows."""
    ledger = found.ledger
    attempts, alerts, turns = found.attempts, found.alerts, found.turns
    totals = ledger.totals
    groups = {group: sum(totals[part] for part in parts) for group, parts in GROUPS.items()}
    alert_notes = [
        Note(float(alert["step"]), clean(f"attempt {attempt}: {alert.get('message')}"))
        for attempt, alert in alerts
        if is_number(alert.get("step"))
    ]
    starts = found.starts()
    return {
        "found": found,
        "ledger": ledger,
        "now": now,
        "counted": last_of(found),
        "accounted": share(sum(totals.values()), ledger.wall),
        "groups": [
            {
                "name": group, "seconds": seconds, "share": share(seconds, ledger.wall),
                "percent": 100 * seconds / ledger.wall if ledger.wall > 0 else 0.0,
                "parts": [
                    (WORDS[part], totals[part], share(totals[part], ledger.wall))
                    for part in GROUPS[group]
                    if totals[part] and len(GROUPS[group]) > 1
                ],
            }
            for group, seconds in groups.items()
        ],
        "attempts": [
            {
                "account": each,
                "bars": bars((span for span in ledger.spans if span.attempt == each.story.number), ledger),
                "alerts": [
                    percent(alert["time"], ledger) for number, alert in alerts if number == each.story.number
                ][-MOST_ALERTS:],
                "end": percent(each.ended, ledger),
            }
            for each in attempts[-MOST_ATTEMPTS:]
        ],
        "all_bars": bars(ledger.spans, ledger),
        "ticks": ticks(ledger),
        "alerts": [(attempt, trouble(alert)) for attempt, alert in alerts[-MOST_ALERTS:]],
        "turns": [(attempt, trouble(turn)) for attempt, turn in turns[-MOST_TURNS:]],
        "charts": [(curve, Markup(chart(curve, starts=starts, alerts=alert_notes))) for curve in found.curves()],
        "left_out": {
            "attempts": max(0, len(attempts) - MOST_ATTEMPTS), "alerts": max(0, len(alerts) - MOST_ALERTS),
            "turns": max(0, len(turns) - MOST_TURNS),
        },
        "part": Part,
    }  # fmt: skip


def last_of(found: Retrospect) -> dict[str, float] | None:
    """The last step that counts: its fields by name; None before the first."""
    counted = found.counted
    if not len(counted["step"]):
        return None
    return {name: float(column[-1]) for name, column in counted.items() if name in STEP_FIELDS}
