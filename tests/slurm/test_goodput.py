"""The ledger of a run that a real cluster has interrupted, against sums done by hand over its records."""

from __future__ import annotations

import contextlib
import json
from statistics import median

import psutil
import pytest

from encdec.files import RunPaths
from encdec.records import read_json_lines
from launchers import report
from launchers.bookkeeping.ledger import Part
from launchers.slurm import END_STATES
from launchers.views.retrospect import look_back
from tests.conftest import wait_for_step, wait_until
from tests.slurm.conftest import find_ranks, ledger, outcome

pytestmark = pytest.mark.slurm


def productive_by_hand(paths: RunPaths) -> float:
    """Seconds of the newest computation of each step, and of its evaluation. The first step after a start counts as
    the median of the start's others: what it took beyond that is start-up.
    """
    newest: dict[int, float] = {}
    evaluated: dict[int, float] = {}
    for number in paths.attempt_numbers():
        steps = list(read_json_lines(paths.attempt(number).steps))
        for restart in sorted({record["restart"] for record in steps}):
            first, *others = [record for record in steps if record["restart"] == restart]
            ordinary = median(record["step_seconds"] for record in others or [first])
            newest |= {record["step"]: record["step_seconds"] for record in others}
            newest[first["step"]] = min(ordinary, first["step_seconds"])
        ended = {record["step"]: record["time"] for record in steps}
        for event in ledger(paths.attempt(number).events("rank-0"), "evaluated"):
            evaluated[event["step"]] = event["time"] - ended[event["step"]]
    return sum(newest.values()) + sum(evaluated.values())


def test_ettr_is_as_counted_by_hand(submit, twin: RunPaths, twin_digest: str, monkeypatch, capsys, tmp_path):
    """Warned and requeued; a rank killed, and started again in place; the whole job killed, and submitted again."""
    run = submit()
    submitted = json.loads(run.paths.job.read_text())["submitted"]
    wait_for_step(run.paths, 10)
    run.warn()
    run.lift_hold()
    wait_for_step(run.paths, 24, attempt=1)
    find_ranks(run.paths)[0].kill()
    wait_until(lambda: run.events("restarting", attempt=1), "the ranks start again")
    wait_for_step(run.paths, 40, attempt=1)
    for process in [process for node in run.nodes() for process in run.processes_on(node)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.eventually(lambda: run.state(run.job) in END_STATES, 60)
    run.ends_like(twin, twin_digest)

    monkeypatch.setenv("SLURM_CONF", str(run.cluster.sandbox.layout.slurm_conf))
    found = look_back(run.paths, now=0.0)
    last = run.paths.attempt_numbers()[-1]
    wall = outcome(run.paths, last)["time"] - submitted
    ettr = productive_by_hand(run.paths) / wall
    print(f"by hand {ettr:.5f} of {wall:.2f} s; ledger {found.ledger.ettr:.5f} of {found.ledger.wall:.2f} s")
    assert found.ledger.ettr == pytest.approx(ettr, rel=0.01)
    assert found.ledger.wall == pytest.approx(wall, rel=0.01)
    assert sum(found.ledger.totals.values()) == pytest.approx(wall, rel=0.01)
    assert [each.cause for each in found.ledger.interruptions] == ["signalled", "rank died", "killed"]
    steps = run.steps()
    again = sum(map(len, steps)) - 60
    assert again > 0
    assert (found.ledger.steps, found.ledger.lost_steps) == (60, again)
    totals = found.ledger.totals
    told = (Part.QUEUE, Part.LAUNCH, Part.IMPORTS, Part.RENDEZVOUS, Part.LOAD, Part.DOWN, Part.CLOSING, Part.SAVE_STALL)
    assert all(totals[part] > 0 for part in told)
    assert totals[Part.START_UP] == 0  # every start has left its marks
    assert report.main([str(run.paths.root), "--html", str(tmp_path / "report.html")]) == 0
    assert report.main([str(run.paths.root)]) == 0
    assert "rank died" in capsys.readouterr().out
