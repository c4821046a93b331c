"""Roll-back: a run that meets poisoned data returns to before it, and ends as a clean one; whenever it is killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from encdec.checkpoints import CheckpointManager
from encdec.checkpoints.fsdp2_tensors import DcpTensors
from encdec.checkpoints.manifest import read_manifest
from encdec.errors import FencedError
from encdec.gates import ValidationGate
from encdec.training.recovery import FILE
from tests.encdec.training.engine_lab import Made
from tests.encdec.training.poison_lab import BATCH, SIGNAL, STEPS, Run
from tests.many_ranks import in_ranks

POISON = (41, 70)
"""Steps of noise: the spike is 12 steps old after step 52, when step 50 has been saved."""
DECIDED = {
    "number": 1, "cause": "loss_spike", "from_step": 52, "to_step": 40, "first_sample": 40 * BATCH,
    "next_sample": 72 * BATCH, "lr_factor": 0.5, "skipped_samples": 32 * BATCH,
}  # fmt: skip


class KilledError(Exception):
    """Stands for SIGKILL: nothing of the trainer runs after it."""


def die(*arguments: Any, **named: Any) -> None:
    raise KilledError


@pytest.fixture(scope="module")
def clean(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without poison, and with leave to roll back: it must not."""
    run = Run(made, tmp_path_factory.mktemp("clean"), {"max_rollbacks": 2})
    assert run.train().cause == "complete"
    assert run.story.events == []
    assert not (run.root / "checkpoints" / FILE).exists()
    return run


@pytest.fixture(scope="module")
def recovered(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(made, tmp_path_factory.mktemp("recovered"), {"max_rollbacks": 2}, POISON)
    assert run.train().cause == "complete"
    return run


def final_loss(run: Run) -> float:
    """On held-out text, nats."""
    return run.state()["evaluation"]["loss"]


def test_recovered_run_ends_within_two_percent_of_the_clean_one(made, tmp_path, clean: Run, recovered: Run):
    assert final_loss(recovered) == pytest.approx(final_loss(clean), rel=0.02)
    left_alone = Run(made, tmp_path, {}, POISON)
    left_alone.train()
    assert final_loss(left_alone) > 1.05 * final_loss(clean)  # the poison is one


def test_roll_back_is_told_and_kept(clean: Run, recovered: Run):
    assert recovered.story.events == [("rolled_back", DECIDED)]
    assert [step for step, _ in recovered.story.losses] == [*range(1, 53), *range(41, STEPS + 1)]
    assert recovered.story.rates[52:] == [0.5 * rate for rate in clean.story.rates[40:]]
    assert recovered.quarantined() == ["step-50"]
    reason = next(recovered.root.glob("checkpoints/quarantine/step-50*/REASON")).read_text()
    assert "goes on from a checkpoint before its divergence" in reason
    state = recovered.state()
    decided = {name: value for name, value in DECIDED.items() if name != "skipped_samples"}
    assert state["rollbacks"] == json.loads((recovered.root / "checkpoints" / FILE).read_text()) == [decided]
    assert state["scheduler"] == {"step": STEPS, "factor": 0.5}
    assert state["samples_consumed"] == (STEPS + 32) * BATCH
    assert recovered.state(40)["rollbacks"] == []


def after_decision(trainer: Any) -> None:
    """It is written down, and nothing else has happened."""
    decide = trainer.recovery.decide
    trainer.recovery.decide = lambda divergence: die() if decide(divergence) else None


def before_load(trainer: Any) -> None:
    trainer.resume = die


def after_load(trainer: Any) -> None:
    resume = trainer.resume
    trainer.resume = lambda: die() if resume() else None


def before_next_checkpoint(trainer: Any) -> None:
    save = trainer.saving.save
    trainer.saving.save = lambda *arguments, **named: die() if trainer.recovery.history else save(*arguments, **named)


KILLS = (after_decision, before_load, after_load, before_next_checkpoint)


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__)
def test_kill_before_the_next_checkpoint_forgets_nothing(made, tmp_path, recovered: Run, kill: Callable[[Any], None]):
    run = Run(made, tmp_path, {"max_rollbacks": 2}, POISON)
    trainer = run.trainer()
    kill(trainer)
    with pytest.raises(KilledError):
        trainer.train()
    assert run.train().cause == "complete"
    require_same_end(run, recovered)
    assert run.story.of("roll_back_taken_up") == [DECIDED]
    assert run.story.of("rolled_back") == ([] if kill is after_decision else [DECIDED])


def require_same_end(run: Run, other: Run) -> None:
    assert run.digest() == other.digest()
    assert run.state() == other.state()
    assert run.quarantined() == other.quarantined()
    assert dict(run.story.losses) == dict(other.story.losses)  # of a step that was computed twice, the newer


@pytest.mark.parametrize("steps", [(44, 48), (51,), (52,), (60,)], ids=str)
def test_run_told_to_stop_around_a_roll_back_ends_as_one_that_is_not(made, tmp_path, recovered: Run, steps):
    """What is saved for a signal during the spike is not gone on from."""
    run, stops = Run(made, tmp_path, {"max_rollbacks": 2}, POISON), 0
    wishes = dict.fromkeys(steps, SIGNAL)
    while run.train(wishes).cause != "complete":
        stops += 1
        wishes = {step: wish for step, wish in wishes.items() if step > steps[stops - 1]}
    assert stops == len(steps)
    assert run.story.of("rolled_back") == [DECIDED]
    assert run.digest() == recovered.digest()
    assert run.state() == recovered.state()


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_two_ranks_roll_back_together_and_forget_nothing(made, tmp_path, engine: str):
    whole = Run(made, tmp_path / "whole", {"max_rollbacks": 1}, POISON, engine=engine)
    killed = Run(made, tmp_path / "killed", {"max_rollbacks": 1}, POISON, engine=engine)
    in_ranks(2, train_whole, whole)
    in_ranks(2, train_and_die, killed)
    in_ranks(2, train_whole, killed)
    assert killed.digest() == whole.digest()
    assert killed.state() == whole.state()
    assert killed.quarantined() == whole.quarantined() == ["step-50"]
    assert [decision["to_step"] for decision in whole.state()["rollbacks"]] == [40]


def test_whole_parameters_left_by_an_evaluation_are_in_nobodys_way(made, tmp_path):
    """SHARD_GRAD_OP keeps them after a forward pass: the checkpoint after it must have optimizer state all the same."""
    runs = [
        Run(made, tmp_path / name, {"num_train_steps": 20}, sharding=name) for name in ("FULL_SHARD", "SHARD_GRAD_OP")
    ]
    for run in runs:
        in_ranks(2, train_whole, run)
    assert runs[0].digest(20) == runs[1].digest(20)
    assert any(name.startswith("optim.") for name in DcpTensors(runs[1].checkpoint(20) / "fsdp2").names)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_two_ranks_drop_gradients_that_one_of_them_finds_infinite(made, tmp_path, engine: str):
    run = Run(made, tmp_path, {"max_rollbacks": 1}, (43, 43), engine=engine, explosive=True)
    in_ranks(2, train_whole, run)
    [decision] = run.state()["rollbacks"]
    assert (decision["cause"], decision["from_step"], decision["to_step"]) == ("no_nan", 42, 40)


def train_whole(run: Run) -> None:
    assert run.train().cause == "complete"


def train_and_die(run: Run) -> None:
    trainer = run.trainer()
    after_load(trainer)
    with pytest.raises(KilledError):
        trainer.train()


def test_loss_that_is_no_number_rolls_back(made, tmp_path, clean: Run):
    run = Run(made, tmp_path, {"max_rollbacks": 1, "rollback_lr_factor": 1.0}, (43, 45), explosive=True)
    assert run.train().cause == "complete"
    [facts] = run.story.of("rolled_back")
    assert (facts["cause"], facts["from_step"], facts["to_step"]) == ("no_nan", 42, 40)
    assert facts["next_sample"] == (43 + 20) * BATCH  # the batch that was computed, and the margin
    assert run.quarantined() == []
    assert final_loss(run) == pytest.approx(final_loss(clean), rel=0.02)


def test_without_roll_back_the_named_gate_ends_the_run(made, tmp_path):
    run = Run(made, tmp_path, {}, (43, 45), explosive=True)
    result = run.train()
    assert (result.cause, result.step, result.checkpoint) == ("gate", 42, "step-40")
    assert result.message == "gate not passed: no_nan: nan_count 2, must be <= 0"
    [told] = run.story.of("gate_not_passed")
    assert told["gates"] == ["no_nan"] and "at step 43" in told["message"]
    assert not run.checkpoint(42).exists()


def test_weights_that_are_no_numbers_are_not_saved(made, tmp_path):
    run = Run(made, tmp_path)
    trainer = run.trainer()
    advance = trainer._advance

    def spoil(loss: float) -> None:
        advance(loss)
        if trainer.state.global_step == 20:
            trainer.model.shared.weight.data[3, 3] = float("inf")

    trainer._advance = spoil
    result = trainer.train()
    assert (result.cause, result.step, result.checkpoint) == ("gate", 20, "step-10")
    assert "weights or optimizer state" in result.gates.failures[0].measured


def test_at_most_so_many_times(made, tmp_path):
    run = Run(made, tmp_path, {"max_rollbacks": 2, "rollback_margin_steps": 0}, (41, 400))
    assert run.train().cause == "complete"
    told = run.story.of("rolled_back")
    assert [facts["number"] for facts in told] == [1, 2]
    assert [facts["lr_factor"] for facts in told] == [0.5, 0.25]
    assert {facts["to_step"] for facts in told} == {40}
    assert told[1]["first_sample"] == told[0]["first_sample"] and told[1]["next_sample"] > told[0]["next_sample"]
    assert run.state()["scheduler"] == {"step": STEPS, "factor": 0.25}


def test_without_a_good_checkpoint_the_run_ends_as_without_recovery(made, tmp_path):
    run = Run(made, tmp_path, {"max_rollbacks": 2}, (5, 5), explosive=True)
    result = run.train()
    assert (result.cause, result.checkpoint) == ("gate", None)
    assert run.story.of("rolled_back") == []


def test_quick_gate_that_does_not_pass_rolls_back_to_before_it_last_passed(made, tmp_path):
    gate = ValidationGate("loss_reasonable", "loss", 5.58)
    settings = {"max_rollbacks": 1, "loss_spike_ratio": 9.0, "rollback_margin_steps": 30, "gate_steps": 30}
    run = Run(made, tmp_path, settings, POISON, custom_gates=(gate,))
    assert run.train().cause == "complete"
    [facts] = run.story.of("rolled_back")
    assert (facts["cause"], facts["from_step"], facts["to_step"]) == ("loss_reasonable", 60, 30)
    ended = Run(made, tmp_path / "ended", settings | {"max_rollbacks": 0}, POISON, custom_gates=(gate,))
    result = ended.train()
    assert (result.cause, result.step, result.checkpoint) == ("gate", 60, "step-60")
    assert result.message.startswith("gate not passed: loss_reasonable: loss 5.")


def test_gradient_spikes_that_would_end_the_run_roll_it_back(made, tmp_path, monkeypatch):
    monkeypatch.setattr("encdec.training.early_stopping.EXEMPT_STEPS", 30)
    run = Run(made, tmp_path, {"max_rollbacks": 1, "loss_spike_ratio": 9.0, "grad_spike_patience": 2})
    run.settings["grad_spike_threshold"] = 1.5 * 10
    trainer, shown = run.trainer(), []
    update = trainer.computation.update

    def spike(tokens: float, squares: float) -> tuple[float, float]:
        norm, rate = update(tokens, squares)
        shown.append(norm)
        return (1e3, rate) if len(shown) in (35, 36) else (norm, rate)

    trainer.computation.update = spike
    assert trainer.train().message == f"all {STEPS} steps done"
    [facts] = run.story.of("rolled_back")
    assert (facts["cause"], facts["from_step"], facts["to_step"]) == ("gradient_spikes", 36, 30)


def test_attempt_that_is_fenced_off_decides_nothing(made, tmp_path):
    run = Run(made, tmp_path, {"max_rollbacks": 2}, POISON)
    trainer = run.trainer()

    def refuse() -> None:
        raise FencedError("Only the newest attempt of a run may write", remedy="Nothing to do")

    trainer.checkpoints.fence = refuse
    with pytest.raises(FencedError):
        trainer.train()
    assert not (run.root / "checkpoints" / FILE).exists()
    assert run.quarantined() == []


# ---- who else looks at checkpoints


def test_withdrawn_checkpoint_is_nobodys(recovered: Run):
    """Not the best, not kept for the average, not gone on from; also where storage did not let it be moved away."""
    folder = recovered.root / "checkpoints"
    manager = CheckpointManager(folder)
    assert [info.step for info in manager.own_checkpoints()] == [10, 20, 30, 40, 50, 60, 70, 80]
    manager.withdrawn = lambda step, samples: (step, samples) == (50, 82 * BATCH)
    assert [info.step for info in manager.own_checkpoints()] == [10, 20, 30, 40, 60, 70, 80]
    assert not manager.is_own(read_manifest(folder / "step-50"))


def test_mirror_gives_no_withdrawn_checkpoint_back(made, tmp_path):
    run = Run(made, tmp_path, {"max_rollbacks": 1}, POISON, mirror=tmp_path / "mirror")
    trainer = run.trainer()
    before_load(trainer)
    with pytest.raises(KilledError):
        trainer.train()
    assert trainer.checkpoints.drain()
    assert (tmp_path / "mirror" / "step-50").exists()  # copied during the spike
    again = run.trainer()
    assert again.state.global_step == 40
    assert not (tmp_path / "mirror" / "step-50").exists()
    assert any("deleted from the drive: step-50" in reason for reason in again.checkpoints.rejected)
