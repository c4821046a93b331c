"""What follows a start of a Slurm job: the decisions, from facts that Slurm 22.05 gave. The real thing: tests/slurm."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import pytest

from encdec.files import RunPaths, atomic_write_json
from encdec.records import ContinuationRecord, JobRecord, JsonLinesWriter, Outcome, RankResult
from launchers import slurm
from launchers.jobs import jobs_of, live_job
from launchers.launch_options import (
    MAX_FRUITLESS_ATTEMPTS,
    LaunchOptions,
    PastAttempt,
    lead_seconds,
    limit_seconds,
    why_given_up,
)
from launchers.nodes.allocation import Allocation
from launchers.nodes.continuation import Continuation, Deadline
from launchers.nodes.outcomes import DEADLINE, AttemptFacts, Move, judge, next_move, node_to_blame
from launchers.slurm import Ending
from tests.launchers.conftest import UNREACHABLE, Play

STOPPED, FAILED = True, False


@pytest.mark.parametrize(
    ("deaths", "guilty"),
    [  # (restarts before, time, node)
        ([], None),
        ([(n, 10.0 * n + delay, node) for n in range(4) for delay, node in ((9, 2), (9.1, 0))], 2),
        ([(0, 9.0, 0), (0, 9.1, 2), (1, 19.0, 2), (2, 29.0, 2), (3, 39.0, 2)], 2),  # node 0 was faster, once
        ([(0, 9.0, 0), (1, 9.1, 2), (2, 19.0, 2), (3, 29.0, 0)], None),  # the program's fault: any node
        ([(0, 9.0, 2), (1, 19.0, 2)], None),  # too few to tell
        ([(0, 1.0, 1), (1, 9.0, 1), (2, 19.0, 2), (3, 29.0, 2), (4, 39.0, 2)], 2),
        (  # node 1's ranks lost their peers; two of them were seen to end after node 0 had started again
            [
                (0, 100.03, 0),
                (0, 100.05, 1),
                (1, 101.4, 0),
                (2, 103.3, 0),
                (3, 105.32, 0),
                (3, 105.34, 1),
                (4, 106.4, 0),
            ],
            0,
        ),
    ],
)
def test_node_to_blame(deaths: list[tuple[int, float, int]], guilty: int | None):
    assert node_to_blame(deaths) == guilty


@pytest.mark.parametrize(
    ("cause", "stop_signal", "ending", "move"),
    [
        ("signalled", "SIGUSR2", Ending.NONE, Move.AGAIN),
        ("signalled", "the time limit", Ending.NONE, Move.AGAIN),
        ("signalled", None, Ending.NONE, Move.AGAIN),  # another node was signalled
        ("signalled", "SIGTERM", Ending.TIME_LIMIT, Move.AGAIN),
        ("signalled", "SIGTERM", Ending.CANCELLED, Move.STOP),
        ("signalled", "SIGTERM", Ending.REQUEUE, Move.LEAVE),
        ("signalled", "SIGTERM", Ending.NONE, Move.AGAIN),  # preempted, in its time of grace
        ("signalled", "SIGTERM", Ending.UNKNOWN, Move.LEAVE),  # nobody says why: it may be a scancel
        ("signalled", "SIGUSR2", Ending.UNKNOWN, Move.AGAIN),
        ("signalled", "SIGUSR2", Ending.CANCELLED, Move.STOP),  # a scancel after the warning
        ("signalled", "SIGUSR2", Ending.REQUEUE, Move.LEAVE),
        ("signalled", "SIGINT", Ending.NONE, Move.STOP),
        ("stop_requested", None, Ending.NONE, Move.STOP),
        ("complete", "SIGUSR2", Ending.NONE, Move.STOP),
        ("gate", None, Ending.NONE, Move.STOP),
        ("refused", None, Ending.NONE, Move.STOP),
        ("crash", None, Ending.NONE, Move.STOP),
        ("crash", "SIGTERM", Ending.NONE, Move.STOP),
        ("crash", "SIGUSR2", Ending.NONE, Move.LEAVE),  # amid a save that the warning asked for
        ("signalled", "SIGTERM", Ending.PREEMPTED, Move.LEAVE),
        ("bad_node", None, Ending.NONE, Move.ELSEWHERE),
    ],
)
def test_next_move(cause: str, stop_signal: str | None, ending: Ending, move: Move):
    outcome = Outcome(cause=cause, exit_code=75, step=1, checkpoint=None, message="")
    assert next_move(outcome, stop_signal, ending) is move


@pytest.mark.parametrize(
    ("stop_signal", "told"),
    [("SIGINT", "SIGINT"), (DEADLINE, "the time limit"), ("SIGUSR2", "SIGUSR2"), (None, "SIGUSR2")],
)
def test_outcome_names_the_signal_that_the_agent_got(stop_signal: str | None, told: str):
    """Ranks are told of any by SIGUSR2."""
    result = RankResult(
        cause="signalled", step=9, checkpoint="step-9", checkpoint_verified=True, first_loss=7.0, last_loss=6.0,
        message="stopped by SIGUSR2 after step 9",
    )  # fmt: skip
    outcome = judge(AttemptFacts(result=result, refusal=None, stop_signal=stop_signal))
    assert outcome.message == f"stopped by {told} after step 9"


@pytest.mark.parametrize(
    ("attempts", "reason"),
    [
        ([], None),
        ([(10, STOPPED)] * 9, None),
        ([(10, STOPPED)] * 10, "10 attempts"),
        ([(10, FAILED), *[(8, FAILED)] * 4], None),
        ([(10, FAILED), *[(8, FAILED)] * 5], "5 failed attempts"),
        ([(0, FAILED)] * 5, "5 failed attempts"),
        ([*[(0, FAILED)] * 4, (1, FAILED), (0, FAILED)], None),  # a new step: the count begins again
        ([(10, FAILED), *[(8, FAILED), (9, STOPPED)] * 4], None),  # to be stopped is no failure
    ],
)
def test_limits_of_going_on(attempts: list[tuple[int, bool]], reason: str | None):
    said = why_given_up(LaunchOptions(max_attempts=10), [PastAttempt(*attempt) for attempt in attempts])
    assert said is None if reason is None else said is not None and said.startswith(reason)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:30", 7230), ("2-0", 172800), ("1-12:30", 131400), ("1-00:00:01", 86401)],
)
def test_time_limits_as_sbatch_reads_them(text: str, seconds: int):
    assert limit_seconds(text) == seconds


def test_warning_suits_the_saves_and_the_limit():
    assert lead_seconds(None, None) == 120
    assert lead_seconds(None, 60) == 20
    assert lead_seconds(2.0, None) == 36
    assert lead_seconds(100.0, 7200) == 330
    assert lead_seconds(100.0, 600) == 200


@pytest.fixture
def start(tmp_path) -> Continuation:
    """Job 12's first start, in an empty run directory."""
    RunPaths(tmp_path / "run").make()
    return Continuation(
        RunPaths(tmp_path / "run"),
        Allocation(job="12", restarts=0, start="12.0.0", nodes=1, node_rank=0, nodelist="n1"),
    )


SHOWN = "JobId=12 JobName=run JobState={} Reason={} Dependency=(null) Requeue=1 Restarts={} EndTime={} Deadline=N/A"


@pytest.mark.parametrize(
    ("state", "reason", "restarts", "end", "ending"),
    [  # as scontrol showed it to a task that had just got SIGTERM, at 09:30:08
        ("COMPLETING", "None", 0, "2026-11-21T09:30:08", Ending.CANCELLED),  # scancel
        ("COMPLETING", "None", 0, "2126-11-21T09:30:08", Ending.CANCELLED),  # whatever the clock here says
        ("COMPLETING", "None", 1, "2026-11-21T09:35:08", Ending.REQUEUE),  # scontrol requeue
        ("COMPLETING", "TimeLimit", 0, "2026-11-21T09:30:08", Ending.TIME_LIMIT),
        ("RUNNING", "None", 0, "2026-11-21T09:30:18", Ending.NONE),  # preempted, with 10 s of grace
        ("PENDING", "None", 0, "Unknown", Ending.REQUEUE),
    ],
)
def test_why_slurm_ends_a_job(play: Play, state: str, reason: str, restarts: int, end: str, ending: Ending):
    play("scontrol", SHOWN.format(state, reason, restarts, end) + "\n")
    assert slurm.why_ending(slurm.job_facts("12"), restarts=0) is ending


def test_nobody_says_why(play: Play):
    assert slurm.why_ending(slurm.job_facts("12"), restarts=0) is Ending.UNKNOWN


def record(paths: RunPaths, job: str, successor: str | None = None) -> None:
    atomic_write_json(paths.continuation, ContinuationRecord(job=job, successor=successor).to_json())


@pytest.mark.parametrize(
    ("before", "state", "declined"),
    [
        (None, None, None),
        (("12", None), None, None),  # the same job again
        (("11", "12"), "TIMEOUT", None),
        (("11", "12"), "NODE_FAIL", None),
        (("11", "12"), "PREEMPTED", None),
        (("11", "12"), "CANCELLED", "was cancelled"),
        (("11", None), "CANCELLED", "was cancelled"),  # a net that could not be taken in any more
        (("11", None), "FAILED", None),  # submitted again by a person
        (("11", None), "RUNNING", "runs this run"),
        (("11", None), "PENDING", "runs this run"),
    ],
)
def test_a_job_looks_before_it_runs(start: Continuation, play: Play, before, state: str | None, declined: str | None):
    if before:
        record(start.paths, *before)
    play("squeue", f"{state}\n")
    answer = start.decline()
    assert (answer is None) if declined is None else answer is not None and declined in answer.reason
    assert len(play.calls("squeue")) == (0 if state is None else 1)


def test_a_person_may_submit_again_what_was_cancelled(start: Continuation, play: Play):
    record(start.paths, "11")
    atomic_write_json(start.paths.job, JobRecord(submission="ab", job="12", submitted=1.0).to_json())
    play("squeue", "CANCELLED\n")
    assert start.decline() is None


@pytest.fixture
def requeued(start: Continuation, play: Play) -> Callable[[], Continuation]:
    """Job 12 was warned, has saved, and was requeued, while job 13 waits for its end; makes its next start."""
    attempt = start.paths.attempt(start.paths.claim_attempt())
    warned = Outcome(cause="signalled", exit_code=75, step=9, checkpoint="step-9", message="")
    record(start.paths, "12", "13")
    start._successor = "13"
    play("scontrol", "JobId=12 JobState=RUNNING Reason=None Restarts=0 EndTime=2099-01-01T00:00:00\n")
    play("scancel")
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        start.end(warned, "SIGUSR2", ledger)
    return lambda: Continuation(start.paths, replace(start.allocation, restarts=1, start="12.1.0"))


def test_net_stays_until_the_requeued_job_runs(start: Continuation, requeued, play: Play):
    """A job that Slurm starts again may end before it has run anything."""
    assert "requeue 12" in play.calls("scontrol")
    assert play.calls("scancel") == [] and jobs_of(start.paths) == ["12", "13"]
    play("scancel", err="scancel: error: slurm_kill_job2 failed\n", code=1)
    attempt = start.paths.attempt(start.paths.claim_attempt())
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        requeued().begin(ledger)
    assert jobs_of(start.paths) == ["12", "13"]  # one that could not be cancelled is not forgotten
    play("scancel")
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        requeued().begin(ledger)
    assert play.calls("scancel") == ["13", "13"]
    assert jobs_of(start.paths) == ["12"]


def test_net_is_taken_in_by_a_start_that_runs_nothing(start: Continuation, requeued, play: Play):
    start.paths.stop_request.touch()
    again = requeued()
    assert again.decline() is not None
    again.leave()
    assert play.calls("scancel") == ["13"]
    assert jobs_of(start.paths) == ["12"]


def test_job_that_may_not_run_leaves_the_successor_of_another_alone(start: Continuation, play: Play):
    record(start.paths, "11", "14")
    play("squeue", "RUNNING\n")
    play("scancel")
    assert start.decline() is not None
    start.leave()
    assert play.calls("scancel") == [] and jobs_of(start.paths) == ["11", "14"]


def test_successor_queued_in_advance_keeps_its_place_over_a_requeue(start: Continuation, requeued, play: Play):
    """A lost node has the job started again: its successor has aged in the queue."""
    LaunchOptions(continue_by="successor").write(start.paths)
    play("sbatch", "15\n")
    attempt = start.paths.attempt(start.paths.claim_attempt())
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        requeued().begin(ledger)
    assert play.calls("scancel") == [] and play.calls("sbatch") == []
    assert jobs_of(start.paths) == ["12", "13"]


def ended(state: str, **more: str) -> str:
    facts = {"JobState": state, "Reason": "None", "Restarts": "0", "EndTime": "2026-11-21T09:30:08"} | more
    return "JobId=12 " + " ".join(f"{name}={value}" for name, value in facts.items()) + "\n"


def test_scancel_takes_the_successor_along_before_the_save(start: Continuation, play: Play):
    """The save may take longer than Slurm leaves a cancelled job."""
    attempt = start.paths.attempt(start.paths.claim_attempt())
    start._successor = "13"
    play("scancel")
    play("scontrol", ended("COMPLETING"))
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        start.warned("SIGTERM", ledger)
    assert play.calls("scancel") == ["13"]
    late = Continuation(start.paths, replace(start.allocation, job="13", start="13.0.0"))
    play("squeue", err=UNREACHABLE, code=1)  # whatever Slurm still knows: the job itself has seen it
    refused = late.decline()
    assert refused is not None and "was cancelled" in refused.reason


@pytest.mark.parametrize("warned", [True, False])
def test_preemption_that_cancels_is_followed_by_a_successor(start: Continuation, play: Play, warned: bool):
    """By requeue, too, where there was no successor before."""
    attempt = start.paths.attempt(start.paths.claim_attempt())
    start.paths.sbatch.write_text("#!/bin/bash\n")
    saved = Outcome(cause="signalled", exit_code=75, step=9, checkpoint="step-9", message="")
    play("scontrol", ended("COMPLETING", StartTime="2026-11-21T09:00:00", PreemptTime="2026-11-21T09:30:08"))
    play("sbatch", "13\n")
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        if warned:
            start.warned("SIGTERM", ledger)
        start.end(saved, "SIGTERM", ledger)
    assert len(play.calls("sbatch")) == 1 and jobs_of(start.paths) == ["12", "13"]


def test_successor_that_is_refused_is_replaced_by_a_requeue(start: Continuation, play: Play):
    """A site may limit how many jobs a user has in the queue."""
    start.options = LaunchOptions(continue_by="successor")
    attempt = start.paths.attempt(start.paths.claim_attempt())
    start.paths.sbatch.write_text("#!/bin/bash\n")
    play("sbatch", err="sbatch: error: QOSMaxSubmitJobPerUserLimit\n", code=1)
    play("scontrol", "JobId=12 JobState=RUNNING Reason=None Restarts=0 EndTime=2099-01-01T00:00:00\n")
    warned = Outcome(cause="signalled", exit_code=75, step=9, checkpoint="step-9", message="")
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        start.end(warned, "SIGUSR2", ledger)
    assert play.calls("scontrol")[-1] == "requeue 12"


def test_new_submission_begins_to_count_again(start: Continuation):
    """A person has looked: what failed before, a full disk, is mended."""
    failed = Outcome(cause="refused", exit_code=1, step=0, checkpoint=None, message="No space left on device")
    for _ in range(MAX_FRUITLESS_ATTEMPTS):
        atomic_write_json(start.paths.attempt(start.paths.claim_attempt()).outcome, failed.to_json())
    refused = start.decline()
    assert refused is not None and "5 failed attempts" in refused.reason
    again = JobRecord(submission="ab", job="12", submitted=1.0, attempts_before=MAX_FRUITLESS_ATTEMPTS)
    atomic_write_json(start.paths.job, again.to_json())
    assert start.decline() is None


def test_run_goes_on_without_a_bad_node(start: Continuation, play: Play):
    attempt = start.paths.attempt(start.paths.claim_attempt())
    blamed = Outcome(cause="bad_node", exit_code=75, step=9, checkpoint=None, message="", bad_node="n7")
    start.paths.sbatch.write_text("#!/bin/bash\n")
    play("scontrol", "JobId=12 JobState=RUNNING Restarts=0 ExcNodeList=n[1-2] EndTime=2099-01-01T00:00:00\n")
    play("sbatch", "13\n")
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        start.end(blamed, None, ledger)
    assert play.calls("sbatch") == [f"--parsable --dependency=afterany:12 --exclude=n[1-2],n7 {start.paths.sbatch}"]
    assert jobs_of(start.paths) == ["12", "13"]
    after = Continuation(start.paths, replace(start.allocation, job="13", start="13.0.0"))
    play("squeue", "FAILED\n")
    assert after.decline() is None
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        after.begin(ledger)
        after.warned("SIGUSR2", ledger)  # whatever follows keeps away from it, too
    assert play.calls("sbatch")[-1] == f"--parsable --dependency=afterany:13 --exclude=n[1-2],n7 {start.paths.sbatch}"


def test_bad_nodes_are_given_up_on_in_the_end(start: Continuation, play: Play):
    blamed = Outcome(cause="bad_node", exit_code=75, step=0, checkpoint=None, message="", bad_node="n7")
    for _ in range(MAX_FRUITLESS_ATTEMPTS):
        attempt = start.paths.attempt(start.paths.claim_attempt())
        atomic_write_json(attempt.outcome, blamed.to_json())
    play("sbatch", "13\n")
    with JsonLinesWriter(attempt.events("node-0")) as ledger:
        start.end(blamed, None, ledger)
    assert play.calls("sbatch") == []


def test_complete_run_is_not_run_again(start: Continuation):
    attempt = start.paths.attempt(start.paths.claim_attempt())
    done = Outcome(cause="complete", exit_code=0, step=60, checkpoint="step-60", message="")
    atomic_write_json(attempt.outcome, done.to_json())
    assert start.decline() is None  # without its gate file it is judged again
    start.paths.gates.mkdir(exist_ok=True)
    atomic_write_json(start.paths.gates / "sanity_check.json", {"passed": True})
    answer = start.decline()
    assert answer is not None and (answer.reason, answer.exit_code) == ("the run is complete", 0)


def test_live_job_of_a_run(tmp_path, play: Play):
    paths = RunPaths(tmp_path)
    assert jobs_of(paths) == []
    atomic_write_json(paths.job, JobRecord(submission="ab", job="11", submitted=1.0).to_json())
    record(paths, "11", "12")
    assert jobs_of(paths) == ["11", "12"]
    play("squeue", "TIMEOUT\n")
    assert live_job(paths) is None
    play("squeue")
    (tmp_path / "squeue").write_text('#!/bin/sh\ncase "$*" in *=12*) echo PENDING;; *) echo TIMEOUT;; esac\n')
    assert live_job(paths) == "12"


def test_deadline_asks_again_before_it_says_yes(play: Play):
    def end_in(seconds: float) -> None:
        text = datetime.fromtimestamp(time.time() + seconds).isoformat(timespec="seconds")
        play("scontrol", f"JobId=12 JobState=RUNNING EndTime={text} Deadline=N/A\n")

    def deadline(lead: float, **facts: Callable[[], float]) -> Deadline:
        """Of a job that has run for an hour."""
        made = Deadline("12", lead, **facts)
        made._begun -= 3600
        return made

    end_in(60)
    raised = deadline(100)
    end_in(3600)  # the limit has been raised meanwhile
    assert not raised.passed()
    end_in(60)
    assert deadline(100).passed()
    assert not deadline(10).passed()
    assert deadline(10, stop_seconds=lambda: 20.0).passed()  # stops have been seen to take that long
    assert not Deadline("12", 100).passed()  # a job of a minute is not told to stop before it has done anything
    play("scontrol", "JobId=12 EndTime=Unknown\n")
    assert not deadline(10).passed()


def test_job_is_found_again_by_its_comment(play: Play):
    play("squeue", "17|encdec ab 01\n21|encdec ab 02\n22|(null)\n")
    assert slurm.find_job("run", "encdec ab 02") == "21"
    assert slurm.find_job("run", "encdec ab 03") is None
    play("squeue", err=UNREACHABLE, code=1)
    with pytest.raises(slurm.Unanswered, match="It may be"):
        slurm.find_job("run", "encdec ab 02")
