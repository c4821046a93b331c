"""The only module that runs Slurm commands; it knows their output formats, but for those of ``slurm_limits``.

Columns are asked for by name, never as JSON, whose schema changes between releases. A run's first sbatch is submitit's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from encdec.errors import EncdecError, MissingPrerequisite

COMMAND_TIMEOUT_SECONDS = 20
"""Commands answer in milliseconds; a dead controller takes 4-14 s to be given up."""
REQUEUE_TRIES = 60
SECONDS_BETWEEN_REQUEUE_TRIES = 5.0
"""A controller that is away refuses a requeue with a misleading text. There is nothing better to do than to ask again
until it is back or the job's time is up.
"""

SOON = "now+2"
"""The start time that lifts a hold-off. A node refuses a start whose credential was made in the same second as the kill
of the job's start before, and Slurm then calls the job FAILED ("Job credential revoked").
"""

TASTES = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SLURM_TIME_FORMAT")
KEPT = frozenset({"SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS"})
"""Which cluster, and as whom: not facts of the job that this shell may be part of."""

UNKNOWN = "UNKNOWN"
"""Nobody could be asked. The job may live."""
UNASKED = "UNASKED"
"""Nobody has been asked yet."""
GONE = "GONE"
"""The controller answers and has forgotten the job, and accounting knows no end: it lives no more."""
END_STATES = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT", GONE,
    }
)  # fmt: skip


FIELD_OF_FLAG = {
    "nodes": "NumNodes", "partition": "Partition", "account": "Account", "qos": "QOS", "time": "TimeLimit",
    "constraint": "Features", "exclude": "ExcNodeList", "reservation": "Reservation", "licenses": "Licenses",
    "cpus-per-task": "CPUs/Task", "mem": "MinMemoryNode", "mem-per-cpu": "MinMemoryCPU", "gres": "TresPerNode",
}  # fmt: skip
"""sbatch's flag -> field of ``scontrol show job`` that says what a job got."""
GPU_FLAG_OF_FIELD = {"TresPerJob": "gpus", "TresPerTask": "gpus-per-task"}
"""Field of ``scontrol show job`` -> flag that asks for GPUs otherwise than by node."""


class Unanswered(EncdecError):
    """Slurm does not say what must be known before anything is done."""


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    ok: bool
    out: str
    problem: str
    """Its last word if it failed."""
    said: str = ""
    """All that it wrote, errors last."""


def ask(*command: str, environment: Mapping[str, str] | None = None, script: str | None = None) -> Answer:
    """Run one Slurm command, in this process's environment unless another is given; failing is an answer, too.

    A user's own filters and formats are left out: a job that they hide would be taken for one that has ended.

    Args:
        script: what the command reads from its standard input.
    """
    given = os.environ if environment is None else environment
    plain = {name: value for name, value in given.items() if not name.startswith(TASTES)}
    try:
        done = subprocess.run(
            command, input=script, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS, check=False,
            env=plain,
        )  # fmt: skip
    except FileNotFoundError:
        return Answer(False, "", f"no {command[0]} on PATH")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(False, "", f"{' '.join(command[:2])} failed ({type(error).__name__})")
    said = done.stdout + done.stderr
    last_line = said.strip().rpartition("\n")[2].strip()
    problem = last_line or f"{' '.join(command[:2])} exited {done.returncode}"
    return Answer(done.returncode == 0, done.stdout, problem, said)


def outside_any_job(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without what a surrounding job or the user's defaults would lay over a job's own script."""
    stray = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")
    return {name: value for name, value in environment.items() if name in KEPT or not name.startswith(stray)}


def why_no_controller() -> str | None:
    """None if a Slurm controller answers from here, else the reason in a few words."""
    if shutil.which("scontrol") is None:
        return "no scontrol on PATH"
    answer = ask("scontrol", "ping")
    return None if answer.ok and " UP" in answer.out else answer.problem


def accounting_keeps(what: str) -> bool:
    """Whether the controller has ``what`` (job_comment, job_env, job_script ...) of each job kept in its accounting."""
    found = re.search(r"^AccountingStoreFlags\s*=\s*(\S+)", ask("scontrol", "show", "config").out, re.MULTILINE)
    return found is not None and what in found[1].split(",")


def expand_nodelist(nodelist: str) -> list[str]:
    """``n[1-3,7]`` -> n1, n2, n3, n7. Computed by scontrol itself; the controller is not asked.

    Raises:
        MissingPrerequisite: no scontrol here.
        EncdecError: it cannot read the list.
    """
    answer = ask("scontrol", "show", "hostnames", nodelist)
    if answer.ok and answer.out.split():
        return answer.out.split()
    if shutil.which("scontrol") is None:
        raise MissingPrerequisite(
            "The nodes of a multi-node job need scontrol to read their node list",
            found=answer.problem,
            remedy="Make it visible inside the container, or start one node",
        )
    raise EncdecError("Slurm's node list must be readable", found=nodelist or "an empty one", remedy="Submit again")


def job_state(job: str) -> str:
    """State of a job in Slurm's words, from the controller or else accounting; GONE or UNKNOWN if both are silent."""
    answer = ask("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")
    state = parse_state(answer.out) if answer.ok else None
    if state:
        return state
    accounted = parse_state(
        ask("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={job}", "--format=State").out
    )
    return unlisted_state(accounted, forgotten=has_forgotten(answer))


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job."""

    state: str
    reason: str = ""
    """Why it waits, in Slurm's words; empty unless it does."""
    start: float | None = None
    """When Slurm expects a waiting job to start, seconds since the epoch."""

    @property
    def ended(self) -> bool:
        return self.state in END_STATES

    @property
    def held(self) -> bool:
        """Whether it waits until its user releases it; so does a job whose prolog has failed."""
        return self.reason in ("JobHeldUser", "JobHoldMaxRequeue") or "held" in self.reason.lower().split()


@dataclass(frozen=True)
class Listing:
    """What Slurm says of some jobs."""

    states: Mapping[str, JobState]
    problem: str | None
    """Why the controller did not answer, in its words; None if it did."""


def job_states(jobs: Sequence[str]) -> dict[str, JobState]:
    """``job_state`` of any number of jobs, with what is known of those that wait: one squeue for all, and one sacct
    for those that squeue does not list.
    """
    return dict(list_jobs(jobs, ended={}).states)


def list_jobs(jobs: Sequence[str], *, ended: Mapping[str, JobState]) -> Listing:
    """As ``job_states``, and whether the controller answered.

    Args:
        ended: what is known of jobs that have ended: of those accounting is not asked again.
    """
    if not jobs:
        return Listing({}, None)
    named = f"--jobs={','.join(jobs)}"
    answer = ask("squeue", "--noheader", named, "--states=all", "--format=%i|%T|%r|%S")
    rows = (line.split("|") for line in answer.out.splitlines()) if answer.ok else ()
    states = {
        job: JobState(state, reason, parse_time(start)) if state == "PENDING" else JobState(state)
        for job, state, reason, start in (row for row in rows if len(row) == 4)
    }
    forgotten = has_forgotten(answer)
    problem = None if forgotten else answer.problem
    missing = [job for job in jobs if job not in states and job not in ended]
    if not missing:
        return Listing({**{job: ended[job] for job in jobs if job in ended}, **states}, problem)
    named = f"--jobs={','.join(missing)}"
    accounting = ask("sacct", "--allocations", "--noheader", "--parsable2", named, "--format=JobID,State").out
    ends = {job: parse_state(state) for job, _, state in (line.partition("|") for line in accounting.splitlines())}
    unlisted = {
        job: ended[job] if job in ended else JobState(unlisted_state(ends.get(job), forgotten=forgotten))
        for job in jobs
    }
    return Listing(unlisted | states, problem)


def has_forgotten(answer: Answer) -> bool:
    """Whether squeue's answer means that the controller knows nothing of the jobs that it does not list."""
    return answer.ok or "invalid job id" in answer.problem.lower()


def unlisted_state(accounted: str | None, *, forgotten: bool) -> str:
    """State of a job that squeue does not list, by what accounting says of it."""
    if accounted in END_STATES:
        return accounted
    return GONE if forgotten else UNKNOWN  # a job that only accounting calls alive was lost by the controller


def parse_state(text: str) -> str | None:
    """The first state in a listing of one job; None if it is empty. ``CANCELLED by 1000`` is CANCELLED."""
    words = text.split()
    return words[0].rstrip("+").upper() if words else None


def requeue(job: str) -> str | None:
    """Have Slurm run the job again after its hold-off; None if it will, else why not.

    Never for a job that a user cancelled: Slurm would bring that one back, too.
    """
    problem = None
    for tries in range(REQUEUE_TRIES):
        if tries:
            time.sleep(SECONDS_BETWEEN_REQUEUE_TRIES)
        answer = ask("scontrol", "requeue", job)
        if answer.ok:
            return None
        problem = answer.problem
    return problem


class Ending(StrEnum):
    """Why Slurm ends a job, as far as it says so while the job's tasks still run."""

    CANCELLED = "cancelled"
    """By scancel: final."""
    REQUEUE = "requeue"
    """Preempted, or requeued by an administrator: Slurm runs the job again by itself."""
    PREEMPTED = "preempted"
    """Where preempted jobs are cancelled: Slurm does not run it again, but a successor may go on."""
    TIME_LIMIT = "time limit"
    NONE = "none"
    """It runs on: whoever sent SIGTERM meant a warning. A preempted job is told so when its time of grace begins."""
    UNKNOWN = "unknown"
    """Nobody could be asked."""


def job_facts(job: str) -> dict[str, str]:
    """Fields of ``scontrol show job``; empty if it does not answer. A value with blanks is cut at the first."""
    answer = ask("scontrol", "--oneliner", "show", "job", job)
    pairs = (word.partition("=") for word in answer.out.split()) if answer.ok else ()
    return {name: value for name, _, value in pairs}


def flags_of(facts: Mapping[str, str]) -> dict[str, str | bool]:
    """sbatch's flags, by long name, with which another job gets what the one with these fields has."""
    flags: dict[str, str | bool] = {}
    for flag, name in FIELD_OF_FLAG.items():
        value = facts.get(name, "")
        if value and value not in ("(null)", "N/A"):
            flags[flag] = value
    gres = re.match(r"gres[:/](.+)", str(flags.pop("gres", "")))
    if gres:
        flags["gres"] = gres.group(1).replace(",gres/", ",").replace(",gres:", ",")
    for field, flag in GPU_FLAG_OF_FIELD.items():
        gpus = re.match(r"gres[:/]gpu[:=](.+)", facts.get(field, ""))
        if gpus:
            flags[flag] = gpus.group(1)
    if facts.get("OverSubscribe") == "NO":
        flags["exclusive"] = True
    return flags


def why_ending(facts: Mapping[str, str], *, restarts: int) -> Ending:
    """Read the reason from a job's fields, as a task of its start number ``restarts`` sees them after SIGTERM.

    A job on its way to be requeued already counts one restart more; a cancelled one has an end, whether a user or a
    preemption cancelled it: only then has it been preempted since it started. No time is compared with this machine's.
    """
    if not facts:
        return Ending.UNKNOWN
    if facts.get("Reason") == "TimeLimit":
        return Ending.TIME_LIMIT
    end = parse_time(facts.get("EndTime", ""))
    if int(facts.get("Restarts", "0")) > restarts or (end is None and facts.get("JobState") != "RUNNING"):
        return Ending.REQUEUE
    if facts.get("JobState") in ("CANCELLED", "COMPLETING", "PREEMPTED") and end is not None:
        preempted = parse_time(facts.get("PreemptTime", ""))
        since = parse_time(facts.get("StartTime", ""))
        return Ending.PREEMPTED if preempted and preempted >= (since or 0.0) else Ending.CANCELLED
    return Ending.NONE


def end_time(job: str) -> float | None:
    """When the job's time is up, seconds since the epoch; None if nobody can say."""
    return parse_time(job_facts(job).get("EndTime", ""))


def parse_time(text: str) -> float | None:
    """Slurm's local time, 2026-11-21T09:18:23, as seconds since the epoch; None for Unknown or nonsense."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def submit(script: Path, *flags: str) -> Answer:
    """sbatch, as if from outside any job; ``out`` is the new job's id."""
    answer = ask("sbatch", "--parsable", *flags, str(script), environment=outside_any_job(os.environ))
    return Answer(answer.ok, answer.out.strip().partition(";")[0], answer.problem)


def submit_patiently(script: Path, *flags: str) -> Answer:
    """As ``submit``; a controller that is away, or a limit of jobs, is asked again and again."""
    answer = submit(script, *flags)
    for _ in range(1, REQUEUE_TRIES):
        if answer.ok:
            break
        time.sleep(SECONDS_BETWEEN_REQUEUE_TRIES)
        answer = submit(script, *flags)
    return answer


def describe(job: str, comment: str) -> str | None:
    """Set the job's comment; None if it worked, else why not."""
    answer = ask("scontrol", "update", f"jobid={job}", f"comment={comment}")
    return None if answer.ok else answer.problem


def cancel(job: str) -> str | None:
    """scancel; None if it worked, else why not."""
    answer = ask("scancel", job)
    return None if answer.ok else answer.problem


def depend(job: str, others: Sequence[str]) -> str | None:
    """Have a job that waits wait for the end of all of these, however they end; None if it worked, else why not."""
    answer = ask("scontrol", "update", f"jobid={job}", f"dependency=afterany:{':'.join(others)}")
    return None if answer.ok else answer.problem


def kill(job: str) -> str | None:
    """End the job's tasks at once; None if it worked, else why not. A scancel alone leaves them KillWait seconds.

    The job is cancelled, too, before its script can end by itself: its state says that a user did it.
    """
    ask("scancel", "--signal=KILL", f"{job}.0")  # fails where no task runs yet
    return cancel(job)


def kill_wait() -> float | None:
    """Seconds between the SIGTERM of a scancel and its SIGKILL; None if nobody can say."""
    found = re.search(r"^KillWait\s*=\s*(\d+) sec", ask("scontrol", "show", "config").out, re.MULTILINE)
    return float(found.group(1)) if found else None


def warn(job: str) -> str | None:
    """Send the job's tasks the signal that Slurm sends before the time limit; None if it worked, else why not."""
    answer = ask("scancel", "--signal=USR2", job)
    return None if answer.ok else answer.problem


def start_now(job: str, *, held: bool) -> str | None:
    """Lift the hold-off of a job that waits, and its user's hold; None if it worked, else why not. Slurm then starts it
    after two seconds, when there is room.
    """
    for command in ([("release", job)] if held else []) + [("update", f"jobid={job}", f"StartTime={SOON}")]:
        answer = ask("scontrol", *command)
        if not answer.ok:
            return answer.problem
    return None


def find_job(name: str, comment: str) -> str | None:
    """Id of this user's newest job with that name and comment that waits, runs or ended lately; None: there is none.

    Raises:
        Unanswered: Slurm does not say.
    """
    answer = ask("squeue", "--noheader", "--me", "--states=all", f"--name={name}", "--format=%i|%k")
    if not answer.ok:
        raise Unanswered(
            "Slurm must say whether the job that was handed to it is queued",
            found=answer.problem,
            remedy="It may be, and will then run; give the same command again where Slurm answers: it finds the job",
        )
    found = [line.partition("|") for line in answer.out.splitlines()]
    ids = [job for job, _, said in found if said.strip() == comment]
    return max(ids, key=int, default=None)


def refusal(text: str) -> str:
    """What sbatch said when it refused, as one line."""
    lines = (line.strip().removeprefix("sbatch: ").removeprefix("error: ") for line in text.splitlines())
    return "; ".join(line for line in lines if line) or "no reason given"
