"""prune: says what goes and why, and never takes the last valid one, the best, or what an average needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from encdec.checkpoints import CheckpointManager
from encdec.checkpoints import __main__ as command
from encdec.checkpoints.catalog import CheckpointInfo
from encdec.checkpoints.commands.shared import averaged_by
from encdec.checkpoints.pruning import Examined, judge
from encdec.errors import CheckpointError, UnreadableCheckpoint
from encdec.files import RunPaths
from tests.encdec.checkpoints.damage import Lab, flip, payload
from tests.encdec.checkpoints.test_unreadable_storage import loop


@pytest.fixture
def many(tmp_path: Path) -> CheckpointManager:
    """Steps 1 to 8, the best of which is 2."""
    manager, lab = CheckpointManager(tmp_path / "run" / "checkpoints", save_total_limit=99), Lab()
    for step in range(1, 9):
        lab.step()
        lab.save(manager, {"loss": abs(step - 2.0)})
    return manager


def steps_left(manager: CheckpointManager) -> list[int]:
    return [info.step for info in manager.list_checkpoints()]


def run(manager: CheckpointManager, *words: str) -> int:
    return command.main(["prune", str(manager.output_dir.parent), *words])


def test_what_goes_and_what_stays(many, capsys):
    assert run(many, "--keep", "2", "--dry-run") == 0
    dry = capsys.readouterr().out
    assert steps_left(many) == list(range(1, 9))
    assert run(many, "--keep", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert steps_left(many) == [2, 4, 5, 6, 7, 8]
    assert not list(many.output_dir.glob("*.tmp-*"))
    why = {line.split()[0]: line for line in lines}
    assert "deleted" in why["step-1"]
    assert "the best" in why["step-2"]
    assert "the average of the last 5 needs it" in why["step-4"]
    assert "one of the newest 2" in why["step-7"]
    assert "the last valid one" in why["step-8"]
    assert dry.replace("would be freed", "freed").replace("would go", "deleted ").split() == " ".join(lines).split()


def test_without_an_average(many, capsys):
    assert run(many, "--keep", "1", "--average", "0", "--json") == 0
    verdicts = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [verdict["checkpoint_id"] for verdict in verdicts if verdict["stays"]] == ["step-2", "step-8"]
    assert steps_left(many) == [2, 8]


def test_damaged_ones_do_not_count_as_kept_and_are_not_touched(many, capsys):
    for step in (8, 6):
        flip(payload(many.output_dir / f"step-{step}"))
    loop(payload(many.output_dir / "step-7"))
    assert run(many, "--keep", "2", "--average", "0") == 0
    assert steps_left(many) == [2, 4, 5, 6, 7, 8]
    shown = capsys.readouterr().out
    assert shown.count("does not verify") == 2
    assert shown.count("cannot be read") == 1
    many.validate("step-5")


def test_nothing_goes_where_nothing_verifies(many, capsys):
    for step in range(1, 9):
        flip(payload(many.output_dir / f"step-{step}"))
    assert run(many, "--keep", "1") == 1
    assert "must verify before any is deleted" in capsys.readouterr().err
    assert steps_left(many) == list(range(1, 9))


def test_keep_is_a_number_from_one_up(many, capsys):
    for words in (["--keep", "0"], ["--keep", "x"], []):
        assert run(many, *words) == 78
    assert run(many, "--keep", "99") == 0
    assert "0.0 MB freed" in capsys.readouterr().out


FAULT = CheckpointError("It must hold", found="not", remedy="Mend it")
UNREAD = UnreadableCheckpoint("Storage must", found="EIO", remedy="Mend it")


# (faults oldest first, best, keep, averaged) -> steps that stay
@pytest.mark.parametrize(
    ("faults", "best", "keep", "averaged", "stay"),
    [
        ([None] * 5, None, 1, 0, {5}),
        ([None] * 5, 1, 1, 0, {1, 5}),
        ([None] * 5, 5, 2, 0, {4, 5}),
        ([None] * 5, None, 2, 3, {3, 4, 5}),
        ([None, None, None, FAULT, UNREAD], None, 1, 0, {3, 4, 5}),
        ([None, FAULT], 2, 1, 0, {1, 2}),
        ([None], None, 9, 9, {1}),
        ([], None, 1, 5, set()),
    ],
)
def test_table(faults, best, keep, averaged, stay):
    infos = [CheckpointInfo(f"step-{n}", n, {}, 10, 0.0) for n in range(1, len(faults) + 1)]
    examined = [Examined(info.checkpoint_id, info, fault) for info, fault in zip(infos, faults, strict=True)]
    verdicts = judge(examined, infos[best - 1] if best else None, keep, averaged)
    assert {int(v.checkpoint_id.removeprefix("step-")) for v in verdicts if v.stays} == stay
    assert all(verdict.why for verdict in verdicts)


@pytest.mark.parametrize(
    ("text", "count"),
    [(None, 5), ("config: {training: {average_last: 7}}", 7), ("config: {training: {}}", 5), ("[", 5)],
)
def test_run_says_how_many_its_average_needs(tmp_path: Path, text: str | None, count: int):
    if text is not None:
        RunPaths(tmp_path).run_yaml.write_text(text)
    assert averaged_by(tmp_path) == count
