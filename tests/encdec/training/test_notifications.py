"""Notifications through apprise to a real HTTP server: what is sent, what is never said, what never waits."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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

VARIABLE = "TEST_NOTIFY_URLS"
SECRET = "s3cr3t-token"
A_MESSAGE = Message("run: loss_spike", "attempt 0, step 7: loss 9 is above 8", "warning")


class Inbox:
    """An HTTP server that keeps what is posted, answers with ``status``, and waits for ``gate`` before it does."""

    def __init__(self) -> None:
        self.posts: list[dict[str, Any]] = []
        self.status, self.gate = 200, threading.Event()
        self.gate.set()
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                inbox.posts.append({**body, "path": self.path})
                inbox.gate.wait(60)
                self.send_response(inbox.status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Not on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"json://user:{SECRET}@127.0.0.1:{self.server.server_port}/{SECRET}"

    @property
    def titles(self) -> list[str]:
        return [post["title"] for post in self.posts]


@pytest.fixture
def inbox(monkeypatch) -> Iterator[Inbox]:
    inbox = Inbox()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(VARIABLE, inbox.url)
    yield inbox
    inbox.gate.set()
    inbox.server.shutdown()
    inbox.server.server_close()


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
