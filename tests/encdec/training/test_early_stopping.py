"""Early stopping as tables of cases: what ends a run, and the near miss that does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from encdec.checkpoints import CheckpointManager
from encdec.records import read_json_lines
from encdec.training.config import TrainingConfig
from encdec.training.early_stopping import EarlyStopping
from encdec.training.judgement import Judgement
from encdec.training.observers import Records, TextLog
from tests.encdec.training.engine_lab import Made
from tests.encdec.training.poison_lab import Run

FALLING = [4.0 - 0.02 * check for check in range(12)]


def checks(*losses: float) -> list[tuple[int, float, float]]:
    """One check an evaluation interval, with calm gradients in between: (step, gradient norm, mean loss)."""
    return [(500 * (number + 1), 1.0, loss) for number, loss in enumerate(losses)]


def norms(*values: float, first: int = 51) -> list[tuple[int, float, float]]:
    return [(first + number, norm, 4.0) for number, norm in enumerate(values)]


# rule: changed fields, what comes by, the step at which the run ends (None: it goes on), words of the reason
CASES: list[tuple[str, dict[str, Any], list[tuple[int, float, float]], int | None, str]] = [
    ("plateau", {}, checks(*[4.0] * 6), 3000, "mean loss 4.0000 has not fallen below 4.0000 for 5 checks"),
    ("plateau, a check short", {}, checks(*[4.0] * 5), None, ""),
    ("falls by more than min_delta each time", {}, checks(*FALLING), None, ""),
    ("falls by just min_delta", {}, checks(4.0, *[3.99] * 5), 3000, "4.0000"),
    ("falls by a little more", {}, checks(4.0, 3.9899, *[3.99] * 4), None, ""),
    ("falls at the last check", {}, checks(*[4.0] * 5, 3.98, *[3.98] * 4), None, ""),
    ("rises", {}, checks(4.0, 4.1, 4.2, 4.3, 4.4, 4.5), 3000, "mean loss 4.5000"),
    ("less patience", {"early_stopping_patience": 2}, checks(4.0, 4.0, 4.0), 1500, "for 2 checks"),
    ("plateau, disabled", {"early_stopping_enabled": False}, checks(*[4.0] * 9), None, ""),
    ("plateau within warm-up", {"eval_steps": 10}, [(10 * n, 1.0, 4.0) for n in range(1, 6)], None, ""),
    ("gradient spikes", {}, norms(1001, 1002, 1003), 53, "above 1000 for 3 consecutive steps, last 1003"),
    ("at the threshold", {}, norms(1000, 1000, 1000, 1000), None, ""),
    ("two in a row", {}, norms(2000, 2000, 10, 2000, 2000), None, ""),
    ("within warm-up", {}, norms(*[1e6] * 49, first=2), None, ""),
    ("half of them within warm-up", {}, norms(1e6, 1e6, 1e6, 1e6, first=49), None, ""),
    ("just after warm-up", {}, norms(1e6, 1e6, 1e6, 1e6, 1e6, first=49), 53, "1e+06"),
    ("infinite", {"grad_spike_patience": 1}, norms(math.inf), 51, "last inf"),
    ("lower threshold", {"grad_spike_threshold": 10.0}, norms(11, 11, 11), 53, "above 10 for"),
    ("gradient spikes, disabled", {"early_stopping_enabled": False}, norms(*[1e6] * 9), None, ""),
]


@pytest.mark.parametrize(("rules", "seen", "end", "words"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_what_ends_a_run(rules: dict[str, Any], seen: list[tuple[int, float, float]], end: int | None, words: str):
    made, ended = EarlyStopping(TrainingConfig(**rules)), None
    for step, norm, loss in seen:
        if made.judge(step, norm, loss) and ended is None:
            ended = step
        again = EarlyStopping(TrainingConfig(**rules))  # a restart at any step changes nothing
        again.load_state_dict(made.state_dict())
        made = again
    assert ended == end
    assert words in (made.reason or "")


def test_it_is_on_by_default_with_the_published_numbers():
    rules = TrainingConfig()
    assert (rules.early_stopping_enabled, rules.early_stopping_patience, rules.early_stopping_min_delta) == (
        True,
        5,
        0.01,
    )
    assert (rules.grad_spike_threshold, rules.grad_spike_patience) == (1000.0, 3)


def test_reason_is_printed_and_in_the_ledger_and_a_checkpoint_goes_before_the_end(made: Made, tmp_path: Path, caplog):
    run = Run(made, tmp_path, {"eval_steps": 30, "early_stopping_patience": 1, "early_stopping_min_delta": 9.0})
    run.settings |= {"num_train_steps": 100, "save_steps": 100}
    trainer = run.trainer()
    (tmp_path / "records").mkdir()
    records = Records(tmp_path / "records" / "steps.jsonl", tmp_path / "records" / "events.jsonl")
    trainer.observers += [records, TextLog(100, 50)]
    result = trainer.train()
    records.close()
    assert (result.cause, result.step, result.checkpoint) == ("complete", 90, "step-90")  # checks at 60 and 90
    assert result.message.startswith("stopped early: mean loss")
    events = [
        e for e in read_json_lines(tmp_path / "records" / "events.jsonl") if e["event"] in ("stopped_early", "saved")
    ]
    assert [(event["event"], event["step"]) for event in events] == [("stopped_early", 90), ("saved", 90)]
    assert events[0]["reason"] == result.message.removeprefix("stopped early: ")
    assert f"stopped early: step 90, reason {events[0]['reason']}" in caplog.text
    assert run.train().step == 90  # for good


@pytest.mark.parametrize(
    ("come_by", "closed"),
    [(norms(1001, 1002, 1003), ["gradient_spikes"]), (norms(1001, 1002, 999), []), (checks(*[4.0] * 6), [])],
    ids=["explosion", "near miss", "plateau"],
)
def test_explosion_closes_a_gate_and_a_plateau_does_not(come_by: list, closed: list[str], tmp_path: Path):
    """Weights that explode would otherwise start the next phase: a plateau ends a run that is complete."""
    training = TrainingConfig()
    judgement = Judgement(
        training, CheckpointManager(tmp_path), (), (), warmup_steps=10, total_steps=10**6, global_batch_size=8
    )
    for step, norm, loss in come_by:
        judgement.early_stopping.judge(step, norm, loss)
    end = judgement.completion(come_by[-1][0])
    assert [item.gate for item in (end.gates.failures if end and end.gates else ())] == closed
    assert (end.cause if end else None) == ("gate" if closed else "complete" if len(come_by) == 6 else None)
