"""How an attempt ended and what that means. Pure: facts in, verdict out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from encdec.errors import ExitCode
from encdec.records import Outcome, RankResult, Refusal
from launchers.slurm import Ending


@dataclass(frozen=True, kw_only=True)
class AttemptFacts:
    """What an agent knows when its ranks have ended."""

    result: RankResult | None
    """What rank 0 wrote, if all ranks ended well."""
    refusal: Refusal | None
    """What a rank that refused to run wrote."""
    failures: list[str] = field(default_factory=list)
    """One line a failed rank, in order of time."""
    restarts: int = 0
    last_step: int = 0


EXIT_CODE_OF_CAUSE = {
    "complete": ExitCode.COMPLETE,
    "gate": ExitCode.GATE_NOT_PASSED,
    "signalled": ExitCode.CONTINUE_ME,
    "stop_requested": ExitCode.CONTINUE_ME,
}


class Move(StrEnum):
    """What a start of a Slurm job is followed by."""

    STOP = "stop"
    """Nothing: the work is done, or a person must look."""
    AGAIN = "again"
    """Another start, of our doing."""
    LEAVE = "leave"
    """What Slurm does by itself; a successor that waits already decides when it starts."""


def next_move(outcome: Outcome, stop_signal: str | None, ending: Ending) -> Move:
    """Pure: how the attempt ended and why Slurm ends the job, if it does, -> what follows.

    Args:
        stop_signal: the last signal that this node's agent got; None where only another node was signalled.
        ending: what Slurm says after the save; SIGTERM alone means a scancel, a preemption and a requeue alike.
    """
    if outcome.cause != "signalled" or ending is Ending.CANCELLED or stop_signal == "SIGINT":
        return Move.STOP
    if ending in (Ending.REQUEUE, Ending.PREEMPTED):
        return Move.LEAVE
    if ending is Ending.UNKNOWN and stop_signal in ("SIGTERM", "SIGHUP"):
        return Move.LEAVE
    return Move.AGAIN


def judge(facts: AttemptFacts) -> Outcome:
    """The outcome of an attempt. A refusal goes before everything: it says why the ranks died."""
    if facts.refusal is not None:
        code = facts.refusal.exit_code
        return Outcome(
            cause="gate"
            if code == ExitCode.GATE_NOT_PASSED
            else "refused"
            if code == ExitCode.CONFIG_WRONG
            else "crash",
            exit_code=code,
            step=facts.last_step,
            checkpoint=None,
            message=facts.refusal.message,
            restarts=facts.restarts,
        )
    if facts.result is not None:
        code = EXIT_CODE_OF_CAUSE[facts.result.cause]
        return Outcome(exit_code=code, restarts=facts.restarts, **facts.result.to_json())
    reason = facts.failures[-1] if facts.failures else "the ranks ended without a result"
    return Outcome(
        cause="crash",
        exit_code=ExitCode.CRASHED,
        step=facts.last_step,
        checkpoint=None,
        message=f"{reason} (after {facts.restarts} restarts in place)",
        restarts=facts.restarts,
    )
