"""An inbox for notifications: a real HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

VARIABLE = "TEST_NOTIFY_URLS"
SECRET = "s3cr3t-token"


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


def an_inbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inbox]:
    """One whose address stands in VARIABLE, until its fixture ends."""
    inbox = Inbox()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv(VARIABLE, inbox.url)
    yield inbox
    inbox.gate.set()
    inbox.server.shutdown()
    inbox.server.server_close()
