"""A run's story -> its ledger: who did what until when. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from launchers.bookkeeping.ledger import (
    FAILED,
    FIRST_START,
    PLANNED,
    RANK_DIED,
    RECOVERING,
    ROLLED_BACK,
    Interruption,
    Ledger,
    Part,
    Span,
    sum_parts,
)
from launchers.bookkeeping.run_story import AttemptStory, RunStory

PART_OF_MARK: Mapping[str, Part] = {
    "launch": Part.LAUNCH, "imports": Part.IMPORTS, "rendezvous": Part.RENDEZVOUS, "load": Part.LOAD,
}  # fmt: skip


def account(story: RunStory, *, over: bool, now: float | None = None) -> Ledger:
    """Split a run's time. Attempts that have left no time at all have no part in it.

    Args:
        over: nothing of the run is running: what its newest attempt did after the newest checkpoint is lost.
        now: of a run that waits: until when, seconds since the epoch. None: the ledger ends with the records.
    """
    book = _Book(story.began)
    lost = lost_steps(story, over=over)
    known = [(attempt, its_lost) for attempt, its_lost in zip(story.attempts, lost, strict=True) if attempt.began > 0]
    before: AttemptStory | None = None
    for number, (attempt, its_lost) in enumerate(known):
        _wait(book, story, before, attempt, attempt.began)
        book.limit = known[number + 1][0].began if number + 1 < len(known) else np.inf
        _run(book, attempt, its_lost)
        before = attempt
    if now is not None:
        _wait(book, story, before, None, now)
    count = int(sum(its_lost.sum() for its_lost in lost))
    return Ledger(
        began=story.began, ended=book.now, spans=book.spans, interruptions=book.interruptions(over=over),
        steps=sum(map(len, lost)) - count, lost_steps=count,
    )  # fmt: skip


def lost_steps(story: RunStory, *, over: bool) -> list[np.ndarray]:
    """For each attempt, which of its step records are lost, bool [N]: those from which a later one begins again at the
    same step or below; of a run that is over also those after its newest checkpoint, unless it is complete.
    """
    again = np.inf  # the lowest step of all records that come later
    if over and story.attempts and story.attempts[-1].cause != "complete":
        again = story.saved_step + 1
    found = []
    for attempt in reversed(story.attempts):
        steps = np.append(attempt.steps["step"], again)
        lowest = np.minimum.accumulate(steps[::-1])[::-1]  # of each record and all after it
        found.append(steps[:-1] >= lowest[1:])
        again = lowest[0]
    return found[::-1]


class _Book:
    """Spans, one after the other: what would begin before the end of the last one begins there."""

    def __init__(self, began: float) -> None:
        self.now = began
        self.limit = np.inf
        """When the next attempt begins: what a node that was cut off does after that is nobody's time."""
        self.spans: list[Span] = []
        self._cause = FIRST_START
        self._ends: list[_End] = []

    def until(self, moment: float, part: Part, attempt: int | None = None, restart: int = 0) -> None:
        """``part`` goes on until ``moment``, but not beyond the limit."""
        moment = min(moment, self.limit)
        self.add(moment, {part: moment - self.now}, attempt, restart)

    def add(self, moment: float, seconds: Mapping[Part, float], attempt: int | None, restart: int) -> None:
        """The time until ``moment``, not beyond the limit, is split into ``seconds``."""
        if moment > self.now:
            cause = self._cause if RECOVERING.intersection(seconds) else ""
            self.spans.append(Span(self.now, moment, seconds, attempt, restart, cause))
            self.now = moment

    def interrupted(self, cause: str, attempt: int, restart: int, lost: np.ndarray) -> None:
        """Steps end here; what follows makes up for it.

        Args:
            lost: which of the steps are, bool [N].
        """
        self._cause = cause
        self._ends.append(_End(len(self.spans), cause, attempt, restart, int(lost.sum())))

    def interruptions(self, *, over: bool) -> list[Interruption]:
        """Those after which anything came; of a run that is over the failure that has ended it, too."""
        limits = [0, *(end.spans for end in self._ends), len(self.spans)]
        found = []
        for number, end in enumerate(self._ends):
            since, here, until = limits[number : number + 3]
            goes_on = number + 1 < len(self._ends) or any(span.attempt is None for span in self.spans[here:until])
            if goes_on or (over and end.cause not in PLANNED):
                lost, after = sum_parts(self.spans[since:here])[Part.LOST], sum_parts(self.spans[here:until])
                recovery = sum(after[part] for part in RECOVERING)
                found.append(Interruption(end.cause, end.attempt, end.restart, end.lost_steps, lost, recovery))
        return found


@dataclass(frozen=True)
class _End:
    """Of a row of steps."""

    spans: int
    """Spans before it."""
    cause: str
    attempt: int
    restart: int
    lost_steps: int


def _wait(
    book: _Book, story: RunStory, before: AttemptStory | None, following: AttemptStory | None, until: float
) -> None:
    """The time after an attempt: in the queue from when something of the run is known to be there."""
    asked = [moment for moment in story.submissions if book.now <= moment <= until]
    if before is not None and not _in_queue(before, following, asked_again=bool(asked)):
        book.until(min(asked, default=until), Part.DOWN)
    book.until(until, Part.QUEUE)


def _in_queue(before: AttemptStory, following: AttemptStory | None, *, asked_again: bool) -> bool:
    """Whether the queue held something of the run as soon as an attempt was over: what its job had asked for, or the
    job itself, which Slurm requeues after its node has failed. Of a run that still waits it is the job itself unless it
    was submitted again.
    """
    again = not asked_again if following is None else following.job is not None and following.job == before.job
    return before.queued or again


def _run(book: _Book, attempt: AttemptStory, lost: np.ndarray) -> None:
    """All starts of an attempt's ranks."""
    of_restart = attempt.steps["restart"]
    restarts = starts_of(attempt)
    for restart, following in zip(restarts, [*restarts[1:], None], strict=True):
        rows = np.flatnonzero((of_restart == restart) & (attempt.steps["time"] <= book.limit))
        start = _Start(attempt, restart, rows, lost)
        died = attempt.failures.get(restart, (None, ""))[0]
        start.begin(book)
        if following is None:
            cause, over = attempt.cause, attempt.ended or attempt.last_sign
        else:
            cause, over = RANK_DIED, attempt.restarts.get(following) or died or book.now
        failed = following is not None or died is not None or cause in FAILED
        start.end(book, died or over, failed=failed)
        book.interrupted(cause, attempt.number, restart, start.lost_at_end)
        book.until(over, Part.DOWN, attempt.number, restart)


def starts_of(attempt: AttemptStory) -> list[int]:
    """The starts of its ranks by the restarts in place before each, ascending; one at least."""
    stepped = np.unique(attempt.steps["restart"]).astype(int).tolist()
    before = [restart - 1 for restart in attempt.restarts]
    seen = {*stepped, *before, *attempt.restarts, *attempt.failures, *(mark.restart for mark in attempt.marks)}
    return sorted(seen) or [0]


class _Start:
    """One start of an attempt's ranks: what it did, row by row of the step records.

    Args:
        rows: of its steps, int [N].
        lost: which rows of the whole attempt are lost.
    """

    def __init__(self, attempt: AttemptStory, restart: int, rows: np.ndarray, lost: np.ndarray) -> None:
        self._attempt, self._restart, self._lost = attempt, restart, lost
        self._who = (attempt.number, restart)
        back = np.flatnonzero(np.diff(attempt.steps["step"][rows]) <= 0) + 1
        self._runs = [run for run in np.split(rows, back) if len(run)]
        """Rows of steps that follow each other; a new one begins where the trainer was rolled back."""
        self._typical = 0.0
        """Seconds of a step, the median of the newest run."""

    @property
    def lost_at_end(self) -> np.ndarray:
        """Which of the steps are that this start's end has lost, and no roll-back before it."""
        return self._lost[self._runs[-1]] if self._runs else np.zeros(0, bool)

    def begin(self, book: _Book) -> None:
        """From the start to the last step."""
        marks = [mark for mark in self._attempt.marks if mark.restart == self._restart]
        for mark in marks:
            book.until(mark.time, PART_OF_MARK.get(mark.done, Part.START_UP), *self._who)
        told = any(mark.done == "load" for mark in marks)
        for number, rows in enumerate(self._runs):
            if number:
                book.interrupted(ROLLED_BACK, *self._who, self._lost[self._runs[number - 1]])
            if number or not told:
                first = self._attempt.steps["time"][rows[0]] - self._attempt.steps["step_seconds"][rows[0]]
                book.until(first, Part.LOAD if number else Part.START_UP, *self._who)
            self._train(book, rows)

    def _train(self, book: _Book, rows: np.ndarray) -> None:
        """Steps that follow each other, and what lies between them."""
        steps = {name: column[rows] for name, column in self._attempt.steps.items()}
        lost = self._lost[rows]
        ends = np.maximum.accumulate(np.maximum(steps["time"], book.now))
        took = np.diff(ends, prepend=book.now)
        own = np.minimum(steps["step_seconds"], took)
        self._typical = float(np.median(own[1:] if len(own) > 1 else own))
        own[0] = min(own[0], self._typical)
        book.until(float(ends[0] - own[0]), Part.FIRST_STEP, *self._who)
        gaps = np.append((took - own)[1:], 0.0)  # after each step; what follows the last one is not known here
        evaluating = np.minimum(self._evaluating(steps["step"], ends, np.append(ends[1:], -np.inf)), gaps)
        stalls = np.minimum(self._stalls(steps["step"]), gaps - evaluating)
        seconds = {
            Part.TRAINING: own[~lost].sum(),
            Part.EVALUATION: evaluating[~lost].sum(),
            Part.LOST: own[lost].sum() + evaluating[lost].sum(),
            Part.SAVE_STALL: stalls.sum(),
            Part.BETWEEN_STEPS: (gaps - evaluating - stalls).sum(),
        }
        book.add(float(ends[-1]), {part: float(s) for part, s in seconds.items() if s > 0}, *self._who)

    def _evaluating(self, steps: np.ndarray, ends: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Seconds of the evaluation after each step, [N]: one that was done between its end and its limit."""
        seconds = np.zeros(len(steps))
        for step, done in self._attempt.evaluations:
            row = np.searchsorted(steps, step)
            if row < len(steps) and steps[row] == step and ends[row] <= done <= limits[row]:
                seconds[row] = done - ends[row]
        return seconds

    def _stalls(self, steps: np.ndarray) -> np.ndarray:
        """Seconds for which training stood still for a checkpoint of each step, [N]."""
        seconds = np.zeros(len(steps))
        for save in self._attempt.saves:
            row = np.searchsorted(steps, save.step)
            if save.restart == self._restart and row < len(steps) and steps[row] == save.step:
                seconds[row] = save.blocking_seconds
        return seconds

    def end(self, book: _Book, moment: float, *, failed: bool) -> None:
        """From the last step to the end of the ranks."""
        if self._runs:
            last = self._runs[-1][-1:]
            step = self._attempt.steps["step"][last]
            evaluating = self._evaluating(step, np.array([book.now]), np.array([moment]))
            book.until(
                book.now + float(evaluating[0]), Part.LOST if self._lost[last][0] else Part.EVALUATION, *self._who
            )
            book.until(min(book.now + float(self._stalls(step)[0]), moment), Part.SAVE_STALL, *self._who)
        if failed:
            # more than a step nobody worked: that is time down
            book.until(min(book.now + self._typical, moment), Part.LOST, *self._who)
        elif self._attempt.ended is not None:
            book.until(moment, Part.CLOSING, *self._who)
        else:
            book.until(moment, Part.BETWEEN_STEPS if self._runs else Part.START_UP, *self._who)
