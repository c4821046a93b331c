"""What the monitor knows of all runs, what it asks for that, and what it says of it in few characters."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import html5lib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encdec.errors import ConfigError
from encdec.files import RunPaths, atomic_write_json
from encdec.records import JsonLinesWriter
from launchers import slurm
from launchers.monitor import columns, words
from launchers.monitor.__main__ import main, parse
from launchers.monitor.feeds import Events, Log, newest_error, ranks_with_logs
from launchers.monitor.observatory import Board, Observatory, Sight
from launchers.monitor.run_reader import Choice, RunReader
from launchers.names import runs_under
from launchers.slurm import JobState, Listing
from launchers.views.growing_files import Memory
from launchers.views.slurm_watch import SlurmWatch
from launchers.views.standing import State
from launchers.views.utilization import read_work
from tests.conftest import REPOSITORY
from tests.launchers.conftest import UNREACHABLE, Play, Story, step_record
from tests.launchers.monitor_scenes import NOW, SCENES, beat, hung_node, on_slurm, saved, steps, tell

LONG_RUNS = 20


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def observe(root: Path, clock: Clock, *, interval: float = 30.0) -> Observatory:
    return Observatory(lambda: runs_under(root), SlurmWatch(interval, clock), clock=clock)


def seen(root: Path, listing: Listing) -> dict[str, Sight]:
    """The runs of a scene, by name."""
    slurm = SlurmWatch(clock=lambda: NOW, listing=listing, asked=NOW)
    board = Observatory(lambda: runs_under(root), slurm, clock=lambda: NOW).look()
    return {sight.view.name: sight for sight in board.sights}


# ---- Slurm is asked seldom


def test_one_squeue_in_an_interval_for_all_runs(runs: Path, play: Play, clock: Clock):
    for number in range(LONG_RUNS):
        on_slurm(runs, f"medium-{number}", str(100 + number))
    play("squeue", "".join(f"{100 + number}|RUNNING|None|N/A\n" for number in range(LONG_RUNS)))
    observatory = observe(runs, clock)
    for tick in range(60):
        clock.now = 1000.0 + tick
        observatory.look()
        observatory.ask_slurm()
    assert len(play.calls("squeue")) == 2  # of 60 s
    assert not play.calls("sacct")
    assert [sight.view.standing.state for sight in observatory.look().sights] == [State.RUNNING] * LONG_RUNS


def test_accounting_is_asked_once_for_a_job_that_has_ended(runs: Path, play: Play, clock: Clock):
    on_slurm(runs, "medium-1", "12")
    on_slurm(runs, "medium-2", "13")
    play("squeue", "13|RUNNING|None|N/A\n")
    play("sacct", "12|TIMEOUT\n")
    observatory = observe(runs, clock)
    for _ in range(5):
        observatory.look()
        assert observatory.ask_slurm()
        clock.now += 30.0
    assert (len(play.calls("squeue")), len(play.calls("sacct"))) == (5, 1)
    assert observatory.look().sights[1].view.standing.words == "ended without a word (job 12: TIMEOUT)"


def test_runs_without_jobs_ask_nobody(runs: Path, play: Play, clock: Clock):
    story = Story(RunPaths(runs / "here")).begin()
    story.attempt(steps=range(1, 5))
    observatory = observe(runs, clock)
    observatory.look()
    assert not observatory.ask_slurm()
    assert not play.calls("squeue") and observatory.look().slurm_asked is None


def test_before_slurm_is_asked_nothing_is_made_of_its_silence(runs: Path, play: Play, clock: Clock):
    on_slurm(runs, "medium-1", "12")
    observatory = observe(runs, clock)
    [sight] = observatory.look().sights
    assert (sight.view.standing.state, sight.view.job) == (State.UNKNOWN, JobState(slurm.UNASKED))
    assert "not been asked" in sight.view.standing.words


def test_controller_that_is_away_is_told_of_and_forgotten(runs: Path, play: Play, clock: Clock):
    on_slurm(runs, "medium-1", "12")
    observatory = observe(runs, clock)
    observatory.look()
    observatory.ask_slurm()
    board = observatory.look()
    assert board.slurm_problem == UNREACHABLE
    assert words.slurm_line(board) == "Slurm does not answer (0 s ago)"
    play("squeue", "12|RUNNING|None|N/A\n")
    clock.now += 30.0
    observatory.ask_slurm()
    board = observatory.look()
    assert (board.slurm_problem, words.slurm_line(board)) == (None, "Slurm asked 0 s ago")
    assert board.sights[0].view.standing.words == "job 12 is RUNNING"


# ---- the directories are read on


def test_look_without_news_reads_nothing_again(runs: Path, clock: Clock, play: Play):
    story = on_slurm(runs, "medium-1", "12")
    steps(story, 1, 50, ended=1.0)
    tell(story, "node-0", "agent_ready", 5.0)
    observatory = observe(runs, clock)
    observatory.look()
    [(memory, pulse)] = observatory._known.values()
    before = (memory.reads, pulse.bytes_read)
    assert observatory.look().sights[0].vitals.step == 50
    assert (memory.reads, pulse.bytes_read) == before
    with JsonLinesWriter(story.newest.steps) as writer:
        writer.write(step_record(51).to_json())
    assert observatory.look().sights[0].vitals.step == 51
    assert memory.reads == before[0] + 1  # the attempt, and neither run.yaml nor the rest


def test_attempt_before_speaks_until_the_newest_has_a_step(runs: Path):
    story = on_slurm(runs, "medium-1", "12")
    steps(story, 1, 50, ended=90.0)
    story.end("signalled", 75)
    story.attempt("12")
    vitals = seen(runs, Listing({"12": JobState("RUNNING")}, None))["medium-1"].vitals
    assert (vitals.step, vitals.step_seconds, len(vitals.losses)) == (50, pytest.approx(0.5), 50)
    steps(story, 46, 47, ended=1.0)
    assert seen(runs, Listing({}, None))["medium-1"].vitals.step == 47


def test_runs_come_and_go(runs: Path, clock: Clock, play: Play):
    observatory = observe(runs, clock)
    assert observatory.look().sights == []
    on_slurm(runs, "medium-1", "12")
    assert [sight.view.name for sight in observatory.look().sights] == ["medium-1"]
    shutil.rmtree(runs / "medium-1")
    assert observatory.look().sights == []
    runs.rmdir()
    runs.touch()
    assert "can be listed" in str(observatory.look().trouble)


def test_damaged_run_is_one_line_among_others(runs: Path, clock: Clock, play: Play):
    on_slurm(runs, "medium-1", "12")
    broken = on_slurm(runs, "medium-2", "13")
    broken.newest.process.write_text("{}")
    board = observe(runs, clock).look()
    assert [sight.view.standing.state for sight in board.sights] == [State.UNKNOWN, State.DAMAGED]
    rows = columns.rows_of(board, columns.fitting(160))
    assert "damaged" in rows[str(runs / "medium-2")].plain
    broken.newest.process.unlink()
    assert [sight.view.standing.state for sight in observe(runs, clock).look().sights] == [State.UNKNOWN] * 2


# ---- what is wrong


def test_silent_node_and_missing_steps_are_dangers(runs: Path):
    sight = seen(runs, hung_node(runs))["full-5d21c0de"]
    assert list(sight.silent_nodes(NOW)) == [2]
    assert words.dangers(sight, NOW) == ["node 2 not heard of for 12 min", "no step for 12 min"]
    assert words.count_of_alerts(sight) == 1


def test_last_work_after_the_last_step_is_not_stuck(runs: Path):
    story = on_slurm(runs, "medium-1", "12")
    steps(story, 1, 59, ended=900.0)
    listing = Listing({"12": JobState("RUNNING")}, None)
    assert words.time_left(seen(runs, listing)["medium-1"], NOW) == "stuck"
    steps(story, 60, 60, ended=890.0)  # the micro sanity check has 60
    assert words.dangers(seen(runs, listing)["medium-1"], NOW) == []


def test_save_and_entry_of_rank_0_are_signs_of_progress(runs: Path):
    listing = Listing({"12": JobState("RUNNING"), "13": JobState("RUNNING")}, None)
    saves, tells = on_slurm(runs, "saves", "12"), on_slurm(runs, "tells", "13")
    for story in (saves, tells):
        steps(story, 1, 30, ended=900.0)
    stuck = {name: sight.seconds_stuck(NOW) for name, sight in seen(runs, listing).items()}
    assert stuck == {"saves": pytest.approx(900.0), "tells": pytest.approx(900.0)}
    saved(saves, 30, 60.0)
    tell(tells, "rank-0", "evaluated", 60.0, step=30)
    assert [sight.seconds_stuck(NOW) for sight in seen(runs, listing).values()] == [None, None]
    assert [sight.seconds_stuck(NOW + 600.0) for sight in seen(runs, listing).values()] == [pytest.approx(1500.0)] * 2


def test_run_that_has_ended_is_in_no_danger(runs: Path):
    listing = hung_node(runs)
    Story(RunPaths(runs / "full-5d21c0de")).end("stop_requested", 75)
    sight = seen(runs, listing)["full-5d21c0de"]
    assert not words.dangers(sight, NOW) and sight.seconds_left is None


def test_many_silent_nodes_are_counted(runs: Path):
    story = on_slurm(runs, "full-1", "77")
    beat(story, *[300.5] * 64)
    [*named, rest] = words.dangers(seen(runs, Listing({"77": JobState("RUNNING")}, None))["full-1"], NOW)
    assert len(named) == words.MOST_NODES_NAMED and rest == "60 more nodes silent"


def test_why_the_attempt_before_ended_is_told(runs: Path):
    story = on_slurm(runs, "full-1", "77")
    story.end("signalled", 75)
    story.attempt("77")
    lives = seen(runs, Listing({"77": JobState("RUNNING")}, None))["full-1"]
    assert words.end_words(lives) == "signalled"
    assert dict(words.details(lives, NOW, width=160))["attempt"].endswith("before: signalled (said signalled)")


def test_model_flops_utilization_is_work_over_peak(tmp_path: Path):
    plan = tmp_path / "plan.json"
    atomic_write_json(plan, {"nodes": 2, "ranks_per_node": 8, "forecast": {"gpu": "h100", "flops_per_step": 989e12}})
    work = read_work(plan)
    assert work is not None
    assert work.mfu(0.125) == pytest.approx(0.5)  # 16 GPUs could do twice that in an eighth of a second
    for unknown in ({"gpu": None, "flops_per_step": 1.0}, {"gpu": "h100", "flops_per_step": None}, None):
        atomic_write_json(plan, {"nodes": 2, "ranks_per_node": 8, "forecast": unknown})
        assert read_work(plan) is None
    atomic_write_json(plan, {"nodes": 0, "ranks_per_node": 8, "forecast": {"gpu": "h100", "flops_per_step": 1.0}})
    assert read_work(plan) is None
    assert read_work(tmp_path / "none") is None


# ---- few characters


@pytest.mark.parametrize("width", range(79, 240))
def test_columns_fit_and_narrow_ones_stay(width: int):
    chosen = columns.fitting(width)
    assert sum(room + 1 for _, room in chosen) - 1 <= width
    names = [column.name for column, _ in chosen]
    assert set(names) >= {"run", "state", "step", "left", "loss", "tok/s", "!"}
    assert len(columns.header_of(chosen).plain) == sum(room + 1 for _, room in chosen) - 1


def test_row_is_as_wide_as_its_header(runs: Path):
    board = Board(now=NOW, sights=list(seen(runs, hung_node(runs)).values()), slurm_asked=None, slurm_problem=None)
    for width in (79, 120, 159, 300):
        fitting = columns.fitting(width)
        [row] = columns.rows_of(board, fitting).values()
        assert len(row.plain) == len(columns.header_of(fitting).plain) <= width


@pytest.mark.parametrize(
    ("number", "text"), [(None, "-"), (0.4, "0"), (987.0, "987"), (9000.0, "9.0k"), (123e3, "123k"), (1.25e6, "1.2M")]
)
def test_compact_numbers(number: float | None, text: str):
    assert words.compact(number) == text


def test_both_ends_of_a_long_name_are_shown():
    assert words.shortened("sanity_check-ca1bf36f", 16) == "sanity_c…a1bf36f"
    assert words.shortened("short", 16) == "short"


@given(st.text(), st.integers(min_value=3, max_value=40))
def test_shortened_text_fits(text: str, width: int):
    assert len(words.shortened(text, width)) <= width


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_shown(text: str):
    shown = words.printable(text)
    assert not any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in shown)


def test_colours_and_progress_bars_of_logs():
    assert words.printable("\x1b[31mred\x1b[0m and \x1b]0;title\x07plain") == "red and plain"
    assert words.printable("10%\r50%\r99%\r") == "99%"


# ---- line by line


def test_events_of_all_writers_come_in_order_of_time(story: Story):
    story.attempt()
    tell(story, "rank-0", "saved", 20.5, step=5, checkpoint="step-5")
    tell(story, "node-0", "agent_ready", 30.5, node=0)
    events = Events(story.paths)
    assert [line.partition("  ")[2].split()[:3] for line in events.fresh()] == [
        ["0", "node-0", "agent"], ["0", "rank-0", "saved:"],
    ]  # fmt: skip
    assert events.fresh() == []
    tell(story, "rank-0", "alert", 10.5, type="loss_spike", step=6, message="\x1b[2Jhigh")
    [line] = events.fresh()
    assert line.endswith("alert: type loss_spike, step 6, message high")
    tell(story, "rank-0", "saved", 9.5, step=6, seconds=0.06245530700107338, deadline=1764150000.25, lost=None)
    [line] = events.fresh()
    assert line.endswith("saved: step 6, seconds 0.06246, deadline 1764150000")


def test_log_goes_on(story: Story):
    story.attempt()
    path = story.log("rank-3.restart-0.err", "one\ntwo\n")
    log = Log(path)
    assert log.fresh() == ["one", "two"]
    with path.open("a") as stream:
        stream.write("three\nfo")
    assert log.fresh() == ["three"]
    assert ranks_with_logs(story.newest) == [3]


def test_newest_attempt_with_an_error_is_found(story: Story):
    assert newest_error(story.paths, [], Memory(), {}) is None
    for attempt in range(3):
        story.attempt()
        if attempt == 1:
            story.log("rank-5.restart-0.err", "Traceback (most recent call last):\n  at\nOSError: closed\n", node=1)
            said = "rank 5 ended with exit code 1, see /x/rank-5.restart-0.err"
            story.tell("rank_failed", node=1, detail=said)
    found = newest_error(story.paths, [0, 1, 2], Memory(), {})
    assert found is not None
    assert (found.attempt, found.rank, found.error.lines[-1]) == (1, 5, "OSError: closed")


def test_attempts_that_are_over_are_looked_at_once_more(story: Story, monkeypatch: pytest.MonkeyPatch):
    looked_at: list[str] = []
    glob = Path.glob

    def counted(self: Path, pattern: str):
        if pattern.startswith("events-"):
            looked_at.append(self.name)
        return glob(self, pattern)

    for _ in range(3):
        story.attempt()
        story.tell("agent_ready")
        story.end("signalled", 75)
    old = story.newest
    reader = RunReader(story.paths)
    assert len(reader.look(Choice()).lines) == 3
    monkeypatch.setattr(Path, "glob", counted)
    assert reader.look(Choice()).lines == []
    assert looked_at == [old.root.name] * 2  # for its events and its errors; the newest may still be added to
    story.attempt()
    with JsonLinesWriter(old.events("node-0")) as ledger:
        ledger.write({"event": "requeued", "job": "12", "time": 1.0})
    assert len(reader.look(Choice()).lines) == 1  # the last word, told once more
    looked_at.clear()
    assert reader.look(Choice()).lines == []
    assert looked_at == [story.newest.root.name] * 2


# ---- the command


def test_scripts_get_a_table_or_a_document(runs: Path, play: Play, capsys):
    hung_node(runs)
    play("squeue", "77|RUNNING|None|N/A\n")
    assert main(["--root", str(runs)]) == 0  # nobody looks on: as --once
    line, header, row = capsys.readouterr().out.splitlines()
    assert line.startswith("1 run: 1 running; Slurm asked ") and header.split()[0] == "run"
    assert row.split()[:4] == ["full-5d21c0de", "running", "77", "RUNNING"]
    assert main(["full", "--root", str(runs), "--once", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(play.calls("squeue")) == 2
    assert document["slurm"]["problem"] is None and document["trouble"] is None
    [run] = document["runs"]
    assert (run["state"], run["step"], run["vitals"]["step"], run["mfu"] > 0) == ("running", 33, 33, True)
    assert set(run["heartbeats"]) == {"0", "1", "2", "3"} and len(run["vitals"]["losses"]) == 33
    assert run["attempts"][0]["rollbacks"] == 1
    assert run["attempts"][0]["newest_troubles"][0]["kind"] == "rolled_back"


@pytest.mark.parametrize("scene", SCENES)
def test_each_scene_has_a_document(runs: Path, play: Play, capsys, scene: str):
    SCENES[scene](runs)
    assert main(["--root", str(runs), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len({tuple(run) for run in document["runs"]}) <= 1  # the same keys


def test_neither_torch_nor_textual_is_loaded_for_scripts(tmp_path: Path):
    program = (
        "import sys; from launchers.monitor.__main__ import main; main(['--root', sys.argv[1], '--json']); "
        "loaded = {'torch', 'textual', 'transformers'} & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"] == []


@pytest.mark.parametrize("interval", ["0", "0.5", "-3", "nan"])
def test_controllers_are_spared(interval: str):
    with pytest.raises(ConfigError, match="--interval"):
        parse(["--interval", interval])


def test_page_is_valid_private_and_loads_nothing(runs: Path, play: Play, tmp_path: Path):
    SCENES["fifty-runs"](runs)
    Story(RunPaths(runs / "<script>x&")).begin()
    file = tmp_path / "runs.html"
    assert main(["--root", str(runs), "--html", str(file)]) == 0
    page = file.read_text()
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)
    assert not {"script", "link", "img", "iframe"} & {element.tag for element in tree.iter()}
    assert not re.search(r"url\(|@import|https?:|src=|href=", page)
    text = "".join(tree.itertext())
    assert re.search(r"As of \d{4}-\d\d-\d\d", text)
    assert all(paths.root.name in text for paths in runs_under(runs))
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["runs.json", "nowhere/runs.html"])
def test_page_goes_where_a_page_may(name: str, runs: Path, tmp_path: Path, capsys):
    assert main(["--root", str(runs), "--html", str(tmp_path / name)]) == 78
    assert "page" in capsys.readouterr().err and list(tmp_path.glob("*.json")) == []


def test_name_that_fits_no_run_is_refused(runs: Path, capsys):
    assert main(["nothing", "--root", str(runs)]) == 78
    assert "nothing" in capsys.readouterr().err
