"""Recovery where it is pure: what is a divergence, what is skipped, what is withdrawn; with near misses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from encdec.checkpoints import CheckpointManager
from encdec.errors import RunDirectoryError
from encdec.training.config import TrainingConfig
from encdec.training.recovery import FILE, Divergence, Recovery, RollBack, elevated

BATCH = 8
CALM = [4.0] * 30


@pytest.mark.parametrize(
    ("losses", "row"),
    [
        ([], 0),
        ([4.0], 0),
        (CALM, 0),
        ([*CALM, 6.1], 1),
        ([*CALM, 6.0], 0),  # not above
        ([*CALM, 6.1, 6.1, 6.1], 3),
        ([*CALM, 6.1, 5.9, 6.5], 1),  # broken off
        ([*CALM, 6.1, 6.1, 4.0], 0),  # over
        ([9.0] * 20 + [3.0] * 10, 0),  # a fall
        (CALM + [20.0] * 25, 25),
        ([1.0] * 10 + [2.0] * 40, 0),  # a new level that is more than half of what is known
    ],
)
def test_spike_is_compared_with_what_was_before_it(losses: list[float], row: int):
    assert elevated(losses, 1.5) == row


def recovery(folder: Path, **rules: Any) -> Recovery:
    rules = {"max_rollbacks": 1, "loss_spike_patience": 5, **rules}
    return Recovery(TrainingConfig(**rules), CheckpointManager(folder), warmup_steps=10, global_batch_size=BATCH)


@pytest.mark.parametrize(
    ("rules", "step", "losses", "spikes", "found"),
    [
        ({}, 50, [*CALM, *[6.1] * 5], 0, Divergence("loss_spike", 50, 46, 400)),
        ({}, 50, [*CALM, *[6.1] * 4], 0, None),  # a step short
        ({}, 50, [*CALM, *[5.9] * 5], 0, None),  # below the ratio
        ({"loss_spike_ratio": 1.4}, 50, [*CALM, *[5.9] * 5], 0, Divergence("loss_spike", 50, 46, 400)),
        ({}, 14, [*[4.0] * 9, *[9.0] * 5], 0, None),  # begins in warm-up
        ({}, 15, [*[4.0] * 10, *[9.0] * 5], 0, Divergence("loss_spike", 15, 11, 400)),
        ({}, 50, CALM, 3, Divergence("gradient_spikes", 50, 48, 400)),
        ({}, 50, [*CALM, *[6.1] * 4], 3, Divergence("gradient_spikes", 50, 47, 400)),  # the loss rose before
        ({"max_rollbacks": 0}, 50, [*CALM, *[9.0] * 9], 3, None),
    ],
)
def test_divergence(tmp_path, rules, step: int, losses: list[float], spikes: int, found: Divergence | None):
    assert recovery(tmp_path, **rules).after_step(step, 400, losses, spikes) == found


def decision(number: int, to_step: int, first: int, following: int) -> RollBack:
    return RollBack(
        number=number, cause="no_nan", from_step=99, to_step=to_step, first_sample=first, next_sample=following,
        lr_factor=0.5**number,
    )  # fmt: skip


def test_positions_and_withdrawn_checkpoints(tmp_path):
    made = recovery(tmp_path)
    made.history = [decision(1, 10, 100, 200), decision(2, 10, 100, 300), decision(3, 20, 400, 500)]
    positions = {90: 90, 100: 300, 190: 300, 200: 300, 300: 300, 390: 390, 400: 500, 499: 500, 500: 500}
    assert {samples: made.position(samples) for samples in positions} == positions
    withdrawn = {
        (10, 100): False, (10, 300): False, (11, 110): True, (30, 300): True, (11, 310): False, (20, 400): False,
        (21, 410): True, (21, 510): False, (9, 90): False,
    }  # fmt: skip
    assert {place: made.withdrawn(*place) for place in withdrawn} == withdrawn
    assert made.lr_factor == 0.125


def test_checkpoint_of_another_history_keeps_its_own(tmp_path):
    made = recovery(tmp_path)
    first, second = decision(1, 10, 100, 200), decision(2, 20, 300, 400)
    made.history = [first, second]
    for known, history, later in [
        ([], [first, second], [first, second]),
        ([first], [first, second], [second]),
        ([first, second], [first, second], []),
        ([second], [second], []),
    ]:
        made.history = [first, second]
        made.take_up([dict(item.__dict__) for item in known])
        assert (made.history, made.taken_up) == (history, later)


def test_decisions_that_cannot_be_read_are_not_passed_over(tmp_path):
    made = recovery(tmp_path)
    made.read()
    assert made.history == []
    (tmp_path / FILE).write_text('[{"number": 1}]')
    with pytest.raises(RunDirectoryError, match=r"rollbacks\.json"):
        made.read()
