"""What a report tells, that its page is valid and asks nobody for anything, and that it looks right in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import html5lib
import numpy as np
import pytest
from PIL import Image

from encdec.files import RunPaths
from encdec.gates import Evidence
from encdec.training.execution import TrainingPhase
from encdec.training.promotion import GateFile
from launchers import report
from launchers.views.charts import Curve, Note, chart
from launchers.views.downsample import envelope
from launchers.views.page import MOST_ALERTS, clean, render
from launchers.views.retrospect import look_back
from launchers.views.units import compact, duration
from tests.launchers.conftest import Play, Story
from tests.launchers.scripted_run import ZERO, ScriptedRun

BROWSER = next(filter(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome")), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
HOSTILE = (
    '</style></script><script>alert(1)</script><img src="http://evil.example/x" onerror=alert(1)>&"\'\x00\x1b[31m\u202e'
)
LOADING = {"src", "href", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href", "ping"}
NOW = ZERO + 1000


def write_run(paths: RunPaths, *, words: str = "loss 9.1 is twice the mean") -> ScriptedRun:
    """Three attempts, two alerts, 330 steps of which 30 were computed again, a gate that was passed."""
    run = ScriptedRun(paths)
    curves = {
        "loss": lambda step: 2 + 5 * math.exp(-step / 60) + (4.0 if step == 77 else 0.0),
        "grad_norm": lambda step: 1 + 40 * (step == 77),
        "learning_rate": lambda step: 1e-3 * min(step, 30) / 30,
        "memory_gb": lambda step: 60.0,
    }
    run.submitted(0)
    run.attempt(20)
    run.start(ready=22, met=24, imports=28, text=29, ranks=31, loaded=40)
    run.steps(range(1, 101), since=40, first=5, **curves)
    run.alert("loss_spike", 121, step=77, message=words)
    run.saved(100, 146, blocking=2)
    run.ended("signalled", 148, step=100, message=words, requeued=True)
    run.attempt(200)
    run.start(ready=202, met=204, imports=208, text=209, ranks=211, loaded=220)
    run.steps(range(101, 181), since=220, first=3, **curves)
    run.saved(150, 273, blocking=0.5, seconds=3)
    run.alert("throughput_drop", 290, step=168, message="200 tokens/s are half of the median")
    run.submitted(400)
    run.attempt(420, job="8")
    run.start(ready=422, met=424, imports=428, text=429, ranks=431, loaded=440)
    run.steps(range(151, 301), since=440, first=3, **curves)
    run.saved(300, 594, blocking=2)
    run.checkpoint(300)
    run.ended("complete", 600, step=300, message="all 300 steps done")
    GateFile(
        phase=TrainingPhase.SANITY_CHECK, passed=True, identity="x", step=300, checkpoint="step-300",
        weights_digest="ab", first_loss=7.0, last_loss=2.0, time=ZERO + 599,
        evidence=(
            Evidence("loss_decreasing", "loss_decrease", 5.0, 0.2, ">=", True, words, True),
            Evidence("perplexity", "perplexity", None, 1000, "<", False, "nobody measured it", False),
        ),
    ).write(paths)  # fmt: skip
    return run


@pytest.fixture
def run(story: Story) -> RunPaths:
    write_run(story.paths)
    return story.paths


def page_of(paths: RunPaths) -> str:
    return render(look_back(paths, now=NOW), now=NOW)


def parse(page: str) -> ElementTree.Element:
    """The page's tree; raises at anything that the HTML standard calls a parse error."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)


# ---- what it tells


def test_terminal_has_time_by_part_and_cause(run: RunPaths, capsys: pytest.CaptureFixture[str]):
    assert report.main([str(run.root)]) == 0
    told = capsys.readouterr().out
    assert "medium-1: complete" in told
    assert "300 of 60 steps in 3 attempt(s)" in told
    ettr = 300 / 600
    assert f"ETTR {ettr:.3f}" in told
    assert re.search(r"lost steps +30 s +5\.0 %", told)
    assert re.search(r"queue wait +1 min 32 s +15\.3 %", told)
    assert re.search(r"all +10 min +100\.0 %", told)
    assert re.search(r"first start +1 +20 s +24 s +44 s", told)
    assert re.search(r"killed +1 +30 +30 s +20 s +22 s +1 min 38 s +2 min 50 s", told)
    assert "2 alert(s):" in told


def test_document_is_json_for_programs(run: RunPaths, capsys: pytest.CaptureFixture[str]):
    assert report.main([str(run.root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["wall_seconds"] == pytest.approx(600)
    assert sum(told["parts"].values()) == pytest.approx(600)
    assert told["ettr"] == pytest.approx(0.5)
    assert 0 < told["predicted_ettr"] < 1
    assert [each["cause"] for each in told["attempts"]] == ["signalled", "killed", "complete"]
    assert [each["lost_steps"] for each in told["attempts"]] == [0, 30, 0]
    assert [alert["type"] for alert in told["alerts"]] == ["loss_spike", "throughput_drop"]
    assert told["gate"]["passed"] is True


def test_run_that_waits_has_a_report(story: Story, play: Play, capsys: pytest.CaptureFixture[str]):
    ScriptedRun(story.paths).submitted(0)
    story.job("7")
    play("squeue", "7|PENDING|Priority|N/A\n")
    assert report.main([str(story.paths.root)]) == 0
    told = capsys.readouterr().out
    assert "0 of 60 steps in 0 attempt(s)" in told
    assert re.search(r"queue wait +\d+ d.* +100\.0 %", told)
    assert len(play.calls("squeue")) == 1
    parse(page_of(story.paths))


def test_plan_s_own_expectation_is_told_beside(run: RunPaths, capsys: pytest.CaptureFixture[str]):
    run.plan.write_text('{"forecast": {"ettr": 0.875}}')
    assert report.main([str(run.root)]) == 0
    assert "the plan expected 0.875" in capsys.readouterr().out
    assert "the plan expected 87.5 %" in page_of(run)
    run.plan.write_text('{"forecast": null}')
    assert look_back(run, now=NOW).planned_ettr is None


def test_page_is_private_and_whole(run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "report.html"
    assert report.main([str(run.root), "--html", str(file)]) == 0
    assert file.stat().st_mode & 0o077 == 0
    assert "wrote" in capsys.readouterr().out
    parse(file.read_text())


@pytest.mark.parametrize("name", ["run.yaml", "no/such/folder/report.html"])
def test_page_goes_where_it_can_and_replaces_nothing_else(
    run: RunPaths, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    assert report.main([str(run.root), "--html", str(tmp_path / name)]) == 78
    assert "error: A page" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


# ---- the page


def test_page_is_valid_html_and_names_everything(run: RunPaths):
    page = page_of(run)
    tree = parse(page)
    told = " ".join(tree.itertext())
    for words in ("medium-1", "ETTR", "loss_spike", "throughput_drop", "killed", "signalled", "loss_decreasing"):
        assert words in told
    titles = {figure.find("figcaption").text for figure in tree.iter("figure")}
    wanted = {"Loss", "Learning rate", "Gradient norm", "Throughput", "Memory of rank 0"}
    assert wanted <= {(title or "").strip() for title in titles}
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}svg"))) == len(titles)


def test_page_loads_nothing(run: RunPaths):
    page = page_of(run)
    for element in parse(page).iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        assert not LOADING & set(element.attrib)
        assert not [name for name in element.attrib if str(name).startswith("on")]
    assert not re.search(r"url\(|@import|https?:", page)
    assert "default-src 'none'" in page


def test_hostile_words_stay_words(story: Story, tmp_path: Path):
    place = story.paths.root.with_name("<img src=x onerror=alert(1)>")
    story.paths.root.rename(place)
    paths = RunPaths(place)
    run = write_run(paths, words=HOSTILE)
    run.alert(HOSTILE, 590, step=200, message="\ud800 alone " + "long " * 1000)
    run.rank("alert", 591, type=["no", "text"], step="x", message={"a": 1})
    run.rank("gate_not_passed", 592, step=3, message=HOSTILE, gates=[HOSTILE])
    page = page_of(paths)
    page.encode()  # no lone surrogate is left
    tree = parse(page)
    tags = {element.tag for element in tree.iter()}
    assert not tags & {"script", "img"}
    assert "<script>alert(1)</script>" in " ".join(tree.itertext())
    assert len(page) < 200_000
    text = "".join(tree.itertext())
    assert not [character for character in text if not character.isprintable() and not character.isspace()]


def test_page_of_a_run_that_failed_all_the_time_stays_small(story: Story):
    run = ScriptedRun(story.paths)
    run.submitted(0)
    for number in range(120):
        run.attempt(100.0 * number)
        for restart in range(30):
            began = 100.0 * number + 3 * restart
            run.steps([1], since=began, seconds=0.5, loss=float("nan") if restart == 3 else 1.0)
            run.alert("nan", began + 1, step=1, message="loss nan")
            run.rank_died(seen=began + 1, again=began + 2)
    page = page_of(story.paths)
    parse(page)
    assert len(page) < 500_000
    assert f"{120 * 30 - MOST_ALERTS} earlier alert(s)" in page


# ---- curves


def test_spikes_survive_the_fewest_points():
    step = np.arange(1, 1_000_001, dtype=float)
    loss = 2 + np.exp(-step / 1e5)
    loss[[123_456, 777_777]] = 50.0, 0.1
    loss[500_000] = np.nan
    drawn = envelope(step, loss, 300)
    assert len(drawn.x) <= 300
    assert (drawn.high.max(), drawn.low.min()) == (50.0, 0.1)
    assert np.all(np.diff(drawn.x) > 0)
    assert np.all((drawn.low <= drawn.mean) & (drawn.mean <= drawn.high))
    curve = Curve(
        title="Loss", unit="", step=step, value=loss, lost_step=np.zeros(0), lost_value=np.zeros(0)
    )  # fmt: skip
    assert curve.not_finite == 1
    picture = chart(curve)
    assert len(picture) < 20_000
    box = [float(number) for number in re.findall(r"[ ,ML](-?\d+\.\d),", re.sub(r"<title>.*?</title>", "", picture))]
    assert 0 <= min(box) <= max(box) <= 400
    assert ">1M</text>" in picture  # the last step has its place on the axis


def test_few_values_are_drawn_as_they_are():
    x, y = np.array([3.0, 1.0, 2.0]), np.array([30.0, 10.0, np.inf])
    drawn = envelope(x, y, 300)
    assert drawn.x.tolist() == [1.0, 3.0]
    assert drawn.low.tolist() == drawn.mean.tolist() == drawn.high.tolist() == [10.0, 30.0]


@pytest.mark.parametrize(
    "values", [[], [0.0], [1.0, 1.0], [float("nan")], [-3.0, 5.0], [1e-12, 1e12], [1e300, -1e300], [5e-324]]
)
@pytest.mark.parametrize("from_zero", [True, False])
def test_any_values_make_a_picture(values: list[float], from_zero: bool):
    step = np.arange(1, len(values) + 1, dtype=float)
    curve = Curve(
        title="a < b & c", unit="", from_zero=from_zero, step=step, value=np.array(values), lost_step=step,
        lost_value=np.array(values),
    )  # fmt: skip
    picture = chart(curve, starts=[Note(1, "<x>")], alerts=[Note(1, "&"), Note(9e9, "off the picture")])
    root = ElementTree.fromstring(picture)
    assert root.find("title").text == "a < b & c by step"
    assert "nan" not in picture and "inf" not in picture


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (0.0123, "12.3 ms"), (7.25, "7.25 s"), (59.99, "1 min"), (61, "1 min 1 s"), (3600, "1 h"),
     (7290, "2 h 1 min"), (90000, "1 d 1 h"), (86400 * 12, "12 d")],
)  # fmt: skip
def test_durations_are_read_at_a_glance(seconds: float, words: str):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (0.0002, "2e-4"), (0.15, "0.15"), (999, "999"), (15360, "15.4k"), (2.5e6, "2.5M"), (-4e9, "-4G")],
)
def test_axis_numbers_are_short(value: float, words: str):
    assert compact(value) == words


def test_text_is_cleaned_of_what_no_page_may_hold():
    assert clean("a\x00b\ud800c\u202ed\ne") == "a�b�c�d e"
    assert len(clean("x" * 10_000)) == 400
    assert clean(3) == 3


# ---- in a browser


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


@needs_browser
def test_browser_asks_for_the_page_and_nothing_else(run: RunPaths, server: ThreadingHTTPServer, tmp_path: Path):
    url = address(server, page_of(run))
    browse(tmp_path, url, "--dump-dom")
    own = ("/report.html", "/favicon.ico")
    of_the_browser = "clients2.google.com/time/"
    assert any(asked.endswith("/report.html") for asked in Requests.asked)
    assert [asked for asked in Requests.asked if not asked.endswith(own) and not asked.startswith(of_the_browser)] == []
    address(server, page_of(run).replace("<footer>", '<img src="http://elsewhere.example/x.png" alt=""><footer>'))
    browse(tmp_path, url, "--dump-dom")
    assert "elsewhere.example/x.png" not in Requests.asked  # the page's own policy holds even then
    address(server, '<!DOCTYPE html><title>x</title><img src="http://elsewhere.example/x.png" alt="">')
    browse(tmp_path, url, "--dump-dom")
    assert "elsewhere.example/x.png" in Requests.asked  # a request would have been seen


@needs_browser
@pytest.mark.parametrize("width", [1280, 600])
def test_page_looks_right(run: RunPaths, server: ThreadingHTTPServer, tmp_path: Path, width: int):
    """The bars and curves are where they should be, in their colours."""
    url = address(server, page_of(run))
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


@needs_browser
def test_dark_page_is_dark(run: RunPaths, server: ThreadingHTTPServer, tmp_path: Path):
    url = address(server, page_of(run))
    picture = tmp_path / "dark.png"
    browse(tmp_path, url, "--force-dark-mode", f"--screenshot={picture}", "--window-size=1000,2000")
    assert colors_of(picture)[(0x14, 0x17, 0x1B)] > 1000 * 2000 // 3


@needs_browser
def test_page_fits_a_phone(run: RunPaths, server: ThreadingHTTPServer, tmp_path: Path):
    """Nothing of it is wider than 390 pixels; a headless browser has no window that narrow, a frame has."""
    page = page_of(run)
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
