"""What the monitor says of a run, in few characters. Pure."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from launchers.monitor.observatory import Board, Sight
from launchers.views.history import AttemptView
from launchers.views.show import sparkline
from launchers.views.standing import State
from launchers.views.tables import age, alert_words, gate_words, trouble_line

NOTHING = "-"
MOST_NODES_NAMED = 4
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|[@-Z\\^_])")
"""ANSI control sequences and operating system commands (ECMA-48)."""
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) != "\t"}


def printable(line: str) -> str:
    """``line`` without what a terminal would obey; of a progress bar that overwrites itself its last state."""
    if line.isprintable():
        return line
    visible = ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2]
    return visible.translate(CONTROLS).expandtabs(4)


def shortened(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters; what is left out is in the middle, for both ends tell names apart."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def compact(number: float | None) -> str:
    """Three digits and a unit: 987, 9.0k, 123k, 1.2M."""
    if number is None:
        return NOTHING
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}" if number < 10 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f}%"


def ago(moment: float | None, now: float) -> str:
    return NOTHING if moment is None else age(now - moment)


def step_words(sight: Sight) -> str:
    """``1234/5000``."""
    records = sight.view.records
    if records is None:
        return NOTHING
    return f"{sight.vitals.step or (records.position.last_step if records.position else 0) or 0}/{records.total_steps}"


def loss_words(sight: Sight) -> str:
    loss = sight.vitals.loss
    return NOTHING if loss is None else f"{loss:.3f}" if loss < 100 else f"{loss:.3g}"


def time_left(sight: Sight, now: float) -> str:
    """Until the last step; of a run that does none there is nothing to be said."""
    if sight.seconds_stuck(now) is not None:
        return "stuck"
    return NOTHING if sight.seconds_left is None else age(sight.seconds_left)


def oldest_heartbeat(sight: Sight, now: float) -> str:
    """Age of the sign of life of the node that has been silent longest, while the run lives."""
    beats = sight.view.records.heartbeats if sight.lives and sight.view.records else {}
    return ago(min(beats.values(), default=None), now)


def checkpoint_age(sight: Sight, now: float) -> str:
    return ago(sight.view.records.checkpoint_time if sight.view.records else None, now)


def last_end(sight: Sight) -> AttemptView | None:
    """The newest attempt that has ended."""
    attempts = sight.view.records.attempts if sight.view.records else []
    lives = attempts[-1:] if sight.lives else []
    ended = attempts[: len(attempts) - len(lives)]
    return ended[-1] if ended else None


def end_words(sight: Sight) -> str:
    """Why the last attempt ended, in a word."""
    end = last_end(sight)
    return NOTHING if end is None else end.cause or "no word"


def slurm_words(sight: Sight) -> str:
    """The job and Slurm's word for it."""
    job, said = sight.view.standing.job, sight.view.job
    return f"{job} {said.state}" if job and said else NOTHING


def dangers(sight: Sight, now: float) -> list[str]:
    """What is wrong right now, as far as the clock tells."""
    silent = [f"node {node} not heard of for {age(seconds)}" for node, seconds in sight.silent_nodes(now).items()]
    more = [f"{len(silent) - MOST_NODES_NAMED} more nodes silent"] if len(silent) > MOST_NODES_NAMED else []
    stuck = sight.seconds_stuck(now)
    return silent[:MOST_NODES_NAMED] + more + ([f"no step for {age(stuck)}"] if stuck is not None else [])


def count_of_alerts(sight: Sight) -> int:
    """Alerts, roll-backs of the newest attempt."""
    newest = sight.view.records.newest if sight.view.records else None
    return sum(newest.alerts.values()) + newest.rollbacks if newest else 0


def alarm(sight: Sight, now: float) -> str:
    """``!`` with how much there is to look at; nothing if there is nothing."""
    count = len(dangers(sight, now)) + count_of_alerts(sight)
    return f"!{min(count, 99)}" if count else ""


def states_line(board: Board) -> str:
    """How many runs are in which state: ``30 running, 5 pending``."""
    counts: dict[State, int] = {}
    for sight in board.sights:
        counts[sight.view.standing.state] = counts.get(sight.view.standing.state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def total_line(board: Board) -> str:
    return f"{len(board.sights)} run{'' if len(board.sights) == 1 else 's'}"


def silence_line(board: Board | None, waited: float) -> str:
    """How long the run directories have been asked in vain, seconds, and how old what is shown is for that."""
    silence = f"run directories do not answer for {waited:.0f} s"
    return f"{silence}; this is as of {time.strftime('%H:%M:%S', time.localtime(board.now))}" if board else silence


def slurm_line(board: Board) -> str:
    """Whether Slurm answers, and when it was asked."""
    if board.slurm_asked is None:
        return "Slurm not asked"
    when = f"{age(board.now - board.slurm_asked)} ago"
    return f"Slurm asked {when}" if board.slurm_problem is None else f"Slurm does not answer ({when})"


def details(sight: Sight, now: float, *, width: int) -> list[tuple[str, str]]:
    """A run in (name, text) lines; what is longer than the terminal's ``width`` is cut by who shows it."""
    view, records, vitals = sight.view, sight.view.records, sight.vitals
    if records is None:
        return [("run", view.name), ("state", view.standing.words), ("directory", view.directory)]
    end = last_end(sight)
    ended = f"{'before' if sight.lives else 'ended'}: {end.cause or 'without a word'}" if end else ""
    why = f" ({end.message})" if end and end.message else ""
    gate = gate_words(records) or "not judged"
    lines = [
        ("state", view.standing.words),
        ("attempt", join([attempt_words(sight, now), ended + why])),
        ("phase", join([f"{records.phase}, gate {gate}", f"step {step_words(sight)}", eta_words(sight, now)])),
        (
            "loss",
            f"{loss_words(sight)} {sparkline(vitals.losses, spark_width(width))} {optimizer_words(sight)}",
        ),
        ("speed", speed_words(sight)),
        ("signs", signs_of_life(sight, now)),
        ("alerts", alerts_line(sight, now)),
    ]
    return [(name, printable(text)) for name, text in lines]


def spark_width(width: int) -> int:
    return max(8, min(64, width - 50))


def join(parts: Sequence[str]) -> str:
    return "; ".join(part for part in parts if part)


def attempt_words(sight: Sight, now: float) -> str:
    records = sight.view.records
    newest = records.newest if records else None
    if newest is None:
        return "none yet"
    where = [f"job {newest.job}"] if newest.job else []
    where += [f"on {newest.host}"] if newest.host else []
    began = f", began {ago(newest.began, now)} ago" if newest.began is not None else ""
    restarts = f", {newest.restarts} restarts in place" if newest.restarts else ""
    return f"{newest.number} {' '.join(where)}{began}{restarts}"


def eta_words(sight: Sight, now: float) -> str:
    stuck = sight.seconds_stuck(now) is not None
    return "stuck" if stuck else f"{time_left(sight, now)} left" if sight.seconds_left is not None else ""


def optimizer_words(sight: Sight) -> str:
    vitals = sight.vitals
    rate = f"lr {vitals.learning_rate:.2e}" if vitals.learning_rate is not None else ""
    norm = f"grad norm {vitals.grad_norm:.3g}" if vitals.grad_norm is not None else ""
    return ", ".join(filter(None, (rate, norm)))


def speed_words(sight: Sight) -> str:
    vitals = sight.vitals
    if vitals.tokens_per_second is None:
        return NOTHING
    memory = f", {vitals.memory_gb:.1f} GB" if vitals.memory_gb is not None else ""
    mfu = f", MFU {percent(sight.mfu)}" if sight.mfu is not None else ""
    return f"{vitals.tokens_per_second:,.0f} tokens/s{mfu}, {percent(vitals.data_wait)} waiting for data{memory}"


def signs_of_life(sight: Sight, now: float) -> str:
    """The newest checkpoint's age, and that of each node's heartbeat, by node rank, the oldest first."""
    records = sight.view.records
    if records is None:
        return NOTHING
    saved = f"{records.checkpoint} saved {ago(records.checkpoint_time, now)} ago" if records.checkpoint else ""
    oldest = sorted(records.heartbeats.items(), key=lambda item: item[1])
    beats = [f"{node}: {ago(beat, now)}" for node, beat in oldest]
    many = len(beats) > 2 * MOST_NODES_NAMED
    shown = [f"{len(beats)} nodes, oldest {', '.join(beats[:MOST_NODES_NAMED])}"] if many else beats
    return join([saved or "no checkpoint yet", f"heartbeats {', '.join(shown)}" if shown else ""])


def alerts_line(sight: Sight, now: float) -> str:
    records = sight.view.records
    newest = records.newest if records else None
    if records is None or newest is None:
        return "none"
    told = [trouble_line(one, now) for one in newest.newest_troubles[-1:]]
    return join([*dangers(sight, now), alert_words([newest]), *told]) or "none"
