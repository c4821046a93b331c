"""Where a run's time went, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from encdec.errors import RunDirectoryError
from encdec.files import RunPaths, atomic_write_json
from encdec.records import Outcome
from encdec.reliability import expected_ettr, share_of_jobs
from encdec.training.execution import StartingPoint, TrainingPhase
from encdec.training.promotion import GateFile
from encdec.training.run_config import read_run_config
from launchers.bookkeeping.accounting import account
from launchers.bookkeeping.goodput import measure, predict
from launchers.bookkeeping.ledger import GROUPS, Ledger, Part
from launchers.bookkeeping.run_story import COLUMNS, AttemptStory, Mark, RunStory, Save, read_story
from tests.launchers.conftest import Story
from tests.launchers.scripted_run import ZERO, ScriptedRun

BY_HAND = {
    Part.TRAINING: 20 + 20 + 10 + 50,
    Part.EVALUATION: 2,
    Part.SAVE_STALL: 4 * 0.5,
    Part.BETWEEN_STEPS: 0,
    Part.LOST: 10 + 0.5 + 10,
    Part.QUEUE: 10 + 100 + 10,
    Part.LAUNCH: 2 + 2 + 2,
    Part.IMPORTS: 2 + 0.25 + 2 + 2,
    Part.RENDEZVOUS: (1 + 1) + (1 + 0.25) + (1 + 1) + (1 + 1),
    Part.LOAD: (1 + 3) + (0.25 + 1) + (1 + 3) + (1 + 3),
    Part.FIRST_STEP: 2 + 0.5 + 1 + 0,
    Part.START_UP: 0,
    Part.CLOSING: 1 + 4.5,
    Part.DOWN: 0.25 + 88.5,
}
"""Seconds of the parts of ``eventful``."""


@pytest.fixture
def script(story: Story) -> ScriptedRun:
    """A run of which nothing has been submitted yet."""
    return ScriptedRun(story.paths)


def eventful(run: ScriptedRun) -> ScriptedRun:
    """100 steps of 1 s in 375 s: a rank dies, the job is warned and requeued, then killed, and submitted again."""
    run.submitted(0)
    run.attempt(10)
    run.start(ready=12, met=13, imports=15, text=16, ranks=17, loaded=20)
    run.steps(range(1, 21), since=20, first=3)
    run.steps(range(21, 31), since=42.5)
    run.saved(20, 44, blocking=0.5, seconds=2)
    run.rank_died(seen=53, again=53.25)
    run.start(ready=None, met=54.25, imports=54.5, text=54.75, ranks=55, loaded=56)
    run.steps(range(21, 31), since=56, first=1.5)
    run.rank("evaluated", 68.5, step=30, loss=5.0)
    run.steps(range(31, 41), since=68.5)
    run.saved(40, 79, blocking=0.5)
    run.ended("signalled", 80, step=40, message="stopped by SIGUSR2", requeued=True)
    run.attempt(180)
    run.start(ready=182, met=183, imports=185, text=186, ranks=187, loaded=190)
    run.steps(range(41, 51), since=190, first=2)
    run.steps(range(51, 61), since=201.5)
    run.saved(50, 203, blocking=0.5, seconds=2)
    run.submitted(300)
    run.attempt(310, job="8")
    run.start(ready=312, met=313, imports=315, text=316, ranks=317, loaded=320)
    run.steps(range(51, 101), since=320)
    run.saved(100, 370.5, blocking=0.5)
    run.checkpoint(100)
    run.ended("complete", 375, step=100)
    return run


def ledger_of(paths: RunPaths, *, over: bool = True, now: float | None = None) -> Ledger:
    story = read_story(paths, read_run_config(paths))
    return account(story, over=over, now=None if now is None else ZERO + now)


def told(ledger: Ledger) -> dict[Part, float]:
    """The parts that took any time."""
    return {part: pytest.approx(seconds, abs=1e-5) for part, seconds in ledger.totals.items() if seconds > 1e-5}


def test_every_part_is_as_counted_by_hand(script: ScriptedRun):
    ledger = ledger_of(eventful(script).paths)
    assert {part: seconds for part, seconds in BY_HAND.items() if seconds} == told(ledger)
    assert sum(BY_HAND.values()) == 375
    assert ledger.wall == pytest.approx(375)
    assert ledger.ettr == pytest.approx(102 / 375)
    assert ledger.ettr_while_running == pytest.approx(102 / (375 - 120))
    assert (ledger.steps, ledger.lost_steps) == (100, 20)


def test_every_interruption_has_its_price(script: ScriptedRun):
    ledger = ledger_of(eventful(script).paths)
    prices = [(each.cause, each.lost_steps, each.lost_seconds, each.recovery_seconds) for each in ledger.interruptions]
    assert prices == [
        ("rank died", 10, pytest.approx(10.5), pytest.approx(3.5)),
        ("signalled", 0, 0, pytest.approx(100 + 10 + 1)),
        ("killed", 10, pytest.approx(10), pytest.approx(88.5 + 10 + 10)),
    ]
    assert [each.cause for each in ledger.failures] == ["rank died", "killed"]


def test_formula_is_fed_with_what_was_measured(script: ScriptedRun):
    story = read_story(eventful(script).paths, read_run_config(script.paths))
    ledger = account(story, over=True)
    found = measure(ledger, story)
    assert found is not None
    assert found.mean_time_to_interrupt == pytest.approx((375 - 120) / 2)
    assert found.recovery == pytest.approx((3.5 + 108.5) / 2)
    assert found.interval == pytest.approx((102 + 20.5) / 4)
    assert (found.blocking, found.commit) == (pytest.approx(0.5), pytest.approx(0.75))
    assert (found.queue, found.startup) == (pytest.approx((10 + 100) / 2), pytest.approx((12 + 11) / 2))
    by_hand = expected_ettr(122.5 / 4, 127.5, blocking_seconds=0.5, recovery_seconds=56, commit_seconds=0.75)
    jobs = share_of_jobs((255 - 112) / 2, startup_seconds=11.5, stop_seconds=5.5 / 2, queue_seconds=55)
    assert predict(found) == pytest.approx(by_hand * jobs)


def test_run_without_failures_is_predicted_as_it_went(script: ScriptedRun):
    script.submitted(0)
    script.attempt(10)
    script.start(ready=12, met=13, imports=15, text=16, ranks=17, loaded=20)
    script.steps(range(1, 51), since=20)
    script.saved(50, 71, blocking=1)
    script.steps(range(51, 101), since=71)
    script.saved(100, 122, blocking=1)
    script.checkpoint(100)
    script.ended("complete", 125, step=100)
    story = read_story(script.paths, read_run_config(script.paths))
    ledger = account(story, over=True)
    found = measure(ledger, story)
    assert found is not None
    assert ledger.ettr == pytest.approx(0.8)
    assert predict(found) == pytest.approx(0.8, abs=0.01)


def test_steps_after_the_newest_checkpoint_are_lost_once_the_run_is_over(script: ScriptedRun):
    script.submitted(0)
    script.attempt(0)
    script.steps(range(1, 31), since=10)
    script.saved(20, 31, blocking=0)
    script.checkpoint(20)
    assert ledger_of(script.paths, over=False).lost_steps == 0
    over = ledger_of(script.paths)
    assert (over.lost_steps, over.steps) == (10, 20)
    assert over.totals[Part.LOST] == pytest.approx(10)


def test_start_without_marks_is_told_as_a_whole(script: ScriptedRun):
    """Runs of older versions, and ranks that were started otherwise."""
    script.submitted(0)
    script.attempt(5)
    script.steps(range(1, 11), since=25)
    script.checkpoint(10)
    script.ended("complete", 40, step=10)
    assert told(ledger_of(script.paths)) == {Part.QUEUE: 5, Part.START_UP: 20, Part.TRAINING: 10, Part.CLOSING: 5}


def test_rolled_back_steps_are_lost_to_that(script: ScriptedRun):
    script.submitted(0)
    script.attempt(0)
    script.start(ready=1, met=2, imports=3, text=4, ranks=5, loaded=6)
    script.steps(range(1, 11), since=6)
    script.steps(range(6, 21), since=20)
    script.checkpoint(20)
    script.ended("complete", 35, step=20)
    ledger = ledger_of(script.paths)
    [back] = ledger.interruptions
    assert (back.cause, back.lost_steps, back.recovery_seconds) == ("rolled back", 5, pytest.approx(4))
    assert (ledger.totals[Part.TRAINING], ledger.totals[Part.LOST]) == (pytest.approx(20), pytest.approx(5))
    assert ledger.failures == []


def test_node_that_was_cut_off_takes_no_time_of_the_next_attempt(script: ScriptedRun):
    script.submitted(0)
    script.attempt(0)
    script.steps(range(1, 61), since=10)  # on and on, beside the next attempt
    script.attempt(40)
    script.steps(range(1, 11), since=50)
    script.checkpoint(10)
    script.ended("complete", 60, step=10)
    ledger = ledger_of(script.paths)
    assert told(ledger) == {Part.START_UP: 20, Part.LOST: 30, Part.TRAINING: 10}
    assert ledger.wall == pytest.approx(60)


def test_evaluation_is_the_start_s_that_did_it(script: ScriptedRun):
    """The step that was evaluated after the restart had been the last one before it, too."""
    script.submitted(0)
    script.attempt(0)
    script.start(ready=0, met=0, imports=0, text=0, ranks=0, loaded=0)
    script.steps(range(1, 11), since=0)
    script.rank_died(seen=30, again=30)
    script.start(ready=None, met=30, imports=30, text=30, ranks=30, loaded=30)
    script.steps(range(10, 21), since=30)
    script.rank("evaluated", 46, step=20)
    script.checkpoint(20)
    script.ended("complete", 47, step=20)
    assert told(ledger_of(script.paths)) == {
        Part.TRAINING: 20, Part.EVALUATION: 5, Part.LOST: 1 + 1, Part.DOWN: 19, Part.CLOSING: 1,
    }  # fmt: skip


def test_ranks_that_another_launcher_starts_again(script: ScriptedRun):
    """torchrun's ranks claim an attempt at each start, and count restarts through."""
    script.attempt(0)
    script.steps(range(1, 11), since=10)
    script.attempt(30)
    script.restart = 1
    script.rank("start_up", 40, done="load", restart=1)
    script.steps(range(1, 21), since=40)
    script.checkpoint(20)
    script.ended("complete", 60, step=20)
    ledger = ledger_of(script.paths)
    assert [each.cause for each in ledger.interruptions] == ["killed"]
    assert (ledger.steps, ledger.lost_steps) == (20, 10)


def test_hang_is_time_down_beyond_one_step(script: ScriptedRun):
    script.submitted(0)
    script.attempt(0)
    script.steps(range(1, 11), since=0)
    script.rank_died(seen=610, again=610)
    script.steps(range(1, 11), since=620)
    script.checkpoint(10)
    script.ended("complete", 630, step=10)
    ledger = ledger_of(script.paths)
    assert told(ledger) == {Part.LOST: 10 + 1, Part.DOWN: 599, Part.START_UP: 10, Part.TRAINING: 10}


def test_fruitless_starts_are_interruptions_too(script: ScriptedRun):
    script.submitted(0)
    script.attempt(0)
    for restart in range(3):
        script.rank_died(seen=10 * restart + 5, again=10 * restart + 6)
    script.ended("crash", 40, step=0)
    ledger = ledger_of(script.paths)
    assert [each.cause for each in ledger.interruptions] == ["rank died"] * 3 + ["crash"]
    assert ledger.totals[Part.DOWN] == pytest.approx(40)
    assert ledger.ettr == 0
    assert measure(ledger, read_story(script.paths, read_run_config(script.paths))) is None


def test_time_between_attempts_is_queue_wait_where_something_waits(script: ScriptedRun):
    script.submitted(0)
    script.attempt(0)
    script.ended("signalled", 10, step=0)
    script.node("successor_queued", 9, job="8")
    script.attempt(30, job="8")
    script.node("successor_queued", 31, job="9")
    script.node("successor_cancelled", 32, job="9", detail=None)
    script.ended("signalled", 40, step=0)
    script.submitted(70)
    script.attempt(90, job="10")
    script.ended("signalled", 100, step=0)
    ledger = ledger_of(script.paths)
    assert told(ledger) == {Part.QUEUE: 20 + 20, Part.DOWN: 30, Part.CLOSING: 30}


def test_time_after_a_lost_node_is_queue_wait_where_something_waits(script: ScriptedRun):
    """Slurm requeues the job itself, or the job had queued its successor; none of them has left a last word."""
    script.submitted(0)
    script.attempt(0)
    script.steps(range(1, 11), since=0)
    script.attempt(110)
    script.node("successor_queued", 111, job="8")
    script.steps(range(11, 21), since=110)
    script.attempt(320, job="8")
    script.steps(range(21, 31), since=320)
    script.submitted(430)
    script.attempt(440, job="9")
    script.steps(range(31, 41), since=440)
    totals = ledger_of(script.paths, over=False).totals
    assert totals[Part.QUEUE] == pytest.approx(100 + 200 + 10)
    assert totals[Part.DOWN] == pytest.approx(100)


def test_run_in_the_queue_waits_until_now(script: ScriptedRun):
    script.submitted(0)
    ledger = ledger_of(script.paths, now=3600)
    assert told(ledger) == {Part.QUEUE: 3600}
    assert (ledger.ettr, ledger.ettr_while_running, ledger.steps) == (0, 0, 0)


def test_run_whose_job_waits_again_after_a_lost_node_was_not_down(script: ScriptedRun):
    """Slurm has requeued the job, which left no word; nobody submitted it again."""
    script.submitted(0)
    script.attempt(0)
    script.steps(range(1, 11), since=0)
    assert told(ledger_of(script.paths, over=False, now=100)) == {Part.TRAINING: 10, Part.QUEUE: 90}


def test_run_that_was_submitted_again_waits_from_then_on(script: ScriptedRun):
    script.submitted(0)
    script.attempt(0)
    script.ended("crash", 10, step=0)
    script.submitted(40)
    ledger = ledger_of(script.paths, now=100)
    assert told(ledger) == {Part.DOWN: 10 + 30, Part.QUEUE: 60}
    assert [(each.cause, each.recovery_seconds) for each in ledger.interruptions] == [("crash", pytest.approx(100))]


def test_phase_of_a_chain_does_not_account_for_the_one_before(script: ScriptedRun, tmp_path: Path):
    """Its job waits in the queue from the beginning; its time begins when the gate before it opens."""
    before = RunPaths(tmp_path / "before")
    gate = GateFile(
        phase=TrainingPhase.SANITY_CHECK, passed=True, identity="x", step=9, checkpoint="step-9", weights_digest="ab",
        first_loss=7.0, last_loss=5.0, time=ZERO + 500,
    )  # fmt: skip
    before.make()
    gate.write(before)
    start = StartingPoint(kind="gate", source=str(before.root), identity="x")
    run = read_run_config(script.paths)
    assert run.phase is not None
    run = replace(run, starts_from=start, phase=replace(run.phase, phase=TrainingPhase.VALIDATION))
    script.submitted(0)
    script.attempt(510)
    script.ended("signalled", 530, step=0)
    ledger = account(read_story(script.paths, run), over=True)
    assert (ledger.began, ledger.wall) == (ZERO + 500, pytest.approx(30))


@pytest.mark.parametrize("submitted", [True, False])
@pytest.mark.parametrize("place", ["first", "middle", "newest"])
def test_empty_attempt_takes_no_time_from_the_others(script: ScriptedRun, place: str, submitted: bool):
    """The machine may end between the attempt's folder and its first word."""
    if submitted:
        script.submitted(0)
    for name in ("first", "middle", "newest"):
        if name == place:
            script.paths.claim_attempt()
        elif name == "first" or (name, place) == ("middle", "first"):
            script.attempt(0)
            script.steps(range(1, 11), since=0)
            script.ended("signalled", 10, step=10, requeued=True)
        else:
            script.attempt(30)
            script.steps(range(11, 21), since=30)
    ledger = ledger_of(script.paths, over=False)
    assert told(ledger) == {Part.TRAINING: 20, Part.QUEUE: 20}
    assert (ledger.began, ledger.wall) == (ZERO, pytest.approx(40))


def test_run_of_which_nothing_is_known_is_refused(script: ScriptedRun):
    with pytest.raises(RunDirectoryError, match="submitted, or when an attempt"):
        ledger_of(script.paths)
    script.paths.claim_attempt()
    with pytest.raises(RunDirectoryError, match="submitted, or when an attempt"):
        ledger_of(script.paths)


def test_lines_that_lack_what_they_need_are_passed_over(script: ScriptedRun):
    eventful(script)
    good = ledger_of(script.paths)
    for line in (
        '{"event": "saved", "time": 1, "step": "x"}', '{"event": "evaluated", "time": 1}', '{"time": 2}', "[]",
        '{"event": "start_up", "time": 1e9, "done": 3, "restart": 0}', '{"event": "saved", "time": NaN, "step": 3}',
    ):  # fmt: skip
        with script.place.events("rank-0").open("a") as file:
            file.write(line + "\n")
    with script.place.events("node-0").open("a") as file:
        file.write('{"event": "restarting", "time": 1750000400}\n{"event": "rank_failed", "time": 1750000400}\n')
    huge = script.place.steps.read_text().splitlines()[-1].replace('"loss": 7.0', '"loss": ' + "9" * 400)
    nowhere = huge.replace("9" * 400, "7.0").replace('"step_seconds": 1.0', '"step_seconds": NaN')
    with script.place.steps.open("a") as file:
        file.write(f"{huge}\n{nowhere}\n")
    assert ledger_of(script.paths).totals == pytest.approx(good.totals, abs=26)  # the last event has moved its end
    assert ledger_of(script.paths).steps == good.steps


def test_damaged_record_is_named(script: ScriptedRun):
    eventful(script)
    atomic_write_json(script.paths.attempt(0).outcome, {"cause": "complete"})
    with pytest.raises(RunDirectoryError, match=r"outcome\.json"):
        ledger_of(script.paths)


def test_every_part_has_one_group():
    parts = [part for group in GROUPS.values() for part in group]
    assert sorted(parts) == sorted(Part)


moments = some.floats(0, 1000)


@some.composite
def attempts(draw: some.DrawFn, number: int) -> AttemptStory:
    """One whose records are in no order at all, as clocks that are wrong would have them."""
    count = draw(some.integers(0, 8))
    rows = {name: np.array(draw(some.lists(moments, min_size=count, max_size=count))) for name in COLUMNS}
    rows["step"] = np.array(draw(some.lists(some.integers(1, 9), min_size=count, max_size=count)), dtype=float)
    rows["restart"] = np.sort(draw(some.lists(some.integers(0, 2), min_size=count, max_size=count))).astype(float)
    restarts = some.integers(0, 2)
    ended = draw(some.none() | moments)
    cause = draw(some.sampled_from(["complete", "signalled", "crash"]))
    outcome = Outcome(cause=cause, exit_code=0, step=1, checkpoint=None, message="", time=ended or 0.0)
    return AttemptStory(
        number=number, host=None, job=None, began=draw(moments), steps=rows,
        marks=draw(some.lists(some.builds(Mark, moments, some.sampled_from(["launch", "load", "?"]), restarts))),
        failures=draw(some.dictionaries(restarts, some.tuples(moments, some.just("")))),
        restarts=draw(some.dictionaries(some.integers(1, 2), moments)),
        saves=draw(some.lists(some.builds(Save, some.integers(1, 9), restarts, moments, moments))),
        evaluations=draw(some.lists(some.tuples(some.integers(1, 9), moments))),
        events=(), outcome=None if ended is None else outcome, ended=ended, queued=draw(some.booleans()),
        last_sign=draw(moments),
    )  # fmt: skip


@given(
    began=moments, submissions=some.lists(moments), told=some.lists(some.integers(0, 0)).flatmap(
        lambda each: some.tuples(*(attempts(number) for number in range(len(each))))
    ),
    over=some.booleans(), now=some.none() | moments, saved=some.integers(0, 9),
)  # fmt: skip
def test_parts_sum_to_the_wall_time_whatever_the_clocks_say(
    began: float, submissions: list[float], told: tuple, over: bool, now: float | None, saved: int
):
    story = RunStory(began=began, submissions=submissions, attempts=told, saved_step=saved)
    ledger = account(story, over=over, now=now)
    assert sum(ledger.totals.values()) == pytest.approx(ledger.wall)
    assert min(ledger.totals.values()) >= -1e-9
    ends = [ledger.began, *(span.ended for span in ledger.spans)]
    assert [span.began for span in ledger.spans] == ends[:-1]
    assert ends[-1] == ledger.ended
    assert 0 <= ledger.ettr <= 1 + 1e-9
    assert ledger.steps + ledger.lost_steps == sum(len(attempt.steps["step"]) for attempt in told)
