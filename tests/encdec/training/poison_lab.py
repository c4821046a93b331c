"""Runs of the micro model in which a window of the data is poisoned: for tests of gates and roll-back, in any ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encdec import distributed
from encdec.checkpoints import CheckpointManager, DriveCheckpointManager, logical_digest
from encdec.checkpoints.payload import payload_named
from encdec.data.collator import Sample, UL2DataCollator
from encdec.data.packing import open_packed
from encdec.data.sampler import GlobalBatchSampler, sample_ids
from encdec.data.ul2_dataset import EvaluationBatches, UL2Dataset, build_dataloader
from encdec.gates import GateLevel, ValidationGate
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training.build import build_model
from encdec.training.engines import start_engine
from encdec.training.observers import Observer
from encdec.training.run_config import resolve_run
from encdec.training.signals import Requests, Wishes
from encdec.training.state import TrainResult
from encdec.training.trainer import Qwen3EncoderDecoderTrainer
from tests.conftest import MICRO
from tests.encdec.training.engine_lab import Made

BATCH, SEED = 8, 42
STEPS, SAVED = 80, 10
FUSE = 77
NOTHING = Wishes(signalled=False, stop=False, save=False)
SIGNAL = NOTHING._replace(signalled=True)


class Poisoned(UL2Dataset):
    """Something else in the place of those samples that the steps ``first`` to ``last`` of a clean run would see.

    Args:
        explosive: one token again and again, on which ``explode`` acts; otherwise random tokens.
    """

    def __init__(self, packed: Any, first: int, last: int, *, explosive: bool) -> None:
        super().__init__(packed)
        self.explosive = explosive
        per_epoch = len(packed) // BATCH
        self.keys = {
            ((step - 1) // per_epoch, int(sample))
            for step in range(first, last + 1)
            for sample in sample_ids(SEED, (step - 1) // per_epoch, (step - 1) % per_epoch * BATCH, BATCH, len(packed))
        }

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        sample = super().__getitem__(key)
        if key not in self.keys:
            return sample
        if self.explosive:
            return Sample(key=key, tokens=np.full_like(sample["tokens"], FUSE))
        noise = np.random.default_rng(key).integers(0, 480, len(sample["tokens"]))
        return Sample(key=key, tokens=noise.astype(sample["tokens"].dtype))


def explode(model: torch.nn.Module, arguments: Any, named: Mapping[str, Any], output: Any) -> None:
    """A forward hook: a batch in which half of a sequence is the token FUSE has gradients of no finite size."""
    if ((named["input_ids"] == FUSE).float().mean(dim=1) > 0.5).any():
        output.loss = output.loss * 1e30 * 1e30


class Asked(Requests):
    """Is asked for what a table says, at a call; a signal is heeded at every later call, too."""

    def __init__(self, wishes: Mapping[int, Wishes]) -> None:
        super().__init__(None)
        self.wishes, self.step, self.wish = dict(wishes), 0, NOTHING

    def look(self) -> Wishes:
        self.step += 1
        self.wish = self.wishes.get(self.step, self.wish)
        return self.wish


class Story(Observer):
    """Keeps what the trainers of one run tell."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.rates: list[float] = []

    def on_step(self, record: Any, moving_loss: float) -> None:
        self.losses.append((record.step, record.loss))
        self.rates.append(record.learning_rate)

    def on_event(self, kind: str, facts: Mapping[str, Any]) -> None:
        self.events.append((kind, dict(facts)))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [facts for event, facts in self.events if event == kind]


@dataclass
class Run:
    """One run directory and its configuration; ``train`` is a new process, as it were."""

    made: Made
    root: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the training section."""
    poison: tuple[int, int] = (0, -1)
    """First and last step whose data is noise."""
    explosive: bool = False
    engine: str = "fsdp"
    gates: tuple[GateLevel, ...] = (GateLevel.QUICK,)
    custom_gates: tuple[ValidationGate, ...] = ()
    mirror: Path | None = None
    sharding: str = "FULL_SHARD"
    story: Story = field(default_factory=Story)

    def trainer(self, wishes: Mapping[int, Wishes] | None = None) -> Qwen3EncoderDecoderTrainer:
        values = {
            "num_train_steps": STEPS, "save_steps": SAVED, "eval_steps": SAVED, "warmup_steps": 10, "gate_steps": 10,
            "global_batch_size": BATCH, "average_last": 0, "loss_spike_patience": 12, "loss_spike_ratio": 1.1,
            "rollback_margin_steps": 20, **self.settings,
        }  # fmt: skip
        settings = [f"training.{name}={value}" for name, value in values.items()]
        rank, world = distributed.rank(), distributed.world_size()
        run = resolve_run(
            None, config_file=MICRO, ranks_per_node=world,
            settings=[*settings, f"infra.distributed_type={self.engine}",
                f"infra.fsdp_sharding_strategy={self.sharding}", f"training.seed={SEED}"],
        )  # fmt: skip
        config = run.config
        tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(str(self.made.folder / "tokenizer"))
        micro, accumulation = run.micro_batches(world)
        model, engine = build_model(config, tokenizer), None
        if self.explosive:
            model.register_forward_hook(explode, with_kwargs=True)
        if distributed.is_distributed():
            engine = start_engine(
                model, config, device=torch.device("cpu"), dtype=torch.float32, micro_batch_size=micro,
                accumulation_steps=accumulation,
            )  # fmt: skip
        packed = self.made.folder / "packed"
        dataset = Poisoned(open_packed(packed, "train"), *self.poison, explosive=self.explosive)
        collator = UL2DataCollator(tokenizer, 64, 64, seed=SEED)
        sampler = GlobalBatchSampler(len(dataset), BATCH, micro, rank, world, SEED)
        held_out = EvaluationBatches(
            open_packed(packed, "validation"), collator, batch_size=4, max_samples=16, rank=rank, world_size=world
        )
        trainer = Qwen3EncoderDecoderTrainer(
            engine.module if engine else model, tokenizer, config, build_dataloader(dataset, collator, sampler),
            held_out, engine=engine, sample_length=run.sample_length, requests=Asked(wishes or {}),
            checkpoints=self.manager(engine.payload if engine else "fsdp2"),
            gates=self.gates, custom_gates=self.custom_gates, observers=[self.story],
        )  # fmt: skip
        trainer.start_from(None)
        trainer.requests.step = trainer.state.global_step  # type: ignore[attr-defined]
        return trainer

    def manager(self, payload: str) -> CheckpointManager:
        folder, options = self.root / "checkpoints", {"save_total_limit": 50, "payload": payload_named(payload)}
        if self.mirror:
            return DriveCheckpointManager(self.mirror, folder, **options)
        return CheckpointManager(folder, **options)

    def train(self, wishes: Mapping[int, Wishes] | None = None) -> TrainResult:
        return self.trainer(wishes).train()

    def digest(self, step: int = STEPS) -> str:
        return logical_digest(self.checkpoint(step))

    def state(self, step: int = STEPS) -> dict[str, Any]:
        return json.loads((self.checkpoint(step) / "trainer_state.json").read_text())

    def checkpoint(self, step: int) -> Path:
        return self.root / "checkpoints" / f"step-{step}"

    def quarantined(self) -> list[str]:
        """Names of the checkpoints that were moved away."""
        return sorted(path.name.partition(".")[0] for path in self.root.glob("checkpoints/quarantine/*"))
