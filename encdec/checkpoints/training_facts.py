"""How a model was trained, kept beside its configuration as plain JSON, and told on the card of an exported model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from encdec.checkpoints.manifest import Manifest
from encdec.denoisers import UL2_DENOISERS
from encdec.files import atomic_write_json
from encdec.training.run_config import RunConfig

TRAINING_FACTS = "training.json"


@dataclass(frozen=True)
class TrainingFacts:
    """What a card tells about a run; no path of any machine."""

    run_identity: str
    """Of the run, as its checkpoints' manifests have it."""
    base_model: str | None = None
    """Hub id."""
    datasets: list[str] = field(default_factory=list)
    """Hub ids."""
    rows: dict[str, str] = field(default_factory=dict)
    """Name -> value."""

    @classmethod
    def of_run(cls, run: RunConfig) -> TrainingFacts:
        config, training = run.config, run.config.training
        begun = config.model.model_name_or_path if config.model.from_scratch is None else None
        if run.starts_from and hub_id(run.starts_from.source):
            begun = run.starts_from.source
        weights = dict(zip((task.name for task in UL2_DENOISERS), config.data.ul2_task_weights, strict=True))
        steps, tokens = f"{run.num_train_steps:,} steps", run.num_train_steps * run.tokens_per_step
        rows = {
            "Phase": run.phase.phase.value if run.phase else "",
            "Text": told(config.data.dataset_name, config.data.dataset_config),
            "Objective": "UL2 denoising; " + ", ".join(f"{name} {weight:g}" for name, weight in weights.items()),
            "Planned": f"{steps} of {run.global_batch_size:,} samples of {run.sample_length:,} tokens "
            f"({tokens:,} tokens)",
            "Optimizer": f"{training.optimizer}, learning rate {training.learning_rate:g} "
            f"({training.lr_scheduler_type}, {run.warmup_steps:,} steps of warm-up), "
            f"weight decay {training.weight_decay:g}, gradients clipped at {training.max_grad_norm:g}",
            "Precision": "bfloat16 where the hardware has it, master weights and reductions in float32"
            if training.bf16
            else "float32",
            "Sharding": {"fsdp": "FSDP2", "deepspeed": "DeepSpeed ZeRO-3"}.get(config.infra.distributed_type, ""),
            "Seed": str(training.seed),
        }
        return cls(
            run.identity,
            hub_id(begun),
            [name] if (name := hub_id(config.data.dataset_name)) else [],
            {name: value for name, value in rows.items() if value},
        )

    def write(self, folder: Path) -> None:
        atomic_write_json(folder / TRAINING_FACTS, asdict(self))

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> TrainingFacts | None:
        """Those in ``folder``, if there are any and they are of the checkpoint's run."""
        path = folder / TRAINING_FACTS
        if not path.is_file():
            return None
        try:
            facts = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            return None  # another program's file of that name
        return facts if facts.run_identity == manifest.run_identity else None


def checkpoint_rows(manifest: Manifest) -> dict[str, str]:
    """What a checkpoint says of itself."""
    kind = f"mean of {len(manifest.made_of)} checkpoints, the last after " if manifest.made_of else ""
    rows = {"Weights": f"{kind}step {manifest.step:,} ({manifest.samples_consumed:,} samples)"}
    rows |= {f"Held-out {name}": f"{value:.4g}" for name, value in sorted(manifest.metrics.items())}
    return rows | {"Versions": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))}


def hub_id(name: str | None) -> str | None:
    """``name``, if it can be one of the hub: owner/name, and no file or folder here."""
    if name is None or name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).exists():
        return None
    return name


def told(name: str, part: str | None) -> str:
    """A data set for people: a local path is not told."""
    if hub_id(name) or "/" not in name:
        return f"{name} ({part})" if part else name
    return "local files"
