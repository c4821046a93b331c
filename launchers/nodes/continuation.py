"""What follows one start of a Slurm job: nothing, the same job again, or its successor. Its head task decides.

A successor is a job that waits for the end of this one (``--dependency=afterany``), however it ends. By requeue it is
only the net: queued when the warning comes, there if the save is slower than the warning, if requeueing is forbidden,
or if the requeued job ends before it has run anything. The job's next start, once it runs, takes it in. A successor
looks before it runs: after a user's scancel it does nothing.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from encdec.errors import ExitCode
from encdec.files import AttemptPaths, RunPaths, atomic_write_json
from encdec.records import (
    ContinuationRecord,
    JobRecord,
    JsonLinesWriter,
    Outcome,
    event,
    read_json_lines,
    read_record,
    read_steps,
)
from launchers import slurm
from launchers.launch_options import PastAttempt, lead_seconds, read_launch_options, why_given_up
from launchers.nodes import chain
from launchers.nodes.allocation import Allocation, Declined, decline
from launchers.nodes.outcomes import Move, next_move, node_to_blame
from launchers.run_status import read_status

SECONDS_BETWEEN_DEADLINE_LOOKS = 1.0
SECONDS_BETWEEN_MEASUREMENTS = 60.0
SECONDS_TO_BE_ANSWERED = 300.0
SECONDS_BETWEEN_QUESTIONS = 10.0
GOING_ON = (slurm.Ending.NONE, slurm.Ending.PREEMPTED)
"""Endings after which nothing but a successor that waits already may go on."""


@dataclass
class Continuation:
    """One start of a job and what follows it.

    Args:
        paths: the run directory.
        allocation: this start.
    """

    paths: RunPaths
    allocation: Allocation
    _successor: str | None = field(default=None, init=False)
    _excluded: str | None = field(default=None, init=False)
    _cancelled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.options = read_launch_options(self.paths)

    # ---- before the attempt

    def decline(self) -> Declined | None:
        """Why no attempt should be claimed, or None; asks Slurm only if another job has run the run before."""
        if read_status(self.paths).complete:
            return Declined("the run is complete", ExitCode.COMPLETE)
        if self.paths.stop_request.exists():  # a requeue that came after the request
            return Declined(f"{self.paths.stop_request} asks to stop", ExitCode.COMPLETE)
        if waiting := self._gate_before():
            return waiting
        reason = why_given_up(self.options, past_attempts(self.paths))
        if reason:
            chain.end(self.paths, self.allocation.job, f"given up after {reason}")
            return Declined(f"given up after {reason}", ExitCode.CRASHED)
        before = self._record()
        if before is None or before.job == self.allocation.job:
            return None
        state = self._end_of(before)
        if state == "CANCELLED" and not self._was_submitted():
            return Declined(f"job {before.job}, which this one was to continue, was cancelled", ExitCode.COMPLETE)
        if before.successor != self.allocation.job and state not in slurm.END_STATES:
            return Declined(f"job {before.job}, which is {state}, runs this run", ExitCode.CONFIG_WRONG)
        return None

    def _gate_before(self) -> Declined | None:
        """Why the phase may not begin yet, or ever; None where it may, or has. Its job was to wait for the end of the
        phase before, which proves nothing.
        """
        why = chain.why_not_yet(self.paths)
        if why is None:
            return None
        if jobs := chain.jobs_before(self.paths, but=self.allocation.job):
            return self._begin_after(jobs)  # the phase before goes on in a job that this one did not wait for
        chain.end(self.paths, self.allocation.job, why)
        chain.tell(self.paths, why)
        return Declined(why, ExitCode.GATE_NOT_PASSED)

    def _begin_after(self, jobs: list[str]) -> Declined:
        """Have another job wait for these; where Slurm takes none, this one again after its hold-off."""
        answer = slurm.submit_patiently(self.paths.sbatch, f"--dependency=afterany:{':'.join(jobs)}")
        if not answer.ok:
            slurm.requeue(self.allocation.job)
            return Declined(f"it looks again: {', '.join(jobs)} may still pass the gate before", ExitCode.COMPLETE)
        self._carry_to(answer.out)
        chain.adopt(self.paths, answer.out)
        chain.wait_for(self.paths, [answer.out])
        return Declined(f"job {answer.out} begins after {', '.join(jobs)}", ExitCode.COMPLETE)

    @staticmethod
    def _end_of(before: ContinuationRecord) -> str:
        """How the job before this one ended, in Slurm's words; its own word where a user cancelled it. A controller
        that does not answer yet is given time: it may have to say just that.
        """
        state = "CANCELLED" if before.cancelled else slurm.job_state(before.job)
        deadline = time.monotonic() + SECONDS_TO_BE_ANSWERED
        while state == slurm.UNKNOWN and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN_QUESTIONS)
            state = slurm.job_state(before.job)
        return state

    def _was_submitted(self) -> bool:
        """Whether a person has submitted this job since, and it is no successor."""
        record = read_record(self.paths.job, JobRecord) if self.paths.job.is_file() else None
        return record is not None and record.job in (None, self.allocation.job)

    def leave(self) -> None:
        """This start runs nothing, and nothing is to follow it: what waits for the end of this job is not needed."""
        before = self._record()
        if before and before.job == self.allocation.job and before.successor and slurm.cancel(before.successor) is None:
            self._excluded = before.excluded
            self._write()

    def begin(self, ledger: JsonLinesWriter) -> None:
        """This start runs the run now. The successor of an earlier start is not needed any more, unless it is this
        job's, too, and wanted in advance: it has aged in the queue.
        """
        chain.take_along(self.paths, self.allocation.job)
        before, in_advance = self._record(), self.options.continue_by == "successor"
        self._excluded = before.excluded if before else None
        if before and before.successor != self.allocation.job:
            self._successor = before.successor
        if before and not (in_advance and before.job == self.allocation.job):
            self._cancel_successor(ledger)
        self._write()
        if in_advance and self._successor is None:
            self._queue_successor(ledger)

    # ---- when it is warned

    def warned(self, signal_name: str, ledger: JsonLinesWriter) -> None:
        """Time is running out: spread the net before the save, which may take longer than there is time. Or take it in:
        a user's scancel comes as SIGTERM, and may leave no time to do that after the save.
        """
        ending = self._ending() if signal_name == "SIGTERM" else slurm.Ending.NONE
        if ending is slurm.Ending.CANCELLED:
            self._cancelled = True
            self._write()
            self._cancel_successor(ledger)
            chain.end(self.paths, self.allocation.job, "cancelled by user")
        elif ending in GOING_ON and self._successor is None and not self._given_up():
            self._queue_successor(ledger)

    # ---- after its outcome

    def bad_node(self, attempt: AttemptPaths) -> str | None:
        """Name of the node on which ranks died first again and again, or None."""
        guilty = node_to_blame(
            (record["restart"], record["time"], node)
            for node in range(self.allocation.nodes if self.allocation.nodes > 1 else 0)
            for record in read_json_lines(attempt.events(f"node-{node}"))
            if record["event"] == "rank_failed"
        )
        return None if guilty is None else slurm.expand_nodelist(self.allocation.nodelist)[guilty]

    def end(self, outcome: Outcome, stop_signal: str | None, ledger: JsonLinesWriter) -> None:
        """Do what is to follow, and write down what it was."""
        # whatever the signal was: a scancel may have followed it, or have reached another node
        ending = self._ending() if outcome.cause == "signalled" else slurm.Ending.NONE
        move = next_move(outcome, stop_signal, ending)
        reason = self._given_up() if move in (Move.AGAIN, Move.ELSEWHERE) else None
        ledger.write(
            event("next", move="stop" if reason else move, ending=ending, given_up=reason, bad_node=outcome.bad_node)
        )
        if (move is Move.STOP or reason) and outcome.cause != "complete":
            chain.end(
                self.paths, self.allocation.job, reason or outcome.message
            )  # before all else: nodes wait for them
        if move is Move.AGAIN and not reason:
            self._go_on(ledger)
        elif move is Move.ELSEWHERE and not reason:
            self._go_elsewhere(str(outcome.bad_node), ledger)
        elif move is not Move.LEAVE:
            self._cancel_successor(ledger)
        elif ending is slurm.Ending.PREEMPTED and self._successor is None and not self._given_up():
            self._queue_successor(ledger)
        if stop_signal and (following := chain.next_phase_here(self.paths)):
            Continuation(following, self.allocation).put_off(outcome, stop_signal, ledger)

    def put_off(self, before: Outcome, stop_signal: str, ledger: JsonLinesWriter) -> None:
        """The phase does not begin in this start of the job, which was asked to stop just when the phase before was
        over.

        Args:
            before: of the phase before.
            ledger: of the phase before.
        """
        ending = self._ending()
        move = next_move(replace(before, cause="signalled"), stop_signal, ending)
        reason = f"{stop_signal} came in the phase before"
        decline(self.allocation, self.paths, Declined(reason, ExitCode.COMPLETE))  # first: a requeue ends this process
        ledger.write(event("next_phase_put_off", move=move, ending=ending, detail=reason))
        if move is Move.AGAIN:
            self._go_on(ledger)

    # ---- parts

    def _ending(self) -> slurm.Ending:
        facts = slurm.job_facts(self.allocation.job)
        return slurm.why_ending(facts, restarts=self.allocation.restarts)

    def _given_up(self) -> str | None:
        return why_given_up(self.options, past_attempts(self.paths))

    def _go_on(self, ledger: JsonLinesWriter) -> None:
        """By requeue or successor; one that waits already stays even if Slurm has taken the job back: a job that it
        starts again can end before it has run anything, and then nothing else would go on.
        """
        requeued = self.options.continue_by == "requeue" and self._requeue(ledger)
        if not requeued and self._successor is None:
            self._queue_successor(ledger)
        if not requeued and self._successor is None and self.options.continue_by == "successor":
            self._requeue(ledger)  # a site may limit how many jobs a user has in the queue

    def _go_elsewhere(self, node: str, ledger: JsonLinesWriter) -> None:
        """A successor without the bad node, nor those that this job kept away from already."""
        self._cancel_successor(ledger)
        kept_away = slurm.job_facts(self.allocation.job).get("ExcNodeList", "(null)")
        self._excluded = node if kept_away == "(null)" else f"{kept_away},{node}"
        self._queue_successor(ledger)

    def _requeue(self, ledger: JsonLinesWriter) -> bool:
        problem = slurm.requeue(self.allocation.job)
        ledger.write(event("requeue_refused" if problem else "requeued", job=self.allocation.job, detail=problem))
        return problem is None

    def _queue_successor(self, ledger: JsonLinesWriter) -> None:
        job = self.allocation.job
        without = [f"--exclude={self._excluded}"] if self._excluded else []
        answer = slurm.submit(self.paths.sbatch, f"--dependency=afterany:{job}", *without)
        if not answer.ok:
            ledger.write(event("successor_refused", detail=answer.problem))
            return
        self._successor = answer.out
        self._carry_to(self._successor)
        chain.wait_for(self.paths, [job, self._successor])
        self._write()
        ledger.write(event("successor_queued", job=self._successor))

    def _carry_to(self, job: str) -> None:
        """submitit finds what it carries by the job's id."""
        carried = self.paths.submitit / f"{self.allocation.job}_submitted.pkl"
        if carried.is_file():
            shutil.copy(carried, self.paths.submitit / f"{job}_submitted.pkl")

    def _cancel_successor(self, ledger: JsonLinesWriter) -> None:
        if self._successor is None:
            return
        problem = slurm.cancel(self._successor)
        ledger.write(event("successor_cancelled", job=self._successor, detail=problem))
        if problem is None:
            self._successor = None
            self._write()

    def _record(self) -> ContinuationRecord | None:
        file = self.paths.continuation
        return read_record(file, ContinuationRecord) if file.is_file() else None

    def _write(self) -> None:
        record = ContinuationRecord(
            job=self.allocation.job, successor=self._successor, cancelled=self._cancelled, excluded=self._excluded
        )
        atomic_write_json(self.paths.continuation, record.to_json())


def past_attempts(paths: RunPaths) -> list[PastAttempt]:
    """The attempts since the newest submission, oldest first: a person has looked at those before."""
    submitted = read_record(paths.job, JobRecord) if paths.job.is_file() else None
    past = []
    for number in paths.attempt_numbers()[submitted.attempts_before if submitted else 0 :]:
        attempt = paths.attempt(number)
        best = max((int(record["step"]) for record in read_steps(attempt.steps)), default=0)
        outcome = read_record(attempt.outcome, Outcome) if attempt.outcome.is_file() else None
        asked = outcome is not None and outcome.cause in ("signalled", "stop_requested")
        past.append(PastAttempt(best, stopped=asked))
    return past


class Deadline:
    """Acts where a warning signal never came: by the job's own end time.

    Args:
        job: the Slurm job, which has just begun.
        lead: how long before its end to stop, seconds; more once a stop is seen to take longer, and never more than a
            third of the job's time, or it would do nothing but stop.
        stop_seconds: what a stop takes as far as this attempt knows, asked once in SECONDS_BETWEEN_MEASUREMENTS.
    """

    def __init__(self, job: str, lead: float, stop_seconds: Callable[[], float | None] = lambda: None) -> None:
        self._job, self._asked, self._stop_seconds = job, lead, stop_seconds
        self._begun = time.time()
        self._end = parse_epoch(os.environ.get("SLURM_JOB_END_TIME")) or slurm.end_time(job)
        self._measured: float | None = None
        self._next_look = self._next_measurement = 0.0

    def passed(self) -> bool:
        """Whether it is time to stop. The limit may have been raised: Slurm is asked again before the answer is yes."""
        if self._end is None or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + SECONDS_BETWEEN_DEADLINE_LOOKS
        if time.monotonic() >= self._next_measurement:
            self._next_measurement = time.monotonic() + SECONDS_BETWEEN_MEASUREMENTS
            self._measured = self._stop_seconds()
        if time.time() < self._end - self._lead(self._end):
            return False
        self._end = slurm.end_time(self._job) or self._end
        return time.time() >= self._end - self._lead(self._end)

    def _lead(self, end: float) -> float:
        limit = end - self._begun
        needed = 0.0 if self._measured is None else lead_seconds(self._measured, limit)
        return max(min(self._asked, limit / 3), needed)


def parse_epoch(text: str | None) -> float | None:
    """Seconds since the epoch, as newer Slurm hands them to tasks."""
    return float(text) if text and text.isdecimal() else None
