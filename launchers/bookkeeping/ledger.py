"""Where a run's time went: wall time split into parts, by what caused them; goodput (ETTR). Pure.

The wall time, from the first submission to the end, is cut into spans that touch each other, and each span's time is
split into parts. So the parts sum to the wall time, whatever the records lack; what they cannot tell apart has a part
of its own. Seconds throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What time is spent for. Programs read these words; they stay."""

    TRAINING = "training"
    """Steps that count, what they wait for data included."""
    EVALUATION = "evaluation"
    """On held-out text, after steps that count."""
    SAVE_STALL = "save_stall"
    """Training stands still for a checkpoint."""
    BETWEEN_STEPS = "between_steps"
    """Gates, records, trackers."""
    LOST = "lost_steps"
    """Steps that were computed again, or will have to be; what was in flight when a rank died."""
    QUEUE = "queue_wait"
    LAUNCH = "launch"
    """From the start of the job's own process until its agent is ready."""
    IMPORTS = "imports"
    """Until rank 0 begins to work: forked, or started, with its imports done."""
    RENDEZVOUS = "rendezvous"
    """Nodes meet, then ranks."""
    LOAD = "load"
    """Text, model, checkpoint."""
    FIRST_STEP = "first_step"
    """What the first step after a start took beyond the median one: compilation, warm-up."""
    START_UP = "start_up"
    """A start whose parts its records do not tell apart."""
    CLOSING = "closing"
    """After the last step: last checkpoint read back, gates at the end of a phase, averages."""
    DOWN = "down"
    """Nothing runs, and nothing is known to be in the queue."""


PRODUCTIVE = frozenset({Part.TRAINING, Part.EVALUATION})
STARTING = (Part.LAUNCH, Part.IMPORTS, Part.RENDEZVOUS, Part.LOAD, Part.FIRST_STEP, Part.START_UP)
GROUPS: Mapping[str, tuple[Part, ...]] = {
    "productive": (Part.TRAINING, Part.EVALUATION),
    "save stalls": (Part.SAVE_STALL,),
    "lost steps": (Part.LOST,),
    "start-up": STARTING,
    "queue wait": (Part.QUEUE,),
    "down": (Part.DOWN,),
    "other work": (Part.BETWEEN_STEPS, Part.CLOSING),
}
"""The parts as a person is told of them; each part is in one."""
RECOVERING = frozenset({*STARTING, Part.QUEUE, Part.DOWN})
"""What an interruption costs beside the steps that it loses."""
FIRST_START = "first start"
RANK_DIED = "rank died"
ROLLED_BACK = "rolled back"
PLANNED = frozenset({FIRST_START, ROLLED_BACK, "signalled", "stop_requested", "complete", "gate", "refused"})
"""Causes that are no failures: what is stopped has saved."""
FAILED = frozenset({"crash", "bad_node", "refused"})
"""Causes of an end that came while ranks worked."""


@dataclass(frozen=True)
class Span:
    """A stretch of time."""

    began: float
    """Seconds since the epoch."""
    ended: float
    seconds: Mapping[Part, float]
    """Sum to ``ended - began``."""
    attempt: int | None
    """None: before the first, and between two."""
    restart: int
    """Restarts in place before it."""
    cause: str
    """The interruption that this time makes up for; empty where it goes on by itself."""

    @property
    def part(self) -> Part:
        """The one that took most of it."""
        return max(self.seconds, key=lambda part: self.seconds[part])


@dataclass(frozen=True)
class Interruption:
    """Something that ended steps before their time."""

    cause: str
    """An Outcome.cause, killed, rank died or rolled back."""
    attempt: int
    restart: int
    lost_steps: int
    lost_seconds: float
    recovery_seconds: float
    """Until the next step: down, queue wait, start-up. 0 where nothing has followed."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where a run's time went."""

    began: float
    """Seconds since the epoch."""
    ended: float
    """The end of its newest attempt; of a run that lives, as far as its records go."""
    spans: Sequence[Span]
    """In order; each begins where the one before ends."""
    interruptions: Sequence[Interruption]
    """In order. Without the first start, and without an end that was as it should be."""
    steps: int
    """Steps that count."""
    lost_steps: int

    @property
    def wall(self) -> float:
        return self.ended - self.began

    @property
    def totals(self) -> dict[Part, float]:
        """Seconds of each part."""
        return sum_parts(self.spans)

    @property
    def productive(self) -> float:
        return sum(seconds for part, seconds in self.totals.items() if part in PRODUCTIVE)

    @property
    def ettr(self) -> float:
        """Effective training time ratio: productive time over wall time, what is computed twice counted once (Kokolis
        et al. 2024, arXiv:2410.21680); 0 before there is any time.
        """
        return self.productive / self.wall if self.wall > 0 else 0.0

    @property
    def ettr_while_running(self) -> float:
        """The same without the time in the queue, which is the cluster's to give."""
        running = self.wall - self.totals[Part.QUEUE]
        return self.productive / running if running > 0 else 0.0

    @property
    def failures(self) -> list[Interruption]:
        """The interruptions that nobody asked for."""
        return [each for each in self.interruptions if each.cause not in PLANNED]


def sum_parts(spans: Iterable[Span]) -> dict[Part, float]:
    """Seconds of each part over ``spans``; every part has a value."""
    totals = dict.fromkeys(Part, 0.0)
    for span in spans:
        for part, seconds in span.seconds.items():
            totals[part] += seconds
    return totals
