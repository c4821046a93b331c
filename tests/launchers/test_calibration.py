"""What earlier runs measured: read from real run directories, and from records with known times."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from encdec.errors import ConfigError
from encdec.files import RunPaths, atomic_write_json
from encdec.records import JsonLinesWriter, Outcome, ProcessRecord, read_json_lines, read_record
from launchers.planning.calibration import EarlierRuns, calibrate_from, earlier_runs, measure, read_plan
from launchers.submit import main
from tests.conftest import MICRO
from tests.launchers.conftest import step_record

STEP, GAP, PAUSE, STARTUP, FINISH = 0.5, 0.1, 2.0, 7.0, 3.0
"""Seconds of the records below: a step, what lies between two, an evaluation, before the first and after the last."""


def plan(**forecast: Any) -> dict[str, Any]:
    facts = {
        "parameters": 35_072, "device": "cpu", "gpu": None, "bytes_per_value": 4, "activation_checkpointing": False,
        "sharding": "FSDP2 FULL_SHARD", "flops_per_step": 6e9,
    }  # fmt: skip
    own = {"nodes": 1, "ranks_per_node": 2, "tokens_per_step": 384, "sample_length": 48, "micro_batch_size": 4}
    return {**own, "forecast": facts | forecast}


def record(root: Path, steps: int = 20, **changes: Any) -> RunPaths:
    """A run directory with one attempt of known times: evaluated after every fifth step."""
    paths = RunPaths(root)
    paths.make()
    atomic_write_json(paths.plan, {**plan(), **changes})
    attempt = paths.attempt(paths.claim_attempt())
    atomic_write_json(attempt.process, ProcessRecord(host="n1", pid=1, created=1000.0).to_json())
    time = 1000.0 + STARTUP - GAP
    with JsonLinesWriter(attempt.steps) as writer, JsonLinesWriter(attempt.events("rank-0")) as events:
        for step in range(1, steps + 1):
            time += GAP + STEP + (PAUSE if step > 1 and step % 5 == 1 else 0.0)
            writer.write({**step_record(step).to_json(), "time": time, "step_seconds": STEP})
            if step % 5 == 0:
                events.write({"event": "evaluated", "step": step, "time": time})
                events.write({"event": "saved", "step": step, "time": time, "seconds": 0.4, "blocking_seconds": 0.1})
    outcome = Outcome(cause="complete", exit_code=0, step=steps, checkpoint=None, message="", time=time + FINISH)
    atomic_write_json(attempt.outcome, outcome.to_json())
    return paths


def test_times_come_back_from_the_records(tmp_path: Path):
    found = measure(record(tmp_path / "run"))
    assert found is not None
    assert found.step_seconds == pytest.approx(STEP + GAP)
    assert found.pause_seconds == pytest.approx(PAUSE)
    assert found.startup_seconds == pytest.approx(STARTUP)
    assert found.finish_seconds == pytest.approx(FINISH)
    assert (found.blocking_seconds, found.save_seconds) == (pytest.approx(0.1), pytest.approx(0.4))
    assert found.flops_per_second == pytest.approx(6e9 / STEP / 2)
    assert (found.steps, found.ranks, found.tokens_per_step, found.source) == (18, 2, 384, "run")


def test_too_few_steps_measure_nothing(tmp_path: Path):
    assert measure(record(tmp_path / "run", steps=6)) is None
    assert measure(RunPaths(tmp_path / "none")) is None


def test_damaged_records_measure_nothing(tmp_path: Path):
    paths = record(tmp_path / "run")
    atomic_write_json(paths.attempt(0).process, {"created": "yesterday"})
    assert measure(paths) is None
    assert measure(record(tmp_path / "no-ranks", nodes=None)) is None
    assert EarlierRuns([tmp_path]).calibrate(plan()) is None


def rewritten(paths: RunPaths, change: Callable[[dict[str, Any]], dict[str, Any]]) -> RunPaths:
    """With other step records."""
    file = paths.attempt(0).steps
    changed = [change(step) for step in list(read_json_lines(file))]
    file.unlink()
    with JsonLinesWriter(file) as writer:
        for step in changed:
            writer.write(step)
    return paths


def test_what_lies_between_steps_across_a_restart_is_neither_step_nor_pause(tmp_path: Path):
    def restarted(step: dict[str, Any]) -> dict[str, Any]:
        """Started again in place after step 10, where it had been evaluated, back at step 9."""
        late = step["step"] > 10
        return step | ({"step": step["step"] - 2, "restart": 1, "time": step["time"] + 600} if late else {})

    found = measure(rewritten(record(tmp_path / "run", steps=12), restarted))
    assert found is not None
    assert (found.step_seconds, found.pause_seconds) == (pytest.approx(STEP + GAP), pytest.approx(PAUSE))

    def rolled_back(step: dict[str, Any]) -> dict[str, Any]:
        return restarted(step) | {"restart": 0}

    found = measure(rewritten(record(tmp_path / "rolled-back", steps=12), rolled_back))
    assert found is not None and found.pause_seconds == pytest.approx(PAUSE)


def test_a_few_slow_steps_do_not_move_the_step(tmp_path: Path):
    slow = {6, 12, 18}

    def stalled(step: dict[str, Any]) -> dict[str, Any]:
        longer = 100.0 * sum(each <= step["step"] for each in slow)
        return step | {"time": step["time"] + longer, "step_seconds": STEP + 100.0 * (step["step"] == 12)}

    found = measure(rewritten(record(tmp_path / "run"), stalled))
    assert found is not None and found.step_seconds == pytest.approx(STEP + GAP)


@pytest.mark.parametrize("damage", ["chain", "chain folder", "steps folder", "endless step", "tokens in words"])
def test_damage_in_another_run_measures_nothing_and_refuses_nothing(tmp_path: Path, damage: str):
    paths = record(tmp_path / "chain-1" / "sanity_check" if damage.startswith("chain") else tmp_path / "run")
    if damage == "chain":
        (tmp_path / "chain-1" / "chain.json").write_text("{")
    elif damage == "chain folder":
        (tmp_path / "chain-1" / "chain.json").mkdir()
    elif damage == "steps folder":
        paths.attempt(0).steps.unlink()
        paths.attempt(0).steps.mkdir()
    elif damage == "endless step":
        rewritten(paths, lambda step: step | {"step_seconds": math.inf})
    else:
        atomic_write_json(paths.plan, {**plan(), "tokens_per_step": "many"})
    assert EarlierRuns([tmp_path]).calibrate(plan()) is None
    record(tmp_path / "whole")
    assert EarlierRuns([tmp_path]).calibrate(plan()).source == "whole"  # type: ignore[union-attr]


def test_most_similar_run_of_the_same_model_is_taken(tmp_path: Path):
    record(tmp_path / "other-lengths", sample_length=96)
    record(tmp_path / "same")
    record(tmp_path / "other-model", forecast={**plan()["forecast"], "parameters": 1})
    record(tmp_path / "gpu", forecast={**plan()["forecast"], "device": "cuda"})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "plan.json").write_text("{")
    assert EarlierRuns([tmp_path]).calibrate(plan()).source == "same"  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "same")
    assert EarlierRuns([tmp_path, tmp_path / "nowhere"]).calibrate(plan()).source == "other-lengths"  # type: ignore[union-attr]
    assert EarlierRuns([tmp_path]).calibrate(plan(parameters=2)) is None
    assert EarlierRuns([tmp_path]).calibrate(plan(parameters=None)) is None


def test_phases_of_a_chain_are_earlier_runs_too(tmp_path: Path):
    record(tmp_path / "chain-1" / "sanity_check")
    atomic_write_json(tmp_path / "chain-1" / "chain.json", {"phases": {"sanity_check": "sanity_check"}})
    assert [paths.root.name for paths, _ in earlier_runs([tmp_path])] == ["sanity_check"]


def test_run_that_is_named_must_fit(tmp_path: Path):
    paths = record(tmp_path / "run")
    assert calibrate_from(plan(), paths).source == "run"
    with pytest.raises(ConfigError, match="same model, device, precision and engine"):
        calibrate_from(plan(parameters=1), paths)
    with pytest.raises(ConfigError, match="no plan with a forecast"):
        calibrate_from(plan(), RunPaths(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="attempt of 7 steps"):
        calibrate_from(plan(), record(tmp_path / "short", steps=3))


def test_a_run_may_be_named_by_its_beginning(twin: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/measured-before").symlink_to(twin.root)
    arguments = ["--phase", "sanity_check", "--config", str(MICRO), "--cluster", "local", "--dry-run", "--json"]
    assert main([*arguments, "--calibrate-from", "measured"]) == 0
    [foreseen] = json.loads(capsys.readouterr().out)
    assert foreseen["forecast"]["basis"].startswith("measured by measured-before")
    assert main([*arguments, "--calibrate-from", "mesured-before"]) == 78
    assert "Did you mean measured-before?" in capsys.readouterr().err


def test_real_run_foresees_itself(twin: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Hours of the same run, from what its own records say, are what it took."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--phase", "sanity_check", "--config", str(MICRO), "--cluster", "local", "--dry-run", "--json"]
    assert main([*arguments, "--calibrate-from", str(twin.root)]) == 0
    [foreseen] = json.loads(capsys.readouterr().out)
    attempt = twin.attempt(0)
    began, ended = read_record(attempt.process, ProcessRecord).created, read_record(attempt.outcome, Outcome).time
    assert 3600 * foreseen["forecast"]["training_hours"] == pytest.approx(ended - began, rel=0.2)
    assert foreseen["forecast"]["basis"].startswith("measured by twin")
    assert foreseen["sbatch"] is None and not list(tmp_path.iterdir())
    stored = read_plan(twin)
    assert stored is not None and stored["forecast"]["memory_gb"]["total_gb"] > 0
    assert len(list(read_json_lines(attempt.steps))) == 60
