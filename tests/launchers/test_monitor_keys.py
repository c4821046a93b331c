"""Keys of the live view, pressed: choose, open, follow, filter, be asked first, act."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from textual.pilot import Pilot

from encdec.files import RunPaths
from encdec.records import read_json_lines
from launchers.monitor.app import Monitor
from launchers.monitor.observatory import Board
from launchers.monitor.run_screen import KEYS as KEYS_OF_A_RUN
from launchers.monitor.run_screen import RunScreen, neighbour
from launchers.slurm import JobState, Listing
from tests.launchers.conftest import Play, Story
from tests.launchers.monitor_scenes import beat, begin, fifty_runs, on_slurm, steps, tell
from tests.launchers.test_logs import TRACEBACK
from tests.launchers.test_monitor_screens import observe, text_of

SECONDS_OF_PATIENCE = 20.0
Act = Callable[[Pilot[None], Monitor], Awaitable[None]]


def drive(root: Path, listing: Listing, act: Act, size: tuple[int, int] = (80, 24)) -> None:
    """Open the live view on a root of runs, and do something in it."""

    async def session() -> None:
        observatory = observe(root, listing)
        app = Monitor(observatory, on_its_own=False)
        async with app.run_test(size=size, notifications=True) as pilot:
            app.show(observatory.look())
            await pilot.pause()
            await act(pilot, app)

    asyncio.run(session())


async def sees(pilot: Pilot[None], app: Monitor, *words: str) -> None:
    """Wait until all of it stands on the screen."""
    deadline = time.monotonic() + SECONDS_OF_PATIENCE
    while not all(word in text_of(app) for word in words):
        assert time.monotonic() < deadline, f"{words} not in\n{text_of(app)}"
        await pilot.pause(0.02)


async def sees_no_more(pilot: Pilot[None], app: Monitor, word: str) -> None:
    """Wait until it does not stand on the screen."""
    deadline = time.monotonic() + SECONDS_OF_PATIENCE
    while word in text_of(app):
        assert time.monotonic() < deadline, f"{word} in\n{text_of(app)}"
        await pilot.pause(0.02)


@pytest.fixture
def failed(runs: Path) -> Story:
    """A run that trains again after rank 1 raised."""
    story = on_slurm(runs, "full-1", "77")
    steps(story, 1, 33, ended=5.5)
    beat(story, 3.5, 4.5)
    story.log("rank-1.restart-0.err", TRACEBACK, node=1)
    story.log("rank-0.restart-0.err", "".join(f"line {number}\n" for number in range(100)))
    said = "rank 1 ended with exit code 1, see /x/logs/node-1/rank-1.restart-0.err"
    tell(story, "node-1", "rank_failed", 100.5, detail=said)
    return story


LISTING = Listing({"77": JobState("RUNNING")}, None)


def test_first_error_is_found_and_its_log_comes_first(failed: Story, runs: Path):
    async def act(pilot: Pilot[None], app: Monitor) -> None:
        await pilot.press("enter")
        await sees(pilot, app, "first error: attempt 0, rank 1", "RuntimeError: no memory", "rank failed", "events")
        await pilot.press("l")
        await sees(pilot, app, "attempt 0, rank 1", "terminate called without an active exception")
        await pilot.press("left_square_bracket")
        await sees(pilot, app, "attempt 0, rank 0", "line 98")
        await pilot.press("e")
        await sees(pilot, app, "rank failed")
        await pilot.press("escape")
        await sees(pilot, app, "1 run ")

    drive(runs, LISTING, act)


def test_log_is_followed_and_filtered(failed: Story, runs: Path):
    async def act(pilot: Pilot[None], app: Monitor) -> None:
        await pilot.press("enter", "l")
        await sees(pilot, app, "attempt 0, rank 1")
        await pilot.press("left_square_bracket")
        await sees(pilot, app, "attempt 0, rank 0", "line 98")
        await pilot.press("slash", *"nine", "enter")
        await sees(pilot, app, "lines with 'nine'")
        assert "line 98" not in text_of(app)
        with (failed.newest.rank_logs(0) / "rank-0.restart-0.err").open("a") as log:
            log.write("no match\nNinety \x1b[31mred\x1b[0m\n")
        screen = app.screen
        assert isinstance(screen, RunScreen)
        screen.look()
        await sees(pilot, app, "Ninety red")
        assert "no match" not in text_of(app)
        await pilot.press("slash", *["backspace"] * 4, "enter")
        await sees(pilot, app, "line 98", "no match")
        await pilot.press("f")
        await sees(pilot, app, "standing still")

    drive(runs, LISTING, act, (160, 50))


def test_attempt_before_can_be_read(failed: Story, runs: Path):
    failed.end("crash", 1)
    failed.attempt("77")
    failed.log("rank-0.restart-0.err", "second attempt\n")

    async def act(pilot: Pilot[None], app: Monitor) -> None:
        await pilot.press("enter")
        await sees(pilot, app, "first error: attempt 0")
        await pilot.press("l")
        await sees(pilot, app, "attempt 0, rank 1")
        await pilot.press("left_square_bracket")
        await sees(pilot, app, "attempt 0, rank 0", "line 98")
        await pilot.press("greater_than_sign")
        await sees(pilot, app, "attempt 1, rank 0", "second attempt")
        await pilot.press("less_than_sign")
        await sees(pilot, app, "attempt 0, rank 0", "line 98")

    drive(runs, LISTING, act)


def test_run_stays_chosen_while_others_come_and_go(runs: Path):
    listing = fifty_runs(runs)

    async def act(pilot: Pilot[None], app: Monitor) -> None:
        await pilot.press("down", "down", "down")
        chosen = app.chosen()
        assert chosen is not None
        on_slurm(runs, "a-newcomer", "1004")  # sorts before all others
        app.show(observe(runs, listing).look())
        await pilot.pause()
        await sees(pilot, app, "51 runs", "a-newcomer")
        assert app.chosen() is not None and app.chosen().view.name == chosen.view.name  # type: ignore[union-attr]
        await pilot.resize_terminal(160, 50)
        await sees(pilot, app, "last end")
        assert app.chosen().view.name == chosen.view.name  # type: ignore[union-attr]

    drive(runs, listing, act)


def test_nothing_happens_without_a_yes(failed: Story, runs: Path):
    async def act(pilot: Pilot[None], app: Monitor) -> None:
        for key, verb in (("s", "save"), ("c", "cancel"), ("r", "requeue")):
            for no in ("n", "escape", "enter", "q"):
                await pilot.press(key)
                await sees(pilot, app, f"{verb} full-1?")
                await pilot.press(no)
                await sees(pilot, app, "1 run ")

    drive(runs, LISTING, act)
    assert not failed.paths.save_request.exists() and not failed.paths.stop_request.exists()
    assert list(read_json_lines(failed.paths.events)) == []


def test_save_now_is_asked_of_the_run(failed: Story, runs: Path):
    failed.newest.heartbeat(0).touch()

    async def act(pilot: Pilot[None], app: Monitor) -> None:
        await pilot.press("enter", "s")
        await sees(pilot, app, "save full-1?")
        await pilot.press("y")
        await sees(pilot, app, "boundary")

    drive(runs, LISTING, act)
    assert failed.paths.save_request.exists()
    assert [record["event"] for record in read_json_lines(failed.paths.events)] == ["save_asked"]


def test_what_cannot_be_done_is_told(runs: Path, play: Play):
    story = begin(runs, "medium-[red]1")
    story.attempt(steps=range(1, 5))
    story.end("stop_requested", 75)

    async def act(pilot: Pilot[None], app: Monitor) -> None:
        for key, told in (("s", "trains"), ("r", "requeued"), ("c", "live:")):
            await pilot.press(key)
            await sees(pilot, app, "medium-[red]1?")
            await pilot.press("y")
            await sees(pilot, app, told)

    drive(runs, Listing({}, None), act, (100, 40))


def test_empty_root_has_nothing_to_act_on(runs: Path):
    async def act(pilot: Pilot[None], app: Monitor) -> None:
        await pilot.press("c", "r", "s", "enter", "down")
        await sees(pilot, app, "no runs here yet")
        assert app.chosen() is None

    drive(runs, Listing({}, None), act)


def test_run_that_is_taken_away_while_it_is_open(failed: Story, runs: Path):
    async def act(pilot: Pilot[None], app: Monitor) -> None:
        await pilot.press("enter")
        await sees(pilot, app, "first error")
        RunPaths(runs / "full-1").root.rename(runs.parent / "elsewhere")
        app.show(observe(runs, LISTING).look())
        await sees(pilot, app, "it is gone")
        await pilot.press("escape")
        await sees(pilot, app, "no runs here yet")

    drive(runs, LISTING, act)


def test_names_are_no_markup_and_obey_no_terminal(runs: Path):
    story = begin(runs, "[bold]x \x1b[31m\x1b]0;title\x07y")
    story.attempt(steps=range(1, 5))

    async def act(pilot: Pilot[None], app: Monitor) -> None:
        await sees(pilot, app, "[bold]x y")
        await pilot.press("enter")
        await sees(pilot, app, "[bold]x y", "events")

    drive(runs, Listing({}, None), act)


def test_board_that_comes_while_a_run_opens_or_closes(failed: Story, runs: Path):
    async def act(pilot: Pilot[None], app: Monitor) -> None:
        assert app.board is not None
        directory = app.board.sights[0].view.directory
        for _ in range(3):
            app.push_screen(RunScreen(directory, app.board))
            app.show(app.board)  # before anything of the screen is there
            await sees(pilot, app, "first error", "events")
            screen = app.screen
            assert isinstance(screen, RunScreen)
            screen.look()
            screen.action_back()
            app.show(app.board)
            await sees(pilot, app, "1 run ")

    drive(runs, LISTING, act)


def test_file_system_that_hangs_is_told_of(runs: Path, monkeypatch: pytest.MonkeyPatch):
    on_slurm(runs, "full-1", "77")
    answers = threading.Event()

    async def act(pilot: Pilot[None], app: Monitor) -> None:
        look = app._observatory.look

        def hang() -> Board:
            assert answers.wait(60.0)
            return look()

        monkeypatch.setattr(app._observatory, "look", hang)
        app.look()
        app.look()
        await pilot.pause()
        assert "do not answer" not in text_of(app)  # not at once
        monkeypatch.setattr("launchers.monitor.app.SECONDS_TO_ANSWER", 0.0)
        app.look()
        await sees(pilot, app, "run directories do not answer for 0 s; this is as of ")
        await pilot.press("enter")
        app.look()
        await sees(pilot, app, KEYS_OF_A_RUN, "run directories do not answer for 0 s; this is as of ")
        answers.set()
        await sees_no_more(pilot, app, "do not answer")
        await pilot.press("escape")
        await sees(pilot, app, "1 run ")
        assert "do not answer" not in text_of(app)

    try:
        drive(runs, LISTING, act)
    finally:
        answers.set()


def test_view_that_cannot_go_on_does_not_stand_still(runs: Path, monkeypatch: pytest.MonkeyPatch):
    observatory = observe(runs, Listing({}, None))

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(observatory, "look", fail)

    async def session() -> None:
        app, deadline = Monitor(observatory), time.monotonic() + SECONDS_OF_PATIENCE
        async with app.run_test() as pilot:
            while app.is_running and time.monotonic() < deadline:
                await pilot.pause(0.02)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(session())


@pytest.mark.parametrize(("now", "by", "then"), [(0, 1, 2), (2, 1, 5), (5, 1, 5), (0, -1, 0), (3, -1, 2), (3, 1, 5)])
def test_neighbours(now: int, by: int, then: int):
    assert neighbour([0, 2, 5], now, by) == then
