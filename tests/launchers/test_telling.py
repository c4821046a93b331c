"""What the head node's agent tells people: ends that rank 0 could not tell of, give-ups, ends of chains."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from encdec.files import RunPaths
from encdec.records import Outcome, read_json_lines
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import resolve_run
from launchers.nodes.telling import chain_messages, end_messages, tell_end
from tests.conftest import MICRO, Lab, ranks_of, wait_until
from tests.encdec.training.inbox_lab import SECRET, VARIABLE, Inbox, an_inbox

CRASH = Outcome(cause="crash", exit_code=1, step=7, checkpoint=None, message="rank 1 ended by SIGKILL")
STOPPED = replace(CRASH, cause="signalled", exit_code=75, message="stopped by SIGUSR2")
BAD_NODE = replace(CRASH, cause="bad_node", exit_code=75, bad_node="n3")
REFUSED = replace(CRASH, cause="refused", exit_code=78, message="no GPU")


@pytest.fixture
def inbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inbox]:
    yield from an_inbox(monkeypatch)


def decided(move: str, **facts: Any) -> dict[str, Any]:
    return {"event": "next", "move": move, "ending": "none", "given_up": None, "bad_node": None, **facts}


CASES = {
    "crash here": (CRASH, None, False, "full-1: crashed", "SIGKILL; nothing continues it by itself"),
    "crash on Slurm": (CRASH, decided("stop"), False, "full-1: crashed", "nothing continues it by itself"),
    "bad node": (
        BAD_NODE, decided("elsewhere"), False, "full-1: crashed again and again on one node",
        "a successor goes on without n3",
    ),
    "crash while time ran out": (
        CRASH, decided("leave"), False, "full-1: crashed", "Slurm starts it again, or a successor that waits",
    ),
    "given up": (
        STOPPED, decided("stop", given_up="100 attempts"), True, "full-1: given up after 100 attempts",
        "step 7: stopped by SIGUSR2; nothing continues it by itself any more",
    ),
    "refused": (REFUSED, None, False, "full-1: refused", "no GPU"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_end_that_rank_0_could_not_tell(case: str):
    outcome, then, told, title, words = CASES[case]
    [message] = end_messages("full-1", 3, outcome, then, told_by_rank=told)
    assert (message.title, message.tone) == (title, "failure")
    assert words in message.body and message.body.startswith("attempt 3, step 7: ")


def test_what_rank_0_has_told_is_not_told_again():
    for outcome in (STOPPED, replace(STOPPED, cause="complete"), replace(STOPPED, cause="gate")):
        assert end_messages("full-1", 3, outcome, decided("again"), told_by_rank=True) == []


def test_a_run_alone_has_no_chain(tmp_path: Path):
    assert chain_messages(RunPaths(tmp_path), CRASH, None) == []


def test_nothing_that_goes_wrong_reaches_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv(VARIABLE, SECRET)
    paths = RunPaths(tmp_path)
    ledger = paths.attempt(0).events("node-0")
    ledger.mkdir(parents=True)  # damaged: no file
    told, untold = (
        resolve_run(TrainingPhase("full"), config_file=MICRO, settings=settings)
        for settings in ([f"infra.notify_env={VARIABLE}"], [])
    )
    tell_end(paths, untold, 0, CRASH, hurried=True)
    assert capsys.readouterr().err == ""  # nor is it read
    tell_end(paths, told, 0, CRASH, hurried=True)
    assert "nobody is told" in capsys.readouterr().err
    ledger.rmdir()
    ledger.write_bytes(b"[" * 100_000)  # which Python's parser answers with a RecursionError
    tell_end(paths, told, 0, CRASH, hurried=True)
    error = capsys.readouterr().err
    assert "nobody is told" in error and SECRET not in error


# ---- real runs


def test_a_chain_that_ends_at_a_gate_and_one_that_is_whole(lab: Lab, inbox: Inbox):
    def submit(name: str, *extra: str) -> int:
        short = ["phases.sanity_check", "phases.validation"]
        steps = [word for phase in short for word in ("--set", f"{phase}.num_train_steps=6")]
        lax = [word for phase in short for word in ("--set", f"{phase}.min_loss_decrease=-9")]
        code, _ = lab.run(
            "launchers.submit", "--phase", "sanity_check", "--through", "validation", "--cluster", "local",
            "--run-dir", str(lab.root / name),
            *lab.arguments(*steps, *lax, "--set", f"infra.notify_env={VARIABLE}", *extra),
        )  # fmt: skip
        return code

    assert submit("closed", "--set", "phases.sanity_check.min_loss_decrease=50") == 3
    wait_until(lambda: len(inbox.posts) >= 2, "both messages are there")
    name, rest = inbox.titles[0].split(": ")
    assert rest == "a gate is closed" and name.startswith("sanity_check")
    assert inbox.titles[1:] == ["closed: the chain ends before validation"]
    assert "gate not passed" in inbox.posts[1]["message"]
    inbox.posts.clear()
    assert submit("whole") == 0
    wait_until(lambda: len(inbox.posts) >= 3, "all messages are there")
    assert [title.partition(": ")[2] for title in inbox.titles] == ["complete", "complete", "the chain is complete"]
    assert inbox.posts[2]["message"] == "sanity_check, validation have passed their gates"
    assert inbox.posts[2]["type"] == "success"


def test_a_run_whose_ranks_are_killed_again_and_again_is_told_of(lab: Lab, inbox: Inbox):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root, "--set", f"infra.notify_env={VARIABLE}")
    for restart in range(5):
        log = paths.attempt(0).rank_logs(0) / f"rank-1.restart-{restart}.err"
        wait_until(lambda log=log: log.exists() or process.poll() is not None, f"start {restart} of the ranks")
        if process.poll() is not None:
            break
        wait_until(lambda: len(ranks_of(paths)) >= 2 or process.poll() is not None, "ranks run")
        for rank in ranks_of(paths):
            rank.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    wait_until(lambda: inbox.posts, "the message is there")  # the command ends with the outcome, before it is told
    assert inbox.titles[-1].endswith(": crashed")
    assert "SIGKILL" in inbox.posts[-1]["message"] and "nothing continues it" in inbox.posts[-1]["message"]
    assert SECRET not in output
    written = [path for path in paths.root.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_nothing_is_sent_unless_asked_for(lab: Lab, inbox: Inbox):
    few = ("--set", "phases.sanity_check.num_train_steps=4", "--set", "phases.sanity_check.min_loss_decrease=50")
    code, output = lab.submit(lab.root / "run", *few)
    assert code == 3, output
    ledger = RunPaths(lab.root / "run").attempt(0).events("node-0")
    wait_until(lambda: "ended" in [record["event"] for record in read_json_lines(ledger)], "the agent is done")
    assert inbox.posts == []
