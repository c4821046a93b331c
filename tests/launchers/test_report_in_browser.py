"""How a report's page looks in a real browser, and what the browser asks for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from tests.launchers.conftest import Story
from tests.launchers.reported_run import page_of, write_run

BROWSER = next(filter(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome")), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None and os.geteuid() != 0,  # as root `make test` installs it: then its lack is a failure
    reason="needs a browser: apt-get install chromium",
)


@pytest.fixture
def page(story: Story) -> str:
    write_run(story.paths)
    return page_of(story.paths)


class Requests(BaseHTTPRequestHandler):
    """Serves one page, and notes what it is asked for."""

    pages: dict[str, str] = {}
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(f"{self.headers.get('Host', '')}{self.path}")
        found = self.pages.get(self.path)
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write((found or "").encode())

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    Requests.pages, Requests.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def browse(folder: Path, url: str, *flags: str) -> str:
    """Open ``url`` in a headless browser for which every host is this machine's port; what it printed."""
    assert BROWSER is not None
    port = url.split(":")[2].partition("/")[0]
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
        "--no-first-run", f"--user-data-dir={folder / 'profile'}", f"--host-resolver-rules=MAP * 127.0.0.1:{port}",
        "--virtual-time-budget=5000", *flags, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=folder)
    return done.stdout


def colors_of(picture: Path) -> dict[tuple[int, ...], int]:
    with Image.open(picture) as image:
        found = image.convert("RGB").getcolors(1 << 24)
    assert found is not None
    return {tuple(color): count for count, color in found}  # type: ignore[arg-type]


def address(server: ThreadingHTTPServer, page: str) -> str:
    Requests.pages["/report.html"] = page
    return f"http://127.0.0.1:{server.server_address[1]}/report.html"


def test_browser_asks_for_the_page_and_nothing_else(page: str, server: ThreadingHTTPServer, tmp_path: Path):
    url = address(server, page)
    browse(tmp_path, url, "--dump-dom")
    own = ("/report.html", "/favicon.ico")
    of_the_browser = "clients2.google.com/time/"
    assert any(asked.endswith("/report.html") for asked in Requests.asked)
    assert [asked for asked in Requests.asked if not asked.endswith(own) and not asked.startswith(of_the_browser)] == []
    address(server, page.replace("<footer>", '<img src="http://elsewhere.example/x.png" alt=""><footer>'))
    browse(tmp_path, url, "--dump-dom")
    assert "elsewhere.example/x.png" not in Requests.asked  # the page's own policy holds even then
    address(server, '<!DOCTYPE html><title>x</title><img src="http://elsewhere.example/x.png" alt="">')
    browse(tmp_path, url, "--dump-dom")
    assert "elsewhere.example/x.png" in Requests.asked  # a request would have been seen


@pytest.mark.parametrize("width", [1280, 600])
def test_page_looks_right(page: str, server: ThreadingHTTPServer, tmp_path: Path, width: int):
    """The bars and curves are where they should be, in their colours."""
    url = address(server, page)
    browse(tmp_path, url, f"--screenshot={tmp_path / 'light.png'}", f"--window-size={width},2400")
    light = colors_of(tmp_path / "light.png")
    pixels = width * 2400
    assert light[(0xFF, 0xFF, 0xFF)] > pixels // 3  # paper
    shares = {(0x24, 0x68, 0xB0): 300 / 600, (0xD1, 0x50, 0x2A): 30 / 600, (0xD7, 0x9A, 0x17): 67 / 600}
    for color in shares:
        assert light.get(color, 0) > 100
    # the first bar's colours are as wide as their shares of the wall time
    with Image.open(tmp_path / "light.png") as image:
        rows = [image.convert("RGB").crop((0, y, width, y + 1)).getdata() for y in range(0, 900, 6)]
    stacked = max(rows, key=lambda row: len(set(row) & set(shares)) * 10_000 + sum(p in shares for p in row))
    total = sum(p not in ((0xFF, 0xFF, 0xFF), (0xF6, 0xF7, 0xF9)) for p in stacked)
    for color, share in shares.items():
        assert sum(p == color for p in stacked) / total == pytest.approx(share, abs=0.02)


def test_dark_page_is_dark(page: str, server: ThreadingHTTPServer, tmp_path: Path):
    url = address(server, page)
    picture = tmp_path / "dark.png"
    browse(tmp_path, url, "--force-dark-mode", f"--screenshot={picture}", "--window-size=1000,2000")
    assert colors_of(picture)[(0x14, 0x17, 0x1B)] > 1000 * 2000 // 3


def test_page_fits_a_phone(page: str, server: ThreadingHTTPServer, tmp_path: Path):
    """Nothing of it is wider than 390 pixels; a headless browser has no window that narrow, a frame has."""
    holder = (
        '<!DOCTYPE html><title>x</title><iframe id="f" style="width:390px;height:3000px;border:0" src="/page.html">'
        "</iframe><script>onload=()=>{const d=document.getElementById('f').contentDocument;"
        "const wide=[...d.body.querySelectorAll('*')].filter(e=>e.getBoundingClientRect().right>390.5);"
        "document.title='width '+d.documentElement.scrollWidth+' over '+wide.map(e=>e.tagName+'.'+e.className).join()"
        "}</script>"
    )
    url = address(server, holder)
    Requests.pages["/page.html"] = page
    title = re.search(r"<title>(.*?)</title>", browse(tmp_path, url, "--dump-dom"))
    assert title is not None
    assert title.group(1) == "width 390 over "
