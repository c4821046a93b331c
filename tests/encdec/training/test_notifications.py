"""Notifications through apprise to a real HTTP server: what is sent, what is never said, what never waits."""

from __future__ import annotations

import importlib.util
import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from encdec.errors import ConfigError, MissingPrerequisite, TrainingDiverged
from encdec.files import RunPaths
from encdec.training.alerts import Notifier, ending_of
from encdec.training.config import FullConfig
from encdec.training.notifications import Address, Message, Sender, open_addresses, require_notifications
from encdec.training.run_config import resolve_run
from encdec.training.sharding import require_ranks
from launchers.cluster import require_devices
from tests.conftest import MICRO, Lab, wait_until
from tests.encdec.training.inbox_lab import SECRET, VARIABLE, Inbox, an_inbox

A_MESSAGE = Message("run: loss_spike", "attempt 0, step 7: loss 9 is above 8", "warning")


@pytest.fixture
def inbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inbox]:
    yield from an_inbox(monkeypatch)


# ---- through the library, over HTTP


def test_a_message_arrives_with_title_body_and_tone(inbox: Inbox):
    sender = Sender(open_addresses(VARIABLE))
    sender.send(A_MESSAGE)
    sender.close(30)
    [post] = inbox.posts
    assert (post["title"], post["message"], post["type"]) == A_MESSAGE
    assert post["path"] == f"/{SECRET}"


def test_every_address_gets_it_though_another_fails(inbox: Inbox, monkeypatch, caplog):
    monkeypatch.setenv(VARIABLE, f"json://127.0.0.1:1/{SECRET} {inbox.url}")  # nobody listens on port 1
    caplog.set_level(logging.DEBUG)
    sender = Sender(open_addresses(VARIABLE))
    for _ in range(3):
        sender.send(A_MESSAGE)
    sender.close(30)
    assert len(inbox.posts) == 3
    warnings = [r.message for r in caplog.records if r.name == "encdec.train"]
    assert warnings == ["a notification by json was not sent: it was not taken; said once"]
    assert not [r for r in caplog.records if r.name == "apprise"]


def test_a_refusing_server_is_one_warning(inbox: Inbox, caplog):
    inbox.status = 500
    sender = Sender(open_addresses(VARIABLE))
    sender.send(A_MESSAGE)
    sender.send(A_MESSAGE)
    sender.close(30)
    assert len(inbox.posts) == 2
    assert [r.levelname for r in caplog.records if "was not sent" in r.message] == ["WARNING"]


def test_a_hanging_server_stalls_nobody(inbox: Inbox, caplog):
    inbox.gate.clear()
    sender = Sender(open_addresses(VARIABLE), seconds_to_send=0.2)
    for _ in range(1000):  # far more than may wait
        sender.send(A_MESSAGE)
    sender.close(0.5)
    assert "no answer within 0.2 s" in caplog.text
    assert "a notification is dropped: 32 wait already" in caplog.text
    assert "not all notifications were sent" in caplog.text


def test_an_address_that_nobody_understands_is_refused_unseen(monkeypatch, inbox: Inbox, caplog, capfd):
    monkeypatch.setenv(VARIABLE, f"{inbox.url} nonsense://{SECRET}")
    with pytest.raises(MissingPrerequisite, match="number 2 of 2") as refusal:
        open_addresses(VARIABLE)
    assert SECRET not in str(refusal.value) + caplog.text + "".join(capfd.readouterr())


# ---- from a private file


def private_file(folder: Path, text: str, mode: int = 0o600) -> str:
    file = folder / "addresses"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


def test_addresses_of_a_private_file_get_messages_too(inbox: Inbox, tmp_path: Path):
    file = private_file(tmp_path, f"# the team's\n{inbox.url}\n  # and mine\n{inbox.url}\n")
    for variable, times in ((None, 2), (VARIABLE, 3)):
        inbox.posts.clear()
        sender = Sender(open_addresses(variable, file))
        sender.send(A_MESSAGE)
        sender.close(30)
        assert len(inbox.posts) == times


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_file_that_others_may_use_is_refused_unread(inbox: Inbox, tmp_path: Path, mode: int):
    file = private_file(tmp_path, inbox.url, mode)
    with pytest.raises(MissingPrerequisite, match=r"only you can read.*chmod 600 .*replace what it holds") as refusal:
        require_notifications(None, file)
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize(("text", "found"), [("", "none"), ("# json://x\n", "none"), (None, "No such file")])
def test_a_file_without_addresses_is_said_before_training(tmp_path: Path, text: str | None, found: str):
    file = str(tmp_path / "nowhere") if text is None else private_file(tmp_path, text)
    with pytest.raises(MissingPrerequisite, match=found):
        require_notifications(None, file)


def test_an_address_of_a_file_that_nobody_understands_is_refused_unseen(tmp_path: Path, capfd):
    file = private_file(tmp_path, f"nonsense://{SECRET}")
    with pytest.raises(MissingPrerequisite, match="number 1 of 1") as refusal:
        open_addresses(None, file)
    assert SECRET not in str(refusal.value) + "".join(capfd.readouterr())


# ---- without the library


def test_an_error_of_an_address_is_told_by_its_kind_alone(caplog):
    def fail(message: Message) -> bool:
        raise ConnectionError(f"https://example.invalid/{SECRET}")

    sender = Sender([Address("slack", fail)])
    sender.send(A_MESSAGE)
    sender.close(30)
    assert "a notification by slack was not sent: ConnectionError; said once" in caplog.text
    assert SECRET not in caplog.text


def test_an_address_that_never_answers_keeps_no_other_waiting(caplog):
    kept, never = Kept(), threading.Event()
    sender = Sender([Address("stuck", lambda message: never.wait()), Address("test", kept)], seconds_to_send=0.05)
    for _ in range(3):
        sender.send(A_MESSAGE)
    sender.close(30)
    assert kept.messages == [A_MESSAGE] * 3
    assert caplog.text.count("a notification by stuck was not sent: no answer within 0.05 s") == 1


def test_missing_library_is_said_before_training(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "apprise" else find(name))
    monkeypatch.setenv(VARIABLE, f"json://127.0.0.1/{SECRET}")
    with pytest.raises(MissingPrerequisite, match=r"needs apprise.*pip install") as refusal:
        require_notifications(VARIABLE)
    assert SECRET not in str(refusal.value)
    require_notifications(None)  # off: nothing is needed


def test_it_is_said_where_training_starts_and_where_it_is_submitted_from(monkeypatch):
    for name in (VARIABLE, "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    settings = ["infra.num_gpus=1", f"infra.notify_env={VARIABLE}"]
    run = resolve_run(None, config_file=MICRO, settings=settings)
    for refuses in (lambda: require_ranks(run.config.infra), lambda: require_devices(run)):
        with pytest.raises(MissingPrerequisite, match=VARIABLE):
            refuses()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    require_ranks(run.config.infra)  # only the first rank tells people


@pytest.mark.parametrize("value", [None, "", "  "])
def test_missing_variable_is_said_before_training(monkeypatch, value):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(MissingPrerequisite, match=f"{VARIABLE}, which infra.notify_env names, must hold addresses"):
        require_notifications(VARIABLE)


def test_an_address_in_the_place_of_the_name_is_refused_unseen():
    with pytest.raises(ConfigError, match=r"infra\.notify_env") as refusal:
        FullConfig.from_mapping({"infra": {"notify_env": f"slack://{SECRET}"}}, source="test")
    assert SECRET not in str(refusal.value)


# ---- what is told to people


class Kept:
    """A sender's place: keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def __call__(self, message: Message) -> bool:
        self.messages.append(message)
        return True


def told(*acts: Any) -> list[Message]:
    kept = Kept()
    notifier = Notifier("full-1", 3, Sender([Address("test", kept)]))
    for act in acts:
        act(notifier)
    notifier.close()
    return kept.messages


ENDINGS = [
    ({"cause": "complete", "step": 9, "message": "all 9 steps done"}, "full-1: complete", "success"),
    ({"cause": "gate", "step": 9, "message": "loss 9, must be <= 4"}, "full-1: a gate is closed", "failure"),
    ({"cause": "signalled", "step": 9, "message": "stopped by SIGUSR2"}, "full-1: signalled", "info"),
    (ending_of(TrainingDiverged("No NaN", remedy="Mend it"), 9), "full-1: diverged", "failure"),
    (ending_of(OSError(28, "No space left on device"), 9), "full-1: crash", "failure"),
]


@pytest.mark.parametrize(("ending", "title", "tone"), ENDINGS)
def test_the_end_of_an_attempt_is_told(ending, title: str, tone: str):
    [message] = told(lambda notifier: notifier.on_end(ending))
    assert (message.title, message.tone) == (title, tone)
    assert message.body == f"attempt 3, step 9: {ending['message']}"


def alert(kind: str, step: int) -> dict[str, Any]:
    return {"type": kind, "step": step, "value": math.nan, "threshold": 1.0, "message": "m"}


def test_alerts_are_told_seldom_and_each_type_for_itself():
    acts = [
        lambda notifier, step=step, kind=kind: notifier.on_alert(alert(kind, step))
        for step in range(50)
        for kind in ("nan", "loss_spike")
    ]
    messages = told(*acts, lambda notifier: notifier.on_save_failed(7, "No space left on device", "step-3"))
    assert [(m.title, m.tone) for m in messages] == [
        ("full-1: nan", "failure"), ("full-1: loss_spike", "warning"), ("full-1: save_failed", "warning"),
    ]  # fmt: skip
    assert messages[0].body == "attempt 3, step 0: m"


# ---- a real run


def test_a_real_run_tells_of_its_alerts_and_its_closed_gate_and_keeps_the_secret(lab: Lab, inbox: Inbox):
    arguments = lab.arguments(
        "--phase", "sanity_check", "--set", "infra.num_gpus=1", "--set", "phases.sanity_check.num_train_steps=10",
        "--set", "phases.sanity_check.min_loss_decrease=50", "--set", "training.monitor_grad_norm=1e-6",
        "--set", f"infra.notify_env={VARIABLE}", "--set", 'training.report_to=["tensorboard"]',
        "--output_dir", str(lab.root / "run"),
    )  # fmt: skip
    code, output = lab.run("encdec.train", *arguments)
    assert code == 3, output
    wait_until(lambda: len(inbox.posts) >= 2, "both messages are there")
    name = inbox.titles[0].partition(":")[0]
    assert inbox.titles == [f"{name}: grad_explosion", f"{name}: a gate is closed"]
    assert "loss_decrease" in inbox.posts[1]["message"]
    assert SECRET not in output
    written = [path for path in RunPaths(lab.root / "run").root.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
