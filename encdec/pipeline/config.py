"""The pipeline's configuration: what is trained at which scale, by which gates it is judged, where it goes. No torch.

``save`` and ``load`` keep it in YAML or JSON (by the file's suffix) without loss; an unknown key is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from encdec.errors import ConfigError
from encdec.files import atomic_write_text
from encdec.gates import Comparison, GateLevel, ValidationGate
from encdec.pipeline.scales import ModelScale, ScaleConfig, get_model_config, scale_named
from encdec.training.config import (
    ArchitectureConfig,
    DataConfig,
    FullConfig,
    NonNegativeInt,
    PhaseOverrides,
    PositiveFloat,
    PositiveInt,
    Section,
    Size,
)
from encdec.training.config_errors import explain
from encdec.training.execution import TrainingPhase
from encdec.training.yaml_values import apply_settings, dump_yaml, read_yaml

JSON_SUFFIX = ".json"
SAVES_OF_A_RUN = 4
"""Checkpoints, each with an evaluation, of a run whose intervals are not set."""
Launch = Callable[[Path, Path], int]
"""(YAML file of a FullConfig, run directory) -> exit code, once the run is over: who trains a scale elsewhere."""
Saved = TypeVar("Saved", bound="SavedSection")


def _as_scale(value: Any) -> Any:
    try:
        return scale_named(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ValueError(f"{error.rule}: {', '.join(ModelScale)}") from None


def _as_level(value: Any) -> Any:
    if isinstance(value, str) and value not in set(GateLevel):
        raise ValueError(f"a level must be one of {', '.join(GateLevel)}")
    return GateLevel(value) if isinstance(value, str) else value


Scale = Annotated[ModelScale, BeforeValidator(_as_scale)]
Level = Annotated[GateLevel, BeforeValidator(_as_level)]


class SavedSection(Section):
    """A part of the tree that has a file of its own."""

    def save(self, path: str | Path) -> None:
        """Write it so that ``load`` gives an equal one: JSON where ``path`` ends in .json, else YAML."""
        values = self.model_dump(mode="json")
        is_json = Path(path).suffix == JSON_SUFFIX
        atomic_write_text(Path(path), json.dumps(values, indent=2) + "\n" if is_json else dump_yaml(values))

    @classmethod
    def load(cls: type[Saved], path: str | Path) -> Saved:
        """Read what ``save`` wrote, or a person.

        Raises:
            ConfigError: unreadable, or a key or value breaks a rule; names its path and the nearest known key.
        """
        return cls.from_mapping(read_yaml(path), source=str(path))  # JSON is YAML

    @classmethod
    def from_mapping(cls: type[Saved], values: Mapping[str, Any], *, source: str) -> Saved:
        """Build from plain nested values.

        Args:
            source: where they came from, for an error.

        Raises:
            ConfigError: a key or value breaks a rule.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(error, source, tree=cls) from None


class GateConfig(Section):
    """A gate of the user's own. One of a name that a level has replaces it there."""

    name: Annotated[str, Field(min_length=1)]
    """What people call the gate."""
    metric_name: Annotated[str, Field(min_length=1)]
    """What must be measured: a built-in metric, or one that an evaluator is registered for."""
    threshold: float
    """The bound, in the metric's unit."""
    comparison: Comparison = "<"
    """How the metric must compare with it."""
    required: bool = True
    """Whether work stops if it does not pass."""
    description: str = ""
    """Why it is asked for."""
    levels: list[Level] | None = None
    """Where it is asked for; None: where the table has its name, else from the first level that measures it."""

    @property
    def gate(self) -> ValidationGate:
        return ValidationGate(**{name: getattr(self, name) for name in type(self).model_fields if name != "levels"})


def _as_gate_configs(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return [dict(gate.__dict__) if isinstance(gate, ValidationGate) else gate for gate in value]


class ModelOverrides(Section):
    """Sizes that differ from the scale's row. None leaves the row's value."""

    hidden_size: Size | None = None
    """Width of the residual stream."""
    intermediate_size: Size | None = None
    """Width of the gated feed-forward."""
    num_hidden_layers: Size | None = None
    """Layers in the encoder, and again in the decoder."""
    num_attention_heads: Size | None = None
    """Query heads."""
    num_key_value_heads: Size | None = None
    """Key and value heads; divides the query heads."""
    head_dim: Size | None = None
    """Width of one head."""
    max_position_embeddings: Size | None = None
    """Longest sequence on either side, tokens; lengths of ``data`` above it are lowered to it."""


class PipelineTrainingConfig(SavedSection):
    """What is trained. None leaves a value to the scale's row."""

    experiment_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = "encdec"
    """Folder of the runs and their results under checkpoint_dir."""
    model_scale: Scale = ModelScale.TINY
    """Row of the table (``encdec.pipeline.scales``)."""
    model_overrides: ModelOverrides = Field(default_factory=ModelOverrides)
    """Sizes instead of the row's, at every scale, unless ``scale_overrides`` has others."""
    scale_overrides: dict[Scale, ModelOverrides] = Field(default_factory=dict)
    """Sizes instead of the row's, by scale: a progressive run in small."""
    num_epochs: PositiveInt = 1
    """Passes over ``max_samples`` samples."""
    max_samples: PositiveInt | None = None
    """Samples of one pass; None: the scale's recommended_samples."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, instead of those of num_epochs."""
    batch_size: PositiveInt | None = None
    """Samples per optimizer step, all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Most samples of one micro-batch on one rank."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 1000
    """Steps of linear warm-up; at most 10 % of the steps."""
    save_steps: PositiveInt | None = None
    """Steps between checkpoints, each with an evaluation; None: a quarter of the steps."""
    tokenizer_name_or_path: str = "Qwen/Qwen3-0.6B"
    """Qwen2/Qwen3 tokenizer, hub id or directory."""
    train_tokenizer_vocab_size: Size | None = None
    """Entries of a byte-level BPE trained on the corpus, instead of ``tokenizer_name_or_path``."""
    num_sentinel_tokens: Annotated[int, Field(gt=0, le=2**16)] = 100
    """Sentinels of the tokenizer."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Kind of device of every rank."""
    num_gpus: PositiveInt = 1
    """Ranks per node. One trains in this process; more are started by torchrun, unless a launch is given."""
    use_wandb: bool = False
    """Whether W&B is told, beside the records."""
    validation_gates: Annotated[list[GateConfig], BeforeValidator(_as_gate_configs)] = Field(default_factory=list)
    """Gates of your own, laid over the table's."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Which text; its lengths are lowered to the scale's context."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Any other key of the configuration tree (encdec/training/config.py), by dotted path; goes before all above."""

    @model_validator(mode="after")
    def _paths_of_settings(self) -> PipelineTrainingConfig:
        for path in self.settings:
            if path.count(".") < 1 or not all(path.split(".")):
                raise ValueError(f"settings takes section.key paths such as training.weight_decay, found {path!r}")
        return self

    @property
    def scale_config(self) -> ScaleConfig:
        """The scale's row with the overrides laid over it."""
        row = get_model_config(self.model_scale)
        for overrides in (self.model_overrides, self.scale_overrides.get(self.model_scale)):
            given = overrides.model_dump(exclude_none=True) if overrides else {}
            row = replace(row, **given)
        return row

    def apply_scale_defaults(self) -> PipelineTrainingConfig:
        """Give every value that was left to the scale the scale's; returns itself."""
        defaults = get_model_config(self.model_scale).defaults
        self.max_samples = self.max_samples or get_model_config(self.model_scale).recommended_samples
        self.batch_size = self.batch_size or defaults.batch_size
        self.micro_batch_size = self.micro_batch_size or min(defaults.micro_batch_size, self.batch_size)
        self.learning_rate = self.learning_rate or defaults.learning_rate
        self.max_steps = self.max_steps or max(1, self.num_epochs * self.max_samples // self.batch_size)
        self.save_steps = self.save_steps or max(1, self.max_steps // SAVES_OF_A_RUN)
        return self

    def at_scale(self, scale: ModelScale) -> PipelineTrainingConfig:
        """A copy for ``scale``."""
        return self.model_copy(update={"model_scale": scale}, deep=True)

    def full_config(self) -> FullConfig:
        """The configuration tree of the scale's run.

        Raises:
            ConfigError: the values contradict each other, or ``settings`` names a key that is not there.
        """
        values = self.model_copy(deep=True).apply_scale_defaults()
        tree = {
            "model": values._model_section(),
            "data": values._data_section(),
            "training": values._training_section(),
            "infra": {"device": self.device, "num_gpus": self.num_gpus},
        }
        source = f"{self.experiment_name} at scale {self.model_scale}"
        tree = apply_settings(tree, [f"{path}={json.dumps(value)}" for path, value in self.settings.items()])
        config = FullConfig.from_mapping(tree, source=source)
        config.phases = {str(phase): _same_in_any_phase(config) for phase in TrainingPhase}  # type: ignore[misc]
        return config

    def _model_section(self) -> dict[str, Any]:
        shape = {name: getattr(self.scale_config, name) for name in ArchitectureConfig.model_fields}
        return {
            "from_scratch": shape,
            "tokenizer_name_or_path": self.tokenizer_name_or_path,
            "train_tokenizer_vocab_size": self.train_tokenizer_vocab_size,
            "num_sentinel_tokens": self.num_sentinel_tokens,
        }

    def _data_section(self) -> dict[str, Any]:
        context, data = self.scale_config.max_position_embeddings, self.data.model_dump()
        lengths = ("max_seq_length", "max_encoder_length", "max_decoder_length")
        return data | {name: min(data[name], context) for name in lengths}

    def _training_section(self) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": self.micro_batch_size,
            "per_device_eval_batch_size": self.micro_batch_size,
            "global_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "num_train_steps": self.max_steps,
            "warmup_steps": self.warmup_steps,
            "save_steps": self.save_steps,
            "eval_steps": self.save_steps,
            "bf16": self.device == "cuda",
            "report_to": ["wandb"] if self.use_wandb else [],
        }


def _same_in_any_phase(config: FullConfig) -> PhaseOverrides:
    """A launcher trains phases; whichever it takes, the run is this one, and the pipeline's gates judge it."""
    training = config.training
    return PhaseOverrides(
        num_tokens=training.total_tokens or 2**62,
        num_train_steps=training.num_train_steps, eval_steps=training.eval_steps, save_steps=training.save_steps,
        logging_steps=training.logging_steps, max_loss_after_warmup=1e9, min_loss_decrease=-1e9,
    )  # fmt: skip


class PipelineConfig(SavedSection):
    """The whole pipeline: training, gates, benchmarks, places."""

    training: PipelineTrainingConfig = Field(default_factory=PipelineTrainingConfig)
    strict_validation: bool = True
    """Whether a required gate that does not pass ends the pipeline; otherwise it is only reported."""
    eval_benchmarks: dict[str, str] = Field(default_factory=dict)
    """Metric -> JSON-lines file of questions and answers: arithmetic_accuracy, tool_accuracy, safety_accuracy,
    gsm8k_accuracy. A metric without its file is not measured, and a gate on it does not pass."""
    checkpoint_dir: str = "./pipeline"
    """Folder of all experiments: <experiment_name>/<scale>/ is a run directory."""
    eval_device: Literal["cuda", "cpu"] = "cpu"
    """Kind of device on which a trained model is evaluated, whole."""
    eval_generations: PositiveInt = 64
    """Most held-out samples for which something is generated (denoising_exact_match, latency_p50, latency_p99)."""

    @property
    def experiment_dir(self) -> Path:
        """Folder of this experiment's runs and results."""
        return Path(self.checkpoint_dir).absolute() / self.training.experiment_name


def apply_scale_defaults(
    training: PipelineTrainingConfig, scale: ModelScale | str | None = None
) -> PipelineTrainingConfig:
    """``training``, at ``scale`` where one is given, with every value that was left to the scale filled in."""
    if scale is not None:
        training.model_scale = scale_named(scale)
    return training.apply_scale_defaults()


def create_quick_test_config() -> PipelineTrainingConfig:
    """Every part of the pipeline in seconds on a CPU, without a network: shrunk models on this Python's own text."""
    return PipelineTrainingConfig(
        experiment_name="quick-test", model_overrides=ModelOverrides(
            hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, max_position_embeddings=128,
        ),
        scale_overrides={ModelScale.SMALL: ModelOverrides(hidden_size=48, intermediate_size=144, num_hidden_layers=2)},
        max_steps=200, batch_size=8, micro_batch_size=8, learning_rate=5e-3, train_tokenizer_vocab_size=300,
        num_sentinel_tokens=16, device="cpu", data=DataConfig(
            dataset_name="python-stdlib", max_seq_length=48, max_encoder_length=64, max_decoder_length=64,
            max_examples=60, validation_fraction=0.1, dataloader_num_workers=0,
        ),
        settings={
            "training.eval_samples": 32, "training.adam_beta2": 0.95, "infra.fsdp_activation_checkpointing": False,
        },
    )  # fmt: skip


def create_scale_test_config(scale: ModelScale | str) -> PipelineTrainingConfig:
    """Whether a scale trains at all on the machine at hand: its real sizes and defaults, a hundred steps."""
    scale = scale_named(scale)
    return PipelineTrainingConfig(
        experiment_name=f"scale-test-{scale}", model_scale=scale, max_steps=100, settings={"training.eval_samples": 64}
    ).apply_scale_defaults()
