"""What the head node's agent tells people, where the configuration says how: what rank 0 could not tell any more, and
what follows from it. Nothing waits for it, and nothing depends on it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from encdec.errors import EncdecError
from encdec.files import RunPaths
from encdec.records import Outcome, read_json_lines
from encdec.redaction import redact
from encdec.training.notifications import Message, Sender, open_addresses, wants_notifications
from encdec.training.run_config import RunConfig
from launchers.chain_file import chain_of, later_phases, runs_of
from launchers.nodes.outcomes import Move
from launchers.run_status import read_status

SECONDS_TO_DRAIN = 5.0
SECONDS_TO_DRAIN_HURRIED = 1.0
"""Where a signal has asked to end."""
WORDS: Mapping[str, str] = {"gate": "a gate is closed", "bad_node": "crashed again and again on one node"}
"""Outcome.cause -> how it is told."""
FOLLOWS: Mapping[str, str] = {
    Move.STOP: "nothing continues it by itself",
    Move.AGAIN: "another start continues it",
    Move.ELSEWHERE: "a successor goes on without {node}",
    Move.LEAVE: "Slurm starts it again, or a successor that waits already goes on",
}
"""What follows an end -> how it is told."""


def tell_end(paths: RunPaths, run: RunConfig, attempt: int, outcome: Outcome, *, hurried: bool) -> None:
    """Tell how an attempt ended, once all that follows is settled.

    Args:
        hurried: whether something has asked it to end.
    """

    def messages() -> list[Message]:
        ledger = read_json_lines(paths.attempt(attempt).events("node-0"))
        decided = next((record for record in reversed(list(ledger)) if record.get("event") == "next"), None)
        told_by_rank = paths.attempt(attempt).result.is_file()
        of_the_end = end_messages(run.name, attempt, outcome, decided, told_by_rank=told_by_rank)
        return [*of_the_end, *chain_messages(paths, outcome, decided)]

    _tell(run, messages, hurried=hurried)


def tell_declined(run: RunConfig, reason: str) -> None:
    """Tell that a start of the job runs no attempt, although the run is not complete."""
    _tell(run, lambda: [Message(f"{run.name}: not started", reason, "failure")], hurried=False)


def end_messages(
    name: str, attempt: int, outcome: Outcome, decided: Mapping[str, Any] | None, *, told_by_rank: bool
) -> list[Message]:
    """Pure.

    Args:
        decided: the ledger's entry on what follows; None outside Slurm.
        told_by_rank: whether rank 0 lived to tell how it ended.
    """
    given_up = decided.get("given_up") if decided else None
    if given_up:
        body = f"attempt {attempt}, step {outcome.step}: {outcome.message}; nothing continues it by itself any more"
        return [Message(f"{name}: given up after {given_up}", body, "failure")]
    if told_by_rank:
        return []
    move = decided.get("move") if decided else Move.STOP
    follows = FOLLOWS.get(str(move), FOLLOWS[Move.STOP]).format(node=outcome.bad_node)
    what = WORDS.get(outcome.cause, "crashed" if outcome.cause == "crash" else outcome.cause)
    body = f"attempt {attempt}, step {outcome.step}: {outcome.message}; {follows}"
    return [Message(f"{name}: {what}", body, "failure")]


def chain_messages(paths: RunPaths, outcome: Outcome, decided: Mapping[str, Any] | None) -> list[Message]:
    """That a chain has come to its end: through its last phase, or before.

    Raises:
        RunDirectoryError: a damaged file.
    """
    root = chain_of(paths)
    if root is None:
        return []
    later = list(later_phases(paths))
    if outcome.cause == "complete":
        phases = runs_of(root)
        whole = not later and all(read_status(phase).complete for phase in phases.values())
        body = f"{', '.join(phases)} have passed their gates"
        return [Message(f"{root.name}: the chain is complete", body, "success")] if whole else []
    over = decided is None or decided.get("move") == Move.STOP
    if not (later and over):
        return []
    body = f"{paths.root.name} ended first: {outcome.message}"
    return [Message(f"{root.name}: the chain ends before {', '.join(later)}", body, "failure")]


def _tell(run: RunConfig, messages: Callable[[], list[Message]], *, hurried: bool) -> None:
    """Send what ``messages`` makes, if anything is to be sent at all; raises nothing."""
    infra = run.config.infra
    if not wants_notifications(infra.notify_env, infra.notify_file):
        return
    try:
        due = messages()
        if not due:
            return
        sender = Sender(open_addresses(infra.notify_env, infra.notify_file))
        for message in due:
            sender.send(message._replace(body=redact(message.body)))
        sender.close(SECONDS_TO_DRAIN_HURRIED if hurried else SECONDS_TO_DRAIN)
    # whatever it is: other nodes wait for this one, whose exit code is the attempt's
    except Exception as error:
        # the text of what is not ours may hold an address
        text = str(error) if isinstance(error, EncdecError | OSError) else type(error).__name__
        with contextlib.suppress(OSError, ValueError):  # a closed stderr
            print(f"error: nobody is told: {text}", file=sys.stderr, flush=True)
