"""Stops and kills at every kind of step: the continued run ends as the undisturbed one, in all that it says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from encdec.checkpoints import CheckpointManager, logical_digest
from encdec.data.collator import UL2DataCollator
from encdec.data.corpus import open_corpus
from encdec.data.packing import ensure_packed, open_packed
from encdec.data.sampler import GlobalBatchSampler
from encdec.data.ul2_dataset import EvaluationBatches, UL2Dataset, build_dataloader
from encdec.errors import CheckpointError
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training import early_stopping
from encdec.training.build import build_model
from encdec.training.config import FullConfig
from encdec.training.run_config import RunConfig, resolve_run
from encdec.training.signals import Requests, Wishes
from encdec.training.state import TrainResult
from encdec.training.trainer import Qwen3EncoderDecoderTrainer

REPOSITORY = Path(__file__).resolve().parents[3]
NOTHING = Wishes(signalled=False, stop=False, save=False)
SIGNAL, STOP, SAVE = (NOTHING._replace(**{name: True}) for name in Wishes._fields)
PLATEAU = {"early_stopping_min_delta": 100.0, "early_stopping_patience": 2}
"""No fall of the loss is an improvement: the check at step 3 sets the mark, the one at step 9 ends training."""
SPIKES = {"grad_spike_threshold": 1e-9, "grad_spike_patience": 5}
"""Every gradient is a spike: training ends after step 5, which is not one to evaluate at."""


class Asked(Requests):
    """Is asked for what a table says, by step."""

    def __init__(self, wishes: Mapping[int, Wishes]) -> None:
        super().__init__(None)
        self.wishes, self.step = wishes, 0

    def look(self) -> Wishes:
        self.step += 1
        return self.wishes.get(self.step, NOTHING)


class Memory:
    """Keeps what the trainers of one run tell."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.told: list[tuple[str, int]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.evaluations: dict[int, dict[str, float]] = {}

    def on_step(self, record, moving_loss):
        self.steps.append(record.step)

    def on_evaluation(self, step, metrics):
        self.told.append(("evaluated", step))
        self.evaluations[step] = dict(metrics)

    def on_save(self, saved):
        self.told.append(("saved", saved.step))

    def on_save_failed(self, step, reason, last):
        self.told.append(("failed", step))

    def on_alert(self, alert):
        self.told.append((alert["type"], alert["step"]))

    def on_event(self, kind, facts):
        self.events.append((kind, facts))

    def close(self): ...


class Lab:
    """Starts trainers of one run directory, one after another: 10 steps, checks every 3, checkpoints every 4."""

    def __init__(self, run: RunConfig, tokenizer: Any, packed: Path, root: Path, **training: Any) -> None:
        self.run, self.tokenizer, self.packed, self.root = run, tokenizer, packed, root
        self.config: FullConfig = run.config.model_copy(deep=True)
        for name, value in training.items():
            setattr(self.config.training, name, value)
        self.memory = Memory()

    def trainer(self, wishes: Mapping[int, Wishes] | None = None) -> Qwen3EncoderDecoderTrainer:
        """A new process, as it were: it continues from the newest checkpoint."""
        collator = UL2DataCollator(self.tokenizer, 64, 64, seed=42)
        dataset = UL2Dataset(open_packed(self.packed, "train"))
        loader = build_dataloader(dataset, collator, GlobalBatchSampler(len(dataset), 8, 8, 0, 1, 42))
        held_out = EvaluationBatches(open_packed(self.packed, "validation"), collator, batch_size=4, max_samples=8)
        trainer = Qwen3EncoderDecoderTrainer(
            build_model(self.config, self.tokenizer), self.tokenizer, self.config, loader, held_out,
            checkpoints=CheckpointManager(self.root, save_total_limit=2), sample_length=self.run.sample_length,
            requests=Asked(wishes or {}), observers=[self.memory],
        )  # fmt: skip
        trainer.start_from(None)
        trainer.requests.step = trainer.state.global_step
        return trainer

    def train(self, wishes: Mapping[int, Wishes] | None = None) -> TrainResult:
        return self.trainer(wishes).train()

    def end(self, result: TrainResult) -> dict[str, Any]:
        """All that must not depend on whether the run was disturbed."""
        manager = CheckpointManager(self.root)
        infos = manager.list_checkpoints()
        best, last = manager._best(infos), self.root / f"step-{result.step}"
        return {
            "result": asdict(result),
            "digest": logical_digest(last),
            "state": json.loads((last / "trainer_state.json").read_text()),
            "best": (best.step, best.metrics),
            "last": (infos[-1].step, infos[-1].metrics),
            "evaluations": self.memory.evaluations,
        }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Any, Path]:
    """(run, tokenizer, packed text)"""
    root = tmp_path_factory.mktemp("made")
    settings = [
        "training.num_train_steps=10",
        "training.eval_steps=3",
        "training.save_steps=4",
        "training.warmup_steps=2",
        f"data.packed_dir={root}",
    ]
    run = resolve_run(None, config_file=REPOSITORY / "tests" / "micro.yaml", settings=settings, ranks_per_node=1)
    corpus = open_corpus("python-stdlib", max_examples=30)
    tokenizer = Qwen3EncoderDecoderTokenizer.train_from_texts(corpus.documents(), 512, 16)
    ensure_packed(corpus, tokenizer, root / "p", sample_length=run.sample_length, validation_fraction=0.1)
    return run, tokenizer, root / "p"


@pytest.fixture(autouse=True)
def no_exempt_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(early_stopping, "EXEMPT_STEPS", 0)
        yield


RULES: dict[str, dict[str, Any]] = {"none": {}, "plateau": PLATEAU, "spikes": SPIKES}
LAST_STEP = {"none": 10, "plateau": 9, "spikes": 5}
CAUSE = {"none": "complete", "plateau": "complete", "spikes": "gate"}


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How a run of each rule ends that nobody stops."""
    ends = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(early_stopping, "EXEMPT_STEPS", 0)
        for rule, training in RULES.items():
            lab = Lab(*made, tmp_path_factory.mktemp("twin") / "checkpoints", **training)
            ends[rule] = lab.end(lab.train())
            assert (ends[rule]["result"]["cause"], ends[rule]["result"]["step"]) == (CAUSE[rule], LAST_STEP[rule])
    return ends


# what is asked for, by step: 3, 6, 9 are checks, 4, 8 checkpoints, 10 the last
DISTURBED: list[tuple[str, dict[int, Wishes]]] = [
    *[("none", {step: SIGNAL}) for step in (1, 3, 4, 8, 9, 10)],
    ("none", {3: STOP, 4: SIGNAL, 5: STOP, 8: STOP, 9: SIGNAL, 10: STOP}),
    ("none", {2: SAVE, 4: SAVE, 6: SAVE, 7: SAVE, 9: SAVE}),
    *[("plateau", {step: SIGNAL}) for step in (3, 6, 7, 8, 9)],
    ("plateau", {3: STOP, 6: SIGNAL, 9: STOP}),
    ("spikes", {4: SIGNAL, 5: STOP}),
    ("spikes", {2: STOP, 3: SIGNAL}),
]


@pytest.mark.parametrize(("rule", "wishes"), DISTURBED, ids=lambda value: value if isinstance(value, str) else None)
def test_stopped_run_ends_as_the_undisturbed_one(made, tmp_path, undisturbed, rule: str, wishes: dict[int, Wishes]):
    lab = Lab(*made, tmp_path / "checkpoints", **RULES[rule])
    stops = 0
    while (result := lab.train(wishes)).cause != CAUSE[rule]:
        stops += 1
    assert stops == sum(wish != SAVE and step < LAST_STEP[rule] for step, wish in wishes.items())
    assert lab.memory.steps == list(range(1, LAST_STEP[rule] + 1))  # none lost, none computed twice
    assert lab.end(result) == undisturbed[rule]


@pytest.mark.parametrize("step", [3, 4])
def test_stop_saves_before_it_evaluates_and_the_next_start_makes_up_for_it(made, tmp_path, step: int):
    lab = Lab(*made, tmp_path / "checkpoints")
    lab.train({step: SIGNAL})
    assert lab.memory.told[-1] == ("saved", step)
    assert ("evaluated", step) not in lab.memory.told
    told = len(lab.memory.told)
    lab.train({step + 1: SIGNAL})
    assert lab.memory.told[told : told + 2] == [("evaluated", step), ("saved", step)]


def test_run_told_to_stop_as_it_completes_saves_first_and_is_complete(made, tmp_path):
    lab = Lab(*made, tmp_path / "checkpoints")
    assert lab.train({10: SIGNAL}).cause == "complete"
    assert lab.memory.told[-3:] == [("saved", 10), ("evaluated", 10), ("saved", 10)]


class KilledError(Exception):
    """Stands for SIGKILL: nothing of the trainer runs after it."""


@pytest.mark.parametrize(("rule", "save"), [("none", 3), ("plateau", 3), ("plateau", 4), ("spikes", 2)])
def test_kill_after_a_save_before_all_else(made, tmp_path, undisturbed, monkeypatch, rule: str, save: int):
    """Its n-th save is the last thing the killed process does; with a stop at the end, the last metrics are owed."""
    lab = Lab(*made, tmp_path / "checkpoints", **RULES[rule])
    trainer = lab.trainer({LAST_STEP[rule]: SIGNAL})
    saves, commit = [], trainer.checkpoints.save

    def commit_and_die(*arguments: Any, **named: Any) -> str:
        saves.append(commit(*arguments, **named))
        if len(saves) == save:
            raise KilledError
        return saves[-1]

    monkeypatch.setattr(trainer.checkpoints, "save", commit_and_die)
    with pytest.raises(KilledError):
        trainer.train()
    assert saves[-1] == f"step-{LAST_STEP[rule]}"
    result = lab.train()
    assert lab.memory.steps == list(range(1, LAST_STEP[rule] + 1))
    assert lab.end(result) == undisturbed[rule]


@pytest.mark.parametrize("rule", RULES)
def test_kill_after_the_end_before_the_outcome_is_written(made, tmp_path, undisturbed, rule: str):
    lab = Lab(*made, tmp_path / "checkpoints", **RULES[rule])
    first = lab.train()
    told = list(lab.memory.told)
    assert lab.train() == first
    assert lab.memory.steps == list(range(1, LAST_STEP[rule] + 1))
    assert lab.memory.told == told


def test_checkpoint_made_on_request_is_never_the_best(made, tmp_path):
    """An undisturbed run does not have it."""
    lab = Lab(*made, tmp_path / "checkpoints", save_steps=100)
    lab.train({3: SAVE, 6: STOP})
    lab.train({7: STOP})
    assert lab.memory.told.count(("evaluated", 6)) == 1
    assert not any(info.metrics for info in CheckpointManager(lab.root).list_checkpoints())


def test_states_of_older_versions_still_load(made, tmp_path, monkeypatch, undisturbed):
    lab = Lab(*made, tmp_path / "checkpoints")
    old = lab.trainer({4: SIGNAL})
    state = old._extra_state

    def as_it_was() -> dict[str, Any]:
        checks = {name: value for name, value in state()["early_stopping"].items() if name != "reason"}
        return {name: value for name, value in state().items() if name != "evaluation"} | {"early_stopping": checks}

    monkeypatch.setattr(old, "_extra_state", as_it_was)
    old.train()
    assert lab.end(lab.train()) == undisturbed["none"]


def test_state_that_lacks_something_is_named(made, tmp_path):
    trainer = Lab(*made, tmp_path / "checkpoints").trainer()
    name = trainer.checkpoints.save(trainer.model, trainer.optimizer, trainer.schedule, 1)
    with pytest.raises(CheckpointError, match=r"all that training continues from.*trainer_state\.json.*KeyError"):
        trainer.load_checkpoint(tmp_path / "checkpoints" / name)


def test_early_stopping_that_is_switched_off_lets_a_stopped_run_go_on(made, tmp_path):
    assert Lab(*made, tmp_path / "checkpoints", **PLATEAU).train().step == 9
    assert Lab(*made, tmp_path / "checkpoints", early_stopping_enabled=False).train().step == 10
