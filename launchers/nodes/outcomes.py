"""How an attempt ended and what that means. Pure: facts in, verdict out."""

from __future__ import annotations

from collections.abc import Iterable
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
    bad_node: str | None = None
    """The node that is to blame for the failures, if one is."""
    stop_signal: str | None = None
    """The last signal that this node's agent got, or DEADLINE."""


EXIT_CODE_OF_CAUSE = {
    "complete": ExitCode.COMPLETE,
    "gate": ExitCode.GATE_NOT_PASSED,
    "signalled": ExitCode.CONTINUE_ME,
    "stop_requested": ExitCode.CONTINUE_ME,
}
DEATHS_TO_BLAME_A_NODE = 3
"""Restarts in a row, of the last DEATHS_TO_BLAME_A_NODE + 1, that a rank of the same node must have begun by dying."""


FORWARDED_AS = "SIGUSR2"
"""The signal by which an agent tells its ranks of any other."""
DEADLINE = "the time limit"
"""In place of a signal's name."""
WARNINGS = ("SIGUSR2", DEADLINE)
"""What says that the time is running out, and nothing else."""


class Move(StrEnum):
    """What a start of a Slurm job is followed by."""

    STOP = "stop"
    """Nothing: the work is done, or a person must look."""
    AGAIN = "again"
    """Another start, of our doing."""
    ELSEWHERE = "elsewhere"
    """A successor that keeps away from a bad node."""
    LEAVE = "leave"
    """What Slurm does by itself; a successor that waits already decides when it starts."""


def next_move(outcome: Outcome, stop_signal: str | None, ending: Ending) -> Move:
    """Pure: how the attempt ended and why Slurm ends the job, if it does, -> what follows.

    Args:
        stop_signal: the last signal that this node's agent got; None where only another node was signalled.
        ending: what Slurm says after the save; SIGTERM alone means a scancel, a preemption and a requeue alike.
    """
    if outcome.cause == "bad_node":
        return Move.ELSEWHERE
    if outcome.cause == "crash" and stop_signal in WARNINGS:
        return Move.LEAVE  # the save may have been cut off by what the warning was about
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
        told = facts.result.to_json() | {"message": with_its_signal(facts.result.message, facts.stop_signal)}
        return Outcome(exit_code=code, restarts=facts.restarts, **told)
    reason = facts.failures[-1] if facts.failures else "the ranks ended without a result"
    blame = f"; each time a rank on {facts.bad_node} died first" if facts.bad_node else ""
    return Outcome(
        cause="bad_node" if facts.bad_node else "crash",
        exit_code=ExitCode.CONTINUE_ME if facts.bad_node else ExitCode.CRASHED,
        step=facts.last_step,
        checkpoint=None,
        message=f"{reason} (after {facts.restarts} restarts in place{blame})",
        restarts=facts.restarts,
        bad_node=facts.bad_node,
    )


def with_its_signal(message: str, stop_signal: str | None) -> str:
    """A rank's message, with the signal that reached its agent: whatever that was, ranks get FORWARDED_AS. Pure."""
    return message.replace(f"stopped by {FORWARDED_AS}", f"stopped by {stop_signal}") if stop_signal else message


def node_to_blame(deaths: Iterable[tuple[int, float, int]]) -> int | None:
    """The node on which a rank died first in DEATHS_TO_BLAME_A_NODE of the last failures of a group of ranks; None if
    no node stands out. A program that is at fault dies on one node now, on another then. Pure.

    Args:
        deaths: (restarts of the group before it, seconds since the epoch, node rank) of ranks that ended badly, on all
            nodes. Times alone would not do: a rank that lost its peer may be seen to end after the next restart began.
    """
    first: dict[int, tuple[float, int]] = {}
    for restarts, moment, node in deaths:
        first[restarts] = min(first.get(restarts, (moment, node)), (moment, node))
    last = [first[restarts][1] for restarts in sorted(first)][-(DEATHS_TO_BLAME_A_NODE + 1) :]
    return next((node for node in set(last) if last.count(node) >= DEATHS_TO_BLAME_A_NODE), None)
