"""A look at a file costs what is new of it."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from encdec.files import RunPaths
from encdec.records import records_of
from launchers.views.growing_files import GrowingFile, Memory, records_between
from launchers.views.vitals import BYTES_OF_THE_NEWEST, CURVE_POINTS, NEWEST_STEPS, Curve, Pulse, Vitals
from tests.launchers.conftest import Story, step_record


def append(path: Path, text: str) -> None:
    with path.open("a") as stream:
        stream.write(text)


def test_each_line_is_read_once(tmp_path: Path):
    path = tmp_path / "lines"
    file = GrowingFile(path)
    assert file.fresh() == []
    append(path, "one\ntwo\nthr")
    assert file.fresh() == [b"one", b"two"]
    assert file.fresh() == []
    append(path, "ee\n")
    assert file.fresh() == [b"three"]
    assert file.bytes_read == path.stat().st_size + 2 * len("thr")  # nothing but the torn end more than once


@pytest.mark.parametrize("how", ["cut", "replaced"])
def test_file_that_begins_anew_is_read_anew(tmp_path: Path, how: str):
    path = tmp_path / "lines"
    path.write_text("one\ntwo\n")
    file = GrowingFile(path)
    assert len(file.fresh()) == 2
    if how == "replaced":
        path.rename(tmp_path / "old")
        path.write_text("three\nfour\nfive\n")
    else:
        os.truncate(path, 0)
        append(path, "six\n")
    assert file.fresh()[0] in (b"three", b"six")
    assert file.beginnings == 2


def test_only_the_end_of_what_is_long_is_read(tmp_path: Path):
    path = tmp_path / "lines"
    path.write_text("".join(f"line {number}\n" for number in range(10_000)))
    file = GrowingFile(path, last_bytes=100)
    lines = file.fresh()
    assert file.bytes_read == 100
    assert lines[-1] == b"line 9999" and all(line.startswith(b"line 99") for line in lines)
    append(path, "more\n")
    assert file.fresh() == [b"more"]


def test_torn_and_foreign_lines_are_skipped():
    assert list(records_of([b'{"a": 1}', b'{"a": ', b"[1]", b"", b"\xff", b'{"b": 2}'])) == [{"a": 1}, {"b": 2}]


def test_places_of_a_long_file_are_evenly_spaced(tmp_path: Path):
    path = tmp_path / "records"
    path.write_text("".join(json.dumps({"n": number, "pad": "x" * 200}) + "\n" for number in range(20_000)))
    numbers = [record["n"] for record in records_between(path, 20)]
    assert len(numbers) == 20 and numbers[0] == 0 and numbers == sorted(numbers)
    gaps = [later - earlier for earlier, later in itertools.pairwise(numbers)]
    assert max(gaps) < 1.1 * min(gaps)


def test_memory_reads_what_has_changed(tmp_path: Path):
    path, memory = tmp_path / "file", Memory()

    def read() -> str:
        return path.read_text() if path.exists() else "none"

    assert [memory.recall((path,), read) for _ in range(3)] == ["none"] * 3
    assert memory.reads == 1
    path.write_text("one")
    assert memory.recall((path,), read) == "one"
    path.write_text("another")
    assert memory.recall((path,), read) == "another"
    path.unlink()
    assert memory.recall((path,), read) == "none"
    assert memory.reads == 4


def test_ledger_that_begins_anew_has_no_record_twice(tmp_path: Path):
    path, memory = tmp_path / "events.jsonl", Memory()
    append(path, '{"event": "a"}\n')
    assert memory.ledger(path) == [{"event": "a"}]
    append(path, '{"event": "b"}\n')
    assert memory.ledger(path) == [{"event": "a"}, {"event": "b"}]
    path.write_text('{"event": "c"}\n')
    assert memory.ledger(path) == [{"event": "c"}]


# ---- vitals


def test_million_steps_are_not_read_at_each_look(story: Story):
    """Nor at the first: a look at 10^6 records reads as much as one at 10^4, and later looks what is new."""
    story.attempt()
    line, last = (json.dumps(step_record(step).to_json()) for step in (1, 1_000_000))
    block = f"{line}\n" * 9_999
    with story.newest.steps.open("w") as stream:
        for _ in range(100):
            stream.write(f"{block}{last}\n")
    pulse = Pulse(story.paths)
    assert pulse.look([0]).step == 1_000_000
    assert pulse.bytes_read == BYTES_OF_THE_NEWEST
    append(story.newest.steps, json.dumps(step_record(1_000_001).to_json()) + "\n")
    before = pulse.bytes_read
    assert pulse.look([0]).step == 1_000_001
    assert pulse.bytes_read - before < 2 * len(line)
    before = pulse.bytes_read
    assert pulse.look([0]).step == 1_000_001
    assert pulse.bytes_read == before
    story.newest.steps.unlink()  # some hundred megabytes


def test_vitals_are_those_of_the_newest_steps(story: Story):
    story.attempt(steps=range(1, 101))
    vitals = Pulse(story.paths).look([0])
    assert (vitals.step, vitals.loss, vitals.tokens_seen) == (100, step_record(100).loss, 38_400)
    assert vitals.step_seconds == pytest.approx(0.04)
    assert vitals.tokens_per_second == pytest.approx(9000.0)
    assert vitals.seconds_left(150) == pytest.approx(50 * 0.04)
    assert vitals.losses == tuple(step_record(step).loss for step in range(1, 101))
    slow = [step_record(step).to_json() | {"step_seconds": 1.0, "data_seconds": 0.25} for step in range(101, 151)]
    append(story.newest.steps, "".join(json.dumps(record) + "\n" for record in slow))
    assert len(slow) == NEWEST_STEPS
    vitals = Pulse(story.paths).look([0])
    assert (vitals.step_seconds, vitals.data_wait) == (pytest.approx(1.0), pytest.approx(0.25))
    assert vitals.seconds_left(160) == pytest.approx(10.0)


def test_what_is_computed_again_counts_once(story: Story):
    story.attempt(steps=range(1, 31))
    pulse = Pulse(story.paths)
    assert len(pulse.look([0]).losses) == 30
    story.attempt(steps=range(21, 26))
    vitals = pulse.look([0, 1])
    assert (vitals.step, len(vitals.losses)) == (25, 25)
    assert Pulse(story.paths).look([0, 1]).losses == vitals.losses


def test_loss_that_is_no_number_has_no_place_in_the_curve(story: Story):
    story.attempt(steps=range(1, 3))
    append(story.newest.steps, json.dumps(step_record(3).to_json() | {"loss": float("nan")}) + "\n")
    vitals = Pulse(story.paths).look([0])
    assert (vitals.step, vitals.loss, len(vitals.losses)) == (3, None, 2)


def test_integer_beyond_all_floats_is_passed_over(story: Story):
    story.attempt(steps=range(1, 3))
    append(story.newest.steps, json.dumps(step_record(3).to_json() | {"loss": 10**400}) + "\n")
    vitals = Pulse(story.paths).look([0])
    assert (vitals.step, vitals.loss, len(vitals.losses)) == (2, step_record(2).loss, 2)


def test_run_without_steps_has_no_vitals(tmp_path: Path):
    assert Pulse(RunPaths(tmp_path)).look([0]) == Vitals()


def test_long_curve_is_thinned_out_evenly():
    curve = Curve()
    for step in range(1, 100_001):
        curve.add(step, float(step))
    losses = curve.losses
    assert CURVE_POINTS / 4 < len(losses) <= CURVE_POINTS
    gaps = [later - earlier for earlier, later in itertools.pairwise(losses)]
    assert losses[0] == 1.0 and losses[-1] > 99_000 and max(gaps) <= 3 * min(gaps)
