"""How runs stand: records as jobs leave them, Slurm's words as Slurm 22.05 says them, and the verdict for a person."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import psutil
import pytest

from encdec.errors import ConfigError, RunDirectoryError
from encdec.files import RunPaths
from encdec.records import JsonLinesWriter, event, read_ends
from launchers import slurm
from launchers.names import find_run
from launchers.run_directory import note
from launchers.slurm import JobState
from launchers.status import main
from launchers.views.overview import look
from launchers.views.tables import age
from tests.launchers.conftest import UNREACHABLE, Play, Story

LISTED = "12|RUNNING|None|2026-11-21T09:39:56\n13|PENDING|Dependency|N/A\n14|PENDING|BeginTime|2026-11-21T09:41:45\n"
NO_CONTROLLER = {"err": UNREACHABLE, "code": 1}


def test_states_of_many_jobs_cost_one_squeue_and_one_sacct(play: Play):
    play("squeue", LISTED)
    play("sacct", "15|CANCELLED by 0\n16|OUT_OF_MEMORY\n17|RUNNING\n")
    states = slurm.job_states(["12", "13", "14", "15", "16", "17", "18"])
    expected = slurm.parse_time("2026-11-21T09:41:45")
    assert states["12"] == JobState("RUNNING")
    assert states["13"] == JobState("PENDING", "Dependency")
    assert states["14"] == JobState("PENDING", "BeginTime", expected)
    assert [states[job].state for job in ("15", "16", "17", "18")] == [
        "CANCELLED", "OUT_OF_MEMORY", slurm.GONE, slurm.GONE,
    ]  # fmt: skip
    assert len(play.calls("squeue")) == len(play.calls("sacct")) == 1


def test_jobs_that_are_all_listed_are_no_business_of_accounting(play: Play):
    play("squeue", LISTED)
    slurm.job_states(["12", "14"])
    assert not play.calls("sacct")
    assert slurm.job_states([]) == {} and len(play.calls("squeue")) == 1


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [
        (NO_CONTROLLER, {"out": "12|COMPLETED\n"}, "COMPLETED"),
        (NO_CONTROLLER, {"out": "12|PENDING\n"}, slurm.UNKNOWN),
        (NO_CONTROLLER, NO_CONTROLLER, slurm.UNKNOWN),
        ({"err": "slurm_load_jobs error: Invalid job id specified", "code": 1}, NO_CONTROLLER, slurm.GONE),
        ({"out": ""}, NO_CONTROLLER, slurm.GONE),
    ],
)
def test_silence_is_no_end(play: Play, squeue: dict, sacct: dict, state: str):
    play("squeue", **squeue)
    play("sacct", **sacct)
    assert slurm.job_states(["12"])["12"].state == state


def words_of(story: Story) -> tuple[str, str]:
    [view] = look([story.paths], forgiving=False)
    return view.standing.state, view.standing.words


def test_life_of_a_run_on_slurm(story: Story, play: Play):
    assert words_of(story) == ("new", "not started")
    story.job(None)
    assert words_of(story)[0] == "unknown"
    story.job("12")
    play("squeue", "12|PENDING|Resources|2031-11-21T09:41:45\n")
    waits = "job 12 is PENDING (Resources, expected to start 2031-11-21 09:41)"
    assert words_of(story) == ("pending", waits)
    story.attempt("12", steps=range(1, 10))
    story.runs_in("12")
    play("squeue", "12|RUNNING|None|N/A\n")
    assert words_of(story) == ("running", "job 12 is RUNNING")
    story.end("signalled", 75)
    story.tell("next", move="again", ending="none", given_up=None)
    story.tell("requeued", job="12", detail=None)
    play("squeue", "12|PENDING|BeginTime|N/A\n")
    assert words_of(story) == ("pending", "job 12 is PENDING (BeginTime)")
    play("squeue", **NO_CONTROLLER)
    assert words_of(story)[0] == "unknown"  # it may come back
    play("squeue", "12|CANCELLED|None|N/A\n")
    assert words_of(story) == ("cancelled", "cancelled by user")


@pytest.mark.parametrize(
    ("cause", "exit_code", "following", "expected"),
    [
        ("complete", 0, {"move": "stop"}, ("complete", "complete")),
        ("gate", 3, {"move": "stop"}, ("gate", "gate not passed")),
        ("refused", 78, {"move": "stop"}, ("refused", "refused")),
        ("crash", 1, {"move": "stop"}, ("crashed", "crashed")),
        ("stop_requested", 75, {"move": "stop"}, ("stopped", "stopped")),
        ("signalled", 75, {"move": "stop", "ending": "cancelled"}, ("cancelled", "cancelled by user")),
        ("signalled", 75, {"move": "stop", "given_up": "2 attempts"}, ("stopped", "given up after 2 attempts")),
    ],
)
@pytest.mark.parametrize("squeue", [{"out": "12|COMPLETED|None|N/A\n"}, NO_CONTROLLER], ids=["ended", "silent"])
def test_last_word_of_a_job_outlives_it(story: Story, play: Play, cause, exit_code, following, expected, squeue):
    story.job("12")
    story.runs_in("12")
    story.attempt("12", steps=range(1, 10))
    story.end(cause, exit_code)
    story.tell("next", **following)
    play("squeue", **squeue)
    assert words_of(story) == expected


def test_end_without_a_word(story: Story, play: Play):
    story.job("12")
    play("squeue", "12|FAILED|None|N/A\n")
    assert words_of(story) == ("lost", "ended before its first attempt (job 12: FAILED)")
    story.attempt("12")
    story.runs_in("12", "13")
    play("squeue", "12|NODE_FAIL|None|N/A\n13|PENDING|Priority|N/A\n")
    assert words_of(story) == ("pending", "job 13 is PENDING (Priority)")
    play("squeue", "12|NODE_FAIL|None|N/A\n13|CANCELLED|None|N/A\n")
    assert words_of(story) == ("cancelled", "cancelled by user")
    story.runs_in("13")  # the predecessor's own end does not matter any more
    play("squeue", "12|CANCELLED|None|N/A\n13|TIMEOUT|None|N/A\n")
    assert words_of(story) == ("lost", "ended without a word (job 13: TIMEOUT)")


def test_attempt_outside_slurm(story: Story, play: Play):
    story.job("12")  # submitted long ago
    me = psutil.Process()
    story.attempt(host=socket.gethostname(), pid=me.pid)
    process = json.loads(story.newest.process.read_text()) | {"created": me.create_time()}
    story.newest.process.write_text(json.dumps(process))
    assert words_of(story) == ("running", "running here")
    assert not play.calls("squeue")  # the old job is none of its business
    story.newest.process.write_text(json.dumps(process | {"host": "elsewhere"}))
    assert words_of(story) == ("running", "running on elsewhere")
    story.newest.process.write_text(json.dumps(process | {"pid": 2**22 + 1}))
    assert words_of(story) == ("lost", "ended without a word")
    story.end("stop_requested", 75)
    assert words_of(story) == ("stopped", "stopped")
    note(story.paths, "cancelled")
    assert words_of(story) == ("cancelled", "cancelled by user")


def test_one_line_a_run_and_one_question_to_slurm(story: Story, runs: Path, play: Play, capsys):
    note(story.paths, "command", text="python -m launchers.submit --phase medium", directory="/home/a b")
    for name, job in (("medium-2", "12"), ("medium-3", "13")):
        other = Story(RunPaths(runs / name)).begin()
        other.job(job)
    story.attempt(steps=range(1, 10))
    story.end("stop_requested", 75)
    broken = Story(RunPaths(runs / "medium-4")).begin()
    broken.attempt()
    broken.newest.process.write_text("{}")
    RunPaths(runs / "medium-5").make()  # without run.yaml
    (runs / "notes").mkdir()  # no run
    play("squeue", "12|RUNNING|None|N/A\n13|PENDING|Priority|N/A\n")
    assert main(["--root", str(runs)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"medium-{n}" for n in (1, 2, 3, 4, 5)]
    assert header.split() == ["run", "phase", "state", "gate", "attempts", "step", "loss", "heard", "of", "alerts"]
    for line, words in zip(
        lines,
        ("stopped, continue with submit", "job 12 is RUNNING", "job 13 is PENDING", "damaged: ", "damaged: none in"),
        strict=True,
    ):
        assert words in line
    assert "9 of 60  6.1000  heartbeat" in lines[0]
    assert len(play.calls("squeue")) == 1

    assert main(["--root", str(runs), "--json"]) == 0
    documents = json.loads(capsys.readouterr().out)["runs"]
    assert len({tuple(document) for document in documents}) == 1  # the same keys
    assert [document["state"] for document in documents] == ["stopped", "running", "pending", "damaged", "damaged"]
    assert documents[0]["next"] == "cd '/home/a b' && python -m launchers.submit --phase medium"
    assert documents[2]["job"] == {"id": "13", "state": "PENDING", "reason": "Priority", "start": None}


def test_one_run_tells_its_attempts(story: Story, runs: Path, play: Play, capsys):
    story.job("12")
    story.attempt("12", steps=range(1, 10))
    story.tell("restarting", restart=1)
    story.tell("successor_queued", job="13")
    story.end("signalled", 75)
    story.tell("next", move="again", ending="none", given_up=None)
    story.tell("requeued", job="12", detail=None)
    story.tell("successor_cancelled", job="13", detail=None)
    story.attempt("12", steps=range(10, 13))
    story.runs_in("12")
    play("squeue", "12|RUNNING|None|N/A\n")
    assert main(["medium", "--root", str(runs)]) == 0
    _, run, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert "12 of 60  5.8000" in run
    assert first.split()[:6] == ["0", "12", "n1", "signalled", "1-9", "0"]
    assert first.endswith("  successor 13 queued; job 12 requeued; successor 13 cancelled")
    assert second.split() == ["1", "12", "n1", "not", "yet", "10-12", "0"]


def test_alerts_and_roll_backs_are_told(story: Story, runs: Path, play: Play, capsys):
    story.attempt(steps=range(1, 30))
    said = {"type": "loss_spike", "value": 9.0, "threshold": 2.0, "message": "loss 9 is 3 times the mean"}
    ranks = story.newest.events("rank-0")
    with JsonLinesWriter(ranks) as ledger:
        for step, occurrences in ((12, 1), (20, 9), (25, 1)):  # eight are held back; then the ranks began again
            ledger.write(event("alert", step=step, occurrences=occurrences, **said))
        ledger.write(event("rolled_back", from_step=25, to_step=20, cause="loss_spike"))
        ledger.write(event("alert", type="nan"))  # of another version: without a message
    story.end("stop_requested", 75)
    assert main(["--root", str(runs)]) == 0
    assert "10 loss_spike, 1 nan, rolled back 1x" in capsys.readouterr().out
    assert main(["medium", "--root", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "step 25, loss_spike: loss 9 is 3 times the mean" in shown
    assert "step 25, rolled_back: from step 25 to step 20: loss_spike" in shown
    assert main(["--root", str(runs), "--json"]) == 0
    [run] = json.loads(capsys.readouterr().out)["runs"]
    assert run["attempts"][0]["alerts"] == {"loss_spike": 10, "nan": 1}
    assert run["attempts"][0]["rollbacks"] == 1 and len(run["attempts"][0]["newest_troubles"]) == 5


def test_nothing_there(tmp_path: Path, capsys):
    assert main(["--root", str(tmp_path / "none")]) == 0
    assert "no runs in" in capsys.readouterr().out
    assert main(["--root", str(tmp_path / "none"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": []}


def test_odd_lines_of_one_ledger_hide_no_other_run(story: Story, runs: Path, play: Play, capsys):
    note(story.paths, "command", text="python -m launchers.submit", directory="/home/a")
    with story.paths.events.open("a") as ledger:
        ledger.write('{"event": "cancelled", "time": null}\n{"event": "command"}\n{"event": "command", "text": 3}\n')
    story.attempt()
    story.end("stop_requested", 75)
    odd = Story(RunPaths(runs / "medium-2")).begin()
    odd.attempt()
    odd.tell("alert")
    with odd.newest.events("node-0").open("a") as ledger:
        ledger.write('{"event": ["a", "list"]}\n')
    assert main(["--root", str(runs), "--json"]) == 0
    documents = json.loads(capsys.readouterr().out)["runs"]
    assert [document["state"] for document in documents] == ["stopped", "damaged"]
    assert documents[0]["next"] == "cd /home/a && python -m launchers.submit"
    assert main(["medium-2", "--root", str(runs)]) == 78
    assert "medium-2 that has not (TypeError" in " ".join(capsys.readouterr().err.split())


def test_damaged_run_asked_for_by_name_is_an_error(story: Story, runs: Path, capsys):
    story.paths.run_yaml.write_text("{")
    assert main(["medium-1", "--root", str(runs)]) == 78
    assert "Traceback" not in capsys.readouterr().err


def test_real_run(twin: RunPaths, tmp_path: Path, capsys):
    shutil.copytree(twin.root, tmp_path / "runs" / "twin", symlinks=True)
    assert main(["--root", str(tmp_path / "runs"), "--json"]) == 0
    [document] = json.loads(capsys.readouterr().out)["runs"]
    assert (document["state"], document["step"], document["checkpoint"]) == ("complete", 60, "step-60")
    assert document["next"] is None and document["attempts"][0]["first_step"] == 1


def test_ends_of_a_long_file(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    assert read_ends(path) == (None, None)
    path.write_text("")
    assert read_ends(path) == (None, None)
    path.write_text("".join(json.dumps({"step": step, "padding": "x" * 90}) + "\n" for step in range(2000)) + '{"st')
    first, last = read_ends(path)
    assert first and last and (first["step"], last["step"]) == (0, 1999)


@pytest.fixture
def named(runs: Path) -> Path:
    for name in ("medium-1a", "medium-1b", "small", "small-2"):
        Story(RunPaths(runs / name)).begin()
    return runs


@pytest.mark.parametrize(("word", "name"), [("medium-1a", "medium-1a"), ("medium-1b", "medium-1b"), ("small", "small")])
def test_names_of_runs(named: Path, word: str, name: str, monkeypatch: pytest.MonkeyPatch):
    assert find_run(word, named).root == named / name
    assert find_run(str(named / word), Path("elsewhere")).root == named / name
    monkeypatch.chdir(named)
    assert find_run(word, Path("elsewhere")).root == named / name


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("medium", "with which 2 begin: medium-1a, medium-1b"),
        ("smal-2", "Did you mean small-2"),
        ("xyz", "There are medium-1a, medium-1b, small, small-2"),
        ("", "There are medium-1a"),  # an empty variable of a script cancels nothing
        (".", "There are medium-1a"),
    ],
)
def test_names_of_no_run(named: Path, word: str, said: str):
    with pytest.raises(ConfigError, match=said):
        find_run(word, named)


def test_path_of_no_run(named: Path):
    for path in ("runs/none", "/etc"):
        with pytest.raises(RunDirectoryError, match="must be that of a run directory"):
            find_run(path, named)
    (named / "file").touch()
    with pytest.raises(RunDirectoryError, match="can be listed"):
        find_run("a", named / "file")


def test_directory_that_cannot_be_read(named: Path, capsys):
    """For root, too, whom no mode keeps out: a link to itself."""
    run_yaml = named / "small" / "run.yaml"
    run_yaml.unlink(missing_ok=True)
    run_yaml.symlink_to(run_yaml)
    assert main(["--root", str(named)]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("small ")]
    assert "damaged" in row


def test_ages():
    assert [age(seconds) for seconds in (-3, 0.2, 59, 60)] == ["0 s", "0 s", "59 s", "1 min"]
    assert [age(seconds) for seconds in (7200, 200000)] == ["2 h", "2 d"]
