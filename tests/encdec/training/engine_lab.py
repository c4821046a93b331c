"""A trainer of the micro model under either engine, to be called in ranks (tests.many_ranks)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from encdec import distributed
from encdec.checkpoints import CheckpointManager
from encdec.checkpoints.payload import payload_named
from encdec.data.collator import UL2DataCollator
from encdec.data.corpus import open_corpus
from encdec.data.packing import ensure_packed, open_packed
from encdec.data.sampler import GlobalBatchSampler
from encdec.data.ul2_dataset import UL2Dataset, build_dataloader
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training.build import plan_model
from encdec.training.engines import Engine, TorchEngine, start_engine
from encdec.training.optimizer import make_optimizer
from encdec.training.run_config import RunConfig, divide_global_batch, resolve_run
from encdec.training.trainer import Qwen3EncoderDecoderTrainer
from tests.conftest import MICRO

GLOBAL_BATCH = 24
"""Samples; 1, 2, 3, 4 and 8 ranks divide it."""
SAVED, END = 10, 30
"""Steps: where others continue from, and the last one."""


@dataclass(frozen=True)
class Made:
    """What all trainers share: tokenizer and packed text, in a folder."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Made:
        corpus = open_corpus("python-stdlib", max_examples=30)
        tokenizer = Qwen3EncoderDecoderTokenizer.train_from_texts(corpus.documents(), 512, 16)
        tokenizer.save_pretrained(folder / "tokenizer")
        run = resolve_run(None, config_file=MICRO)
        ensure_packed(corpus, tokenizer, folder / "packed", sample_length=run.sample_length, validation_fraction=0.1)
        return cls(folder)

    def tokenizer(self) -> Qwen3EncoderDecoderTokenizer:
        return Qwen3EncoderDecoderTokenizer.from_pretrained(str(self.folder / "tokenizer"))


@dataclass(frozen=True)
class Scene:
    """One training: ``call`` it in every rank."""

    made: Made
    engine: str
    """infra.distributed_type; or "plain": one process, whose model nothing shards."""
    root: Path
    """Of checkpoints and of ``records.json``."""
    steps: int
    """Step at which it ends, with a checkpoint."""
    start: Path | None = None
    """Checkpoint to continue from; it is saved again at once, under ``root``."""
    settings: list[str] = field(default_factory=list)

    def __call__(self) -> None:
        trainer, observer = self.trainer(), Losses()
        trainer.observers = [observer]
        if self.start:
            trainer.load_checkpoint(self.start)
            trainer.save()
        trainer.train()
        if distributed.rank() == 0:
            (self.root / "records.json").write_text(json.dumps(observer.records))

    def run(self) -> RunConfig:
        settings = [
            f"training.num_train_steps={self.steps}", "training.warmup_steps=0", "training.learning_rate=1e-3",
            "training.lr_scheduler_type=constant", f"training.global_batch_size={GLOBAL_BATCH}",
            "training.save_steps=1000", *self.settings,
        ]  # fmt: skip
        if self.engine != "plain":
            settings.append(f"infra.distributed_type={self.engine}")
        return resolve_run(None, config_file=MICRO, settings=settings, ranks_per_node=distributed.world_size())

    def trainer(self, dtype: torch.dtype = torch.float32) -> Qwen3EncoderDecoderTrainer:
        run = self.run()
        rank, world = distributed.rank(), distributed.world_size()
        tokenizer = self.made.tokenizer()
        micro, accumulation = divide_global_batch(GLOBAL_BATCH, run.config.training.per_device_train_batch_size, world)
        plan = plan_model(run.config, tokenizer)
        if self.engine == "plain":
            model = plan.filled()
            engine: Engine = TorchEngine(model, make_optimizer(model, run.config))
        else:
            engine = start_engine(
                plan.model, run.config, device=torch.device("cpu"), dtype=dtype, micro_batch_size=micro,
                accumulation_steps=accumulation, stream=plan.weights.stream(),
            )  # fmt: skip
            engine.prove_sharding(world)
        dataset = UL2Dataset(open_packed(self.made.folder / "packed", "train"))
        collator = UL2DataCollator(tokenizer, 64, 64, seed=42)
        loader = build_dataloader(
            dataset, collator, GlobalBatchSampler(len(dataset), GLOBAL_BATCH, micro, rank, world, 42)
        )
        return Qwen3EncoderDecoderTrainer(
            engine.module, tokenizer, run.config, loader, engine=engine, sample_length=run.sample_length,
            checkpoints=CheckpointManager(self.root, payload=payload_named(engine.payload)),
        )  # fmt: skip

    @property
    def losses(self) -> dict[int, float]:
        return self.recorded("loss")

    def recorded(self, name: str) -> dict[int, float]:
        """One field of the step records, by step."""
        return {record["step"]: record[name] for record in json.loads((self.root / "records.json").read_text())}


def farthest(scene: Scene, whole: Scene) -> float:
    """Largest difference of losses, nats, over the steps that ``scene`` did."""
    assert list(scene.losses) == list(range(1 if scene.start is None else SAVED + 1, scene.steps + 1))
    return max(abs(loss - whole.losses[step]) for step, loss in scene.losses.items())


class Losses:
    """Keeps the step records."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_step(self, record: Any, moving_loss: float) -> None:
        self.records.append(record.to_json())

    def on_evaluation(self, step: int, metrics: Any) -> None: ...
    def on_save(self, saved: Any) -> None: ...
    def on_save_failed(self, step: int, reason: str, last: str | None) -> None: ...
    def on_alert(self, alert: Any) -> None: ...
    def on_event(self, kind: str, facts: Any) -> None: ...
    def close(self) -> None: ...
