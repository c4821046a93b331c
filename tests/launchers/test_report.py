"""What a report tells, and that its page is valid, loads nothing, and holds hostile words as words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import html5lib
import pytest

from encdec.files import RunPaths
from launchers import report
from launchers.views.page import MOST_ALERTS, clean
from launchers.views.retrospect import look_back
from tests.launchers.conftest import Play, Story
from tests.launchers.reported_run import NOW, page_of, write_run
from tests.launchers.scripted_run import ScriptedRun

HOSTILE = (
    '</style></script><script>alert(1)</script><img src="http://evil.example/x" onerror=alert(1)>&"\'\x00\x1b[31m\u202e'
)
LOADING = {"src", "href", "srcset", "data", "poster", "action", "formaction", "background", "xlink:href", "ping"}


@pytest.fixture
def run(story: Story) -> RunPaths:
    write_run(story.paths)
    return story.paths


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


def test_every_turn_is_told_in_its_own_words(story: Story):
    """The facts of each kind are those that the trainer writes: not all of them have a message."""
    run = write_run(story.paths)
    run.rank("rolled_back", 590, number=1, cause="loss spike", from_step=180, to_step=150, lr_factor=0.5)
    run.rank("save_failed", 591, step=200, reason="disk full", checkpoint="step-150")
    run.rank("stopped_early", 592, step=210, reason="no better evaluation for 3 times")
    run.rank("gate_not_passed", 593, step=211, message="perplexity is 1200", gates=["perplexity"])
    run.rank("alert", 594, type="bare")
    run.rank("alert", 595, step=int("9" * 400))
    told = " ".join("".join(parse(page_of(story.paths)).itertext()).split())
    for words in (
        "from step 180 to step 150: loss spike", "no checkpoint of step 200: disk full",
        "no better evaluation for 3 times", "perplexity is 1200", "bare",
    ):  # fmt: skip
        assert words in told


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


def test_text_is_cleaned_of_what_no_page_may_hold():
    assert clean("a\x00b\ud800c\u202ed\ne") == "a�b�c�d e"
    assert len(clean("x" * 10_000)) == 400
    assert clean(3) == 3
