"""Messages to people through apprise: addresses from the environment, sent beside training, never waited for.

Addresses hold secrets (tokens, passwords). They are read from a variable, kept in memory, and told to nobody: apprise
is muted, and of what goes wrong only the address's kind and the kind of error are said.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from encdec.errors import MissingPrerequisite

log = logging.getLogger("encdec.train")
INSTALL_APPRISE = 'python -m pip install "apprise>=1.9"'
Tone = Literal["info", "success", "warning", "failure"]
DEPTH = 32
"""Messages that may wait; further ones are dropped."""
SECONDS_TO_SEND = 15.0
"""After which an address that does not answer is left alone."""


class Message(NamedTuple):
    """What a person reads."""

    title: str
    body: str
    tone: Tone


class Address(NamedTuple):
    """Where messages go."""

    kind: str
    """Its scheme: mailto, slack, json ..."""
    send: Callable[[Message], bool]
    """Sends one message; whether it was taken."""


def require_notifications(variable: str | None) -> None:
    """Look for the library and the addresses, importing and showing neither.

    Args:
        variable: name of the environment variable; None: no notifications.

    Raises:
        MissingPrerequisite: apprise is not installed, or the variable is not set.
    """
    if variable is None:
        return
    if importlib.util.find_spec("apprise") is None:
        raise MissingPrerequisite(
            f"infra.notify_env={variable} needs apprise",
            found=f"none in {sys.prefix}",
            remedy=f"Install it: {INSTALL_APPRISE}; or leave infra.notify_env out",
        )
    if not os.environ.get(variable, "").split():
        raise MissingPrerequisite(
            f"The environment variable {variable}, which infra.notify_env names, must hold addresses",
            found="none",
            remedy=f"export {variable}='mailto://... slack://...' (https://github.com/caronc/apprise lists the kinds), "
            "or leave infra.notify_env out",
        )


def open_addresses(variable: str) -> list[Address]:
    """The addresses that the environment variable holds, separated by spaces.

    Raises:
        MissingPrerequisite: apprise is not installed or does not understand an address, or the variable is not set.
    """
    require_notifications(variable)
    import apprise

    # it names hosts, and addresses that it does not understand, in its log
    apprise.logger.setLevel(logging.CRITICAL + 1)
    apprise.logger.propagate = False
    addresses = []
    urls = os.environ[variable].split()
    for number, url in enumerate(urls, 1):
        service = apprise.Apprise(asset=apprise.AppriseAsset(async_mode=False, storage_mode="memory"))
        if not service.add(url):
            raise MissingPrerequisite(
                f"apprise must understand every address in the environment variable {variable}",
                found=f"that it does not understand number {number} of {len(urls)}",
                remedy="Correct it (the command apprise --dry-run says why); addresses are separated by spaces",
            )
        addresses.append(Address(url.partition("://")[0], _sending(service)))
    return addresses


def _sending(service: object) -> Callable[[Message], bool]:
    def send(message: Message) -> bool:
        return bool(service.notify(title=message.title, body=message.body, notify_type=message.tone))  # type: ignore[attr-defined]

    return send


class Sender:
    """Sends messages one after another from a thread of its own; who calls ``send`` never waits.

    Whatever goes wrong is a warning, once an address. A call that hangs is given up after ``seconds_to_send``.

    Args:
        addresses: each gets every message.
        depth: messages that may wait.
        seconds_to_send: given to one message at one address.
    """

    def __init__(
        self, addresses: Sequence[Address], *, depth: int = DEPTH, seconds_to_send: float = SECONDS_TO_SEND
    ) -> None:
        self._addresses, self._seconds = list(addresses), seconds_to_send
        self._waiting: queue.Queue[Message | None] = queue.Queue(depth)
        self._thread: threading.Thread | None = None
        self._warned: set[int] = set()
        self._dropped = 0

    def send(self, message: Message) -> None:
        """Have ``message`` sent; returns at once. Where too many wait already, it is dropped."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="notifications", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(message)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                log.warning("a notification is dropped: %d wait already", self._waiting.maxsize)

    def close(self, seconds: float) -> None:
        """Wait at most ``seconds`` for what has not been sent yet, and leave the rest."""
        if self._thread is None:
            return
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Full):  # then the thread is stuck, as is said below
            self._waiting.put(None, timeout=seconds)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("not all notifications were sent within %.0f s: the rest is left out", seconds)
        self._thread = None

    def _work(self) -> None:
        while message := self._waiting.get():
            for number, address in enumerate(self._addresses):
                problem = self._deliver(address, message)
                if problem and number not in self._warned:
                    self._warned.add(number)
                    log.warning("a notification by %s was not sent: %s; said once", address.kind, problem)

    def _deliver(self, address: Address, message: Message) -> str:
        """What went wrong; empty where nothing did. The library's own time-outs do not cover all that can hang."""
        problems: list[str] = []

        def work() -> None:
            try:
                problems.append("" if address.send(message) else "it was not taken")
            except Exception as error:  # its text may hold the address
                problems.append(type(error).__name__)

        worker = threading.Thread(target=work, name="notification", daemon=True)
        worker.start()
        worker.join(self._seconds)
        return problems[0] if problems else f"no answer within {self._seconds:g} s"
