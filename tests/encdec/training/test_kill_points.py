"""A dozen kills at points that hypothesis draws; ``python -m benchmarks.kills`` makes as many as one wants."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from benchmarks import kill_points as at
from benchmarks.kill_points import Kill, Operation, classify
from benchmarks.killed_run import Figures, KilledRun
from benchmarks.undisturbed import Twin, make_run, make_twin

SHORT = ("training.num_train_steps=16",)
"""Four checkpoints."""
RUNS, KILLS_OF_A_RUN = 4, 3
AIMED_AT = (at.COPY, at.SHARD, at.BETWEEN, at.MANIFEST, at.BEFORE, at.AFTER, at.PRUNE, at.READ, at.ANY)


@st.composite
def kills(draw: st.DrawFn) -> Kill:
    """At the first operations of a place: what is drawn is met before the short run ends."""
    place = draw(st.sampled_from(AIMED_AT))
    return Kill(
        place=place,
        scope=draw(st.sampled_from(at.SCOPES)),
        victim=draw(st.sampled_from((0, 1))) if place in at.SHARED else 0,
        nth=draw(st.integers(1, 60 if place == at.ANY else 3)),
        delay=draw(st.sampled_from((0.0, 0.0, 0.001, 0.01))),
        overdue=60,
    )


@pytest.fixture(scope="module")
def lab(session_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Twin, Path, Path]:
    """(twin, packed text, folder for runs)"""
    folder = tmp_path_factory.mktemp("killed")
    return make_twin(folder, session_folder / "packed", *SHORT), session_folder / "packed", folder


def test_killed_runs_lose_no_checkpoint_and_end_as_their_twin(lab: tuple[Twin, Path, Path]):
    twin, packed, folder = lab
    figures, numbers = Figures(), count()

    @settings(max_examples=RUNS, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.lists(kills(), min_size=KILLS_OF_A_RUN, max_size=KILLS_OF_A_RUN))
    def run_with(drawn: list[Kill]) -> None:
        run = KilledRun(make_run(folder / f"run-{next(numbers)}", packed, *SHORT, like=twin.paths), twin, figures)
        try:
            for kill in (*drawn, None):
                if not run.complete:
                    run.go_on(kill)
                assert figures.failures == []
        finally:
            run.close()
        assert run.complete

    run_with()
    assert figures.runs == RUNS
    assert figures.killed >= RUNS * KILLS_OF_A_RUN * 3 // 4  # few may come too late


def test_damaged_checkpoint_and_kills_while_it_is_moved_away(lab: tuple[Twin, Path, Path]):
    twin, packed, folder = lab
    figures = Figures()
    run = KilledRun(make_run(folder / "damaged", packed, *SHORT, like=twin.paths), twin, figures)
    try:
        assert run.go_on(Kill(at.AFTER, "all ranks", 0, 3, 0.0, 10**6))
        for nth in (1, 2, 1):  # before the folder is made; before the move; before the reason is written
            assert run.go_on(Kill(at.QUARANTINE, "agent and all", 0, nth, 0.0, 10**6))
        assert run.go_on(Kill(at.REPLACE, "all ranks", 0, 2, 0.0, 10**6))  # between the two renames
        assert run.go_on(Kill(at.AVERAGE, "all ranks", 0, 40, 0.0, 10**6))  # its files are there, its name is not
        run.go_on(None)
    finally:
        run.close()
    assert figures.failures == []
    assert run.complete
    assert figures.quarantined >= 1
    assert {place for place, _ in figures.kills} == {at.AFTER, at.QUARANTINE, at.REPLACE, at.AVERAGE}


@pytest.mark.parametrize(
    ("operation", "before", "place"),
    [
        (Operation("copy", ""), at.READ, at.COPY),
        (Operation("remove", "step-4.tmp-0"), "", at.SHARD),
        (Operation("mkdir", "step-4.tmp-0/fsdp2"), "", at.SHARD),
        (Operation("write", "step-4.tmp-0/fsdp2/__0_0.distcp"), at.SHARD, at.SHARD),
        (Operation("write", "step-4.tmp-0/.trainer_state.json.x.tmp"), at.SHARD, at.BETWEEN),
        (Operation("read", "step-4.tmp-0/fsdp2/__0_0.distcp"), at.SHARD, at.BETWEEN),
        (Operation("rename", "step-4.tmp-0/.manifest.json.x.tmp", "step-4.tmp-0/manifest.json"), "", at.MANIFEST),
        (Operation("rename", "step-4.tmp-0", "step-4"), at.MANIFEST, at.BEFORE),
        (Operation("read", ""), at.BEFORE, at.AFTER),
        (Operation("rename", "step-4", "step-4.tmp-replaced-7"), at.MANIFEST, at.REPLACE),
        (Operation("rename", "step-4.tmp-0", "step-4"), at.REPLACE, at.REPLACE),
        (Operation("list", ""), at.AFTER, at.PRUNE),
        (Operation("read", "step-4/manifest.json"), at.PRUNE, at.PRUNE),
        (Operation("rename", "step-4", "step-4.tmp-deleted-7"), at.PRUNE, at.PRUNE),
        (Operation("read", "step-4/manifest.json"), "", at.READ),
        (Operation("rename", "step-4", "quarantine/step-4.1"), at.READ, at.QUARANTINE),
        (Operation("list", ""), "", at.CLEAR),
        (Operation("remove", "step-4.tmp-0"), at.CLEAR, at.CLEAR),
        (Operation("list", ""), at.CLEAR, at.READ),
        (Operation("rename", "step-4.tmp-replaced-7", "step-4"), "", at.CLEAR),
        (Operation("read", "step-4/manifest.json"), at.AVERAGE, at.AVERAGE),
        (Operation("read", ".average-4.x_1.tmp/fsdp2/.metadata"), "", at.AVERAGE),
    ],
)
def test_operations_are_told_apart(operation: Operation, before: str, place: str):
    assert classify(operation, before) == place
