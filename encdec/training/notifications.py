"""Messages to people through apprise: addresses from the environment or a private file, sent beside training, never
waited for.

Addresses hold secrets (tokens, passwords). They are read from a variable or a file that only its user can read, kept in
memory, and told to nobody: apprise is muted, and of what goes wrong only the address's kind and the kind of error are
said.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import queue
import shlex
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
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


def wants_notifications(variable: str | None, file: str | None) -> bool:
    """Whether ``infra.notify_env`` or ``infra.notify_file`` asks for any."""
    return variable is not None or file is not None


def require_notifications(variable: str | None, file: str | None = None) -> None:
    """Look for the library and the addresses, importing and showing neither.

    Args:
        variable: name of the environment variable; None: there is none.
        file: path of the private file; None: there is none.

    Raises:
        MissingPrerequisite: apprise is not installed, the variable is not set, or the file is not as it should be.
    """
    if not wants_notifications(variable, file):
        return
    if importlib.util.find_spec("apprise") is None:
        asked = f"infra.notify_env={variable}" if variable else f"infra.notify_file={file}"
        raise MissingPrerequisite(
            f"{asked} needs apprise",
            found=f"none in {sys.prefix}",
            remedy=f"Install it: {INSTALL_APPRISE}; or leave {asked.partition('=')[0]} out",
        )
    read_addresses(variable, file)


def read_addresses(variable: str | None, file: str | None) -> list[str]:
    """The addresses of both places.

    Raises:
        MissingPrerequisite: a place that is named holds none, or others can read it.
    """
    return [*(_in_variable(variable) if variable else ()), *(_in_file(Path(file)) if file else ())]


def _in_variable(variable: str) -> list[str]:
    addresses = os.environ.get(variable, "").split()
    if not addresses:
        raise MissingPrerequisite(
            f"The environment variable {variable}, which infra.notify_env names, must hold addresses",
            found="none",
            remedy=f"export {variable}='mailto://... slack://...' (https://github.com/caronc/apprise lists the kinds), "
            "or leave infra.notify_env out",
        )
    return addresses


def _in_file(file: Path) -> list[str]:
    rule = f"infra.notify_file, {file}, must be a file with addresses that only you can read"
    try:
        with file.open(encoding="utf-8") as stream:
            facts = os.fstat(stream.fileno())
            if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise MissingPrerequisite(
                    rule,
                    found=f"mode {stat.filemode(facts.st_mode)} of user {facts.st_uid}",
                    remedy=f"chmod 600 {shlex.quote(str(file))}; if others may have read it, replace what it holds",
                )
            lines = [line for line in stream.read().splitlines() if not line.lstrip().startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else "no text"
        raise MissingPrerequisite(
            rule, found=found, remedy="Write it (umask 077), or leave infra.notify_file out"
        ) from None
    addresses = " ".join(lines).split()
    if not addresses:
        raise MissingPrerequisite(
            rule, found="none", remedy="Write addresses into it, separated by spaces or lines; # begins a comment"
        )
    return addresses


def open_addresses(variable: str | None, file: str | None = None) -> list[Address]:
    """The addresses that the environment variable and the file hold.

    Raises:
        MissingPrerequisite: apprise is not installed or does not understand an address, or a place is not as it should
            be.
    """
    require_notifications(variable, file)
    import apprise

    # it names hosts, and addresses that it does not understand, in its log
    apprise.logger.setLevel(logging.CRITICAL + 1)
    apprise.logger.propagate = False
    addresses = []
    urls = read_addresses(variable, file)
    places = " and ".join(filter(None, [variable and f"the environment variable {variable}", file]))
    for number, url in enumerate(urls, 1):
        service = apprise.Apprise(asset=apprise.AppriseAsset(async_mode=False, storage_mode="memory"))
        if not service.add(url):
            raise MissingPrerequisite(
                f"apprise must understand every address in {places}",
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
