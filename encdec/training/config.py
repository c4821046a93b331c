"""The configuration tree: strict, keyword-only, checked on construction and on assignment.

``FullConfig.from_yaml`` reads a file, ``to_yaml`` writes it back without loss. A bad value or an unknown key is refused
with its path and the nearest known key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from encdec.errors import ConfigError
from encdec.estimates import MAX_LOGITS_BYTES
from encdec.files import atomic_write_text
from encdec.training.config_errors import explain
from encdec.training.config_section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PhaseName,
    PositiveFloat,
    PositiveInt,
    Section,
    Size,
)
from encdec.training.model_options import FEED_FORWARD_MATRICES, ArchitectureConfig, LoraConfig
from encdec.training.phase_overrides import PhaseOverrides
from encdec.training.yaml_values import dump_yaml, read_yaml


class ModelConfig(Section):
    """Which model, and how it is built."""

    model_name_or_path: str = "Qwen/Qwen3-0.6B"
    """Qwen3 checkpoint (hub id or directory) whose blocks start both stacks, or an encoder-decoder of ours as it is.
    Not read where ``from_scratch`` is set."""
    tokenizer_name_or_path: str | None = None
    """Qwen2/Qwen3 tokenizer (hub id or directory); the same as the model unless given."""
    num_sentinel_tokens: Annotated[int, Field(gt=0, le=2**16)] = 100
    """Sentinels for span corruption; also the most spans one example can have."""
    use_mode_tokens: bool = False
    """Open each encoder input with UL2's [R], [S] or [X], which says what kind of denoising is asked for."""
    use_flash_attention: bool = True
    """Fused attention, by the implementation below. False: plain matrix products (eager)."""
    attn_implementation: Literal["auto", "split", "flex_attention", "sdpa", "eager"] = "auto"
    """Which one. split: flash attention over the decoder's and over the encoder's keys, under one softmax.
    flex_attention: one kernel made for the mask, GPU only. sdpa: torch's choice for a mask that is a tensor. auto: on a
    GPU the fastest, measured at the run's start and then kept to; on CPU split for long sequences, else sdpa."""
    max_logits_mb: PositiveInt = MAX_LOGITS_BYTES // 10**6
    """Most memory of one piece of the loss's logits in fp32, 10^6 bytes: the logits of a whole batch never exist."""
    from_scratch: ArchitectureConfig | None = None
    """Sizes of a model with random weights, instead of ``model_name_or_path``."""
    train_tokenizer_vocab_size: Size | None = None
    """Entries of a byte-level BPE trained on the corpus, sentinels included, instead of ``tokenizer_name_or_path``."""
    n_experts: Annotated[int, Field(gt=1, le=2**12)] | None = None
    """Feed-forwards of each layer (mixture of experts), each as wide as ``intermediate_size``; a dense checkpoint's is
    copied into each. None: one, or as many as the encoder-decoder in ``model_name_or_path`` has."""
    top_k: PositiveInt = 2
    """Experts that each token passes."""
    router_aux_loss_coef: NonNegativeFloat = 0.001
    """What the experts' load-balancing loss (1 where all are used alike) is multiplied by and added to the loss."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the model's own weights."""

    @model_validator(mode="after")
    def _options_go_together(self) -> ModelConfig:
        if self.n_experts is not None and self.top_k > self.n_experts:
            raise ValueError(f"top_k must be at most n_experts, found {self.top_k} of {self.n_experts}")
        inside = set(FEED_FORWARD_MATRICES).intersection(self.lora.target_modules if self.lora else ())
        if self.n_experts is not None and inside:
            raise ValueError(
                f"lora.target_modules must be matrices of attention with n_experts, found {sorted(inside)}"
            )
        return self

    @model_validator(mode="after")
    def _one_attention(self) -> ModelConfig:
        if not self.use_flash_attention and self.attn_implementation not in ("auto", "eager"):
            raise ValueError(
                "use_flash_attention=false is attn_implementation eager, found "
                f"{self.attn_implementation}; remove one of the two"
            )
        return self


class DataConfig(Section):
    """Which text, and how it is cut into samples."""

    dataset_name: str = "HuggingFaceFW/fineweb-edu"
    """Hub data set, local .txt/.jsonl/.parquet file or folder, or "python-stdlib": this Python's own text."""
    dataset_config: str | None = None
    """Configuration name of a hub data set."""
    text_column: str = "text"
    """Column or JSON key that holds the text."""
    streaming: bool = True
    """Read a hub data set as a stream while it is packed (no full download first)."""
    max_seq_length: Size = 8192
    """Most raw tokens of one sample before corruption; the lengths below may bind first."""
    max_encoder_length: Size = 4096
    """Longest encoder input, tokens, sentinels and EOS included."""
    max_decoder_length: Size = 2048
    """Longest decoder target, tokens, sentinels and EOS included."""
    ul2_task_weights: Annotated[list[NonNegativeFloat], Field(min_length=5, max_length=5)] = [1.0, 1.0, 1.0, 1.0, 4.0]
    """Relative frequency of the denoisers R1, R2, X1, X2, S."""
    preprocessing_num_workers: Annotated[int, Field(gt=0, le=1024)] = 4
    """Threads of the tokenizer while text is packed."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=1024)] = 2
    """Loader processes a rank; 0 loads inside the rank. Batches do not depend on it."""
    shuffle_buffer_size: PositiveInt = 10_000
    """Documents in the shuffle buffer of streamed training (``tokenize_on_fly``); packed text is shuffled whole."""
    max_examples: PositiveInt | None = None
    """Read at most this many documents."""
    validation_fraction: Fraction = 0.01
    """Part of the documents held out for evaluation."""
    eval_benchmarks: dict[str, str] = {}
    """Metric -> JSON-lines file of questions and answers, for gates at the end of a phase: tool_accuracy,
    arithmetic_accuracy, safety_accuracy, gsm8k_accuracy."""
    packed_dir: str = "data"
    """Folder of packed shards, shared by all runs with the same corpus, tokenizer and lengths."""
    tokenize_on_fly: bool = False
    """Tokenize while training instead of packing first."""
    sources: list[str] | None = None
    """Several data sets to mix."""
    mix_ratios: list[PositiveFloat] | None = None
    """Relative share of each source."""


class TrainingConfig(Section):
    """Optimization, intervals, tracking."""

    per_device_train_batch_size: PositiveInt | Literal["auto"] = 4
    """Most samples of one micro-batch on one rank. auto: as many as fit its memory, tried at the start; the global
    batch, which then must be given, stays what it is. FSDP2 only."""
    per_device_eval_batch_size: PositiveInt = 8
    """Samples of one evaluation batch on one rank."""
    gradient_accumulation_steps: PositiveInt = 8
    """Micro-batches per optimizer step and rank. Computed instead when ``global_batch_size`` is given."""
    global_batch_size: PositiveInt | None = None
    """Samples per optimizer step over all ranks, at any world size; else micro-batch x accumulation x ranks."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate; Muon's steps are scaled so that it means the same to them (about 1e-3 for Muon).
    In a file also ``max_lr``."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; none on biases and norms."""
    adam_beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """Global L2 norm to which gradients are clipped."""
    num_train_steps: PositiveInt = 100_000
    """Most optimizer steps. A phase's own table goes before."""
    total_tokens: PositiveInt | None = None
    """Most raw tokens. The run stops at whichever of steps and tokens comes first."""
    warmup_steps: NonNegativeInt = 1000
    """Steps of linear warm-up; a phase uses at most 10 % of its steps."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end over its peak."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer. muon: Muon for the matrices of the layers, AdamW for the embedding and norms, at one learning rate."""
    muon_momentum: Fraction = 0.95
    """Decay of Muon's momentum (Nesterov's)."""
    bf16: bool = True
    """Compute in bfloat16 (master weights and reductions stay fp32); fp32 with a warning where hardware lacks it."""
    fp16: bool = False
    """Compute in float16."""
    save_steps: PositiveInt = 1000
    """Steps between checkpoints. In a file also ``save_interval``."""
    save_every: Literal["steps", "auto"] = "steps"
    """auto: between those of ``save_steps``, also whenever the optimum (Daly) for what a save costs has passed."""
    async_save: bool = True
    """Write scheduled checkpoints while training goes on; only the copy to host memory (it must have room) blocks."""
    on_save_failure: Literal["continue", "stop"] = "continue"
    """When storage takes no checkpoint: train on if there is an earlier one. The last save of a run always stops it."""
    save_total_limit: PositiveInt = 5
    """Checkpoints kept. The best, the last valid and those of the final average are never deleted."""
    average_last: NonNegativeInt = 5
    """Last checkpoints of ``save_steps`` whose average a complete run makes, kept until then; fewer than two: none."""
    eval_steps: PositiveInt = 500
    """Steps between evaluations."""
    eval_samples: NonNegativeInt = 1000
    """Held-out samples of one evaluation, over all ranks; 0: no evaluation."""
    eval_generations: PositiveInt = 64
    """Held-out samples for which something is generated, where a gate at the end of a phase asks for it."""
    logging_steps: PositiveInt = 10
    """Steps between lines of the text log and points of the trackers. Step records are written at every step."""
    report_to: list[Literal["wandb", "tensorboard"]] = ["wandb", "tensorboard"]
    """Trackers; each is told by a process of its own, and one that fails is a warning."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 42
    """Seed of initial weights, order of samples and corruption."""
    early_stopping_enabled: bool = True
    """Stop on a plateau of the training loss or on repeated gradient spikes."""
    early_stopping_patience: PositiveInt = 5
    """Checks without improvement before a stop; one check an evaluation interval."""
    early_stopping_min_delta: NonNegativeFloat = 0.01
    """Smallest fall of the 50-step mean loss that counts as improvement, nats."""
    grad_spike_threshold: PositiveFloat = 1000.0
    """Gradient norm that counts as a spike."""
    grad_spike_patience: PositiveInt = 3
    """Consecutive spikes before a stop."""
    monitor_loss_spike: Annotated[float, Field(gt=1)] = 2.0
    """Alert where a loss, out of warm-up, is above this multiple of the mean of the 100 before it."""
    monitor_grad_norm: PositiveFloat = 10.0
    """Alert where the gradient norm before clipping is above this."""
    monitor_throughput_share: Fraction = 0.5
    """Alert where the mean throughput of 10 steps is below this share of the usual (median of 500); 0: never."""
    monitor_data_wait_share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Alert where 50 steps spent more than this share of their time waiting for data; 1: never."""
    monitor_memory_growth: Annotated[float, Field(gt=1)] = 1.5
    """Alert where memory is above this multiple of its level after the first steps, then of that of the last alert."""
    monitor_alert_steps: PositiveInt = 100
    """Steps between two alerts of one kind. All are counted."""
    gate_steps: PositiveInt = 100
    """Steps between checks of the QUICK gates."""
    max_rollbacks: NonNegativeInt = 0
    """Times a run that diverges goes back to its last good checkpoint and past the data that it met there; 0: never."""
    rollback_lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """What each roll-back multiplies the learning rate by, from then on."""
    rollback_margin_steps: NonNegativeInt = 10
    """Steps of data skipped beyond those from the checkpoint to the divergence."""
    loss_spike_ratio: Annotated[float, Field(gt=1)] = 1.5
    """Loss of a step over the mean before the spike from which it belongs to a spike that is rolled back."""
    loss_spike_patience: Annotated[int, Field(gt=0, le=25)] = 20
    """Consecutive steps of a spike, warm-up excepted, before a roll-back; 25 is half the mean's window."""


class InfraConfig(Section):
    """Where and on what the job runs."""

    output_dir: str = "./output"
    """Output of ``encdec.train`` as a program of its own; under the launcher everything lies in the run directory."""
    logging_dir: str = "./logs"
    """Logs of ``encdec.train`` as a program of its own."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Kind of device of every rank. Never changed silently: a missing GPU is an error."""
    distributed_type: Literal["fsdp", "deepspeed", "ddp"] = "fsdp"
    """How the model is spread over the ranks: fsdp is FSDP2, deepspeed is ZeRO-3 (``--sharding fsdp2``, ``zero3``)."""
    fsdp_sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP"] = "FULL_SHARD"
    """FULL_SHARD frees parameters after the forward pass, SHARD_GRAD_OP keeps them until after backward."""
    fsdp_activation_checkpointing: bool = True
    """Recompute activations of each layer in the backward pass, under either engine."""
    fsdp_cpu_offload: bool = False
    """Keep parameters and optimizer state in host memory, under either engine."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON file, keys as in encdec/training/deepspeed_config.py: how ZeRO-3 works. A run keeps its text."""
    num_gpus: PositiveInt = 8
    """Ranks per node (one a GPU, or one a process where device is cpu)."""
    checkpoint_mirror: str | None = None
    """Folder or fsspec URL to which committed checkpoints are copied in the background, one folder a run; from there
    they come back if ``checkpoints/`` is lost. None: no copies."""
    mean_time_to_interrupt_hours: PositiveFloat = 24.0
    """Between failures of the whole job, for ``save_every: auto``; 24 fits some hundred GPUs of a sound cluster."""
    wandb_project: str = "qwen3-encoder-decoder"
    """W&B project."""
    wandb_entity: str | None = None
    """W&B entity."""
    wandb_run_name: str | None = None
    """W&B run name; the run directory's name unless given."""
    notify_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Name of the environment variable with addresses (apprise URLs, separated by spaces) that are sent alerts, closed
    gates, the ends of attempts and of chains, and when a run is given up. They hold secrets, so they stand in no log.
    None: nobody is told."""
    notify_file: str | None = None
    """File with such addresses, which only its user can read; # begins a comment. None: nobody is told."""


class FullConfig(Section):
    """The whole tree. ``FullConfig()`` is the default 0.6B-based run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    infra: InfraConfig = Field(default_factory=InfraConfig)
    phases: dict[PhaseName, PhaseOverrides] = Field(default_factory=dict)

    @classmethod
    def from_yaml(cls, path: str | Path) -> FullConfig:
        """Read a YAML file.

        Raises:
            ConfigError: the file is missing, is no YAML mapping, or breaks a rule; the message names the key's path.
        """
        return cls.from_mapping(read_yaml(path), source=str(path))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str) -> FullConfig:
        """Build from plain nested values; a section with nothing under it is as one left out.

        Args:
            source: where the values came from, for an error.
        """
        values = with_own_names(values, source=source)
        try:
            return cls.model_validate(_without_empty_sections(values))
        except ValidationError as error:
            raise explain(error, source, tree=cls) from None

    def to_yaml(self, path: str | Path) -> None:
        """Write the tree so that ``from_yaml`` gives an equal one."""
        atomic_write_text(Path(path), dump_yaml(self.model_dump()))


OTHER_NAMES = {"max_lr": "learning_rate", "save_interval": "save_steps"}
"""Other names that a file, or --set, may use for keys of ``training``; the tree, and what is written, has its own."""


def with_own_names(values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """``values`` with the tree's own key for each of OTHER_NAMES.

    Raises:
        ConfigError: a key is given under both names.
    """
    training = values.get("training")
    if not isinstance(training, Mapping):
        return dict(values)
    for other, own in OTHER_NAMES.items():
        if other in training and own in training:
            raise ConfigError(
                f"{source}: training.{other} is another name of training.{own}: one of them is given",
                found=f"{training[other]!r} and {training[own]!r}",
                remedy="Remove one of the two",
            )
    return {**values, "training": {OTHER_NAMES.get(str(key), key): value for key, value in training.items()}}


def setting_with_own_name(setting: str) -> str:
    """``training.max_lr=1e-3`` as ``training.learning_rate=1e-3``; any other setting as it is."""
    path, equals, value = setting.partition("=")
    section, _, key = path.strip().partition(".")
    return f"training.{OTHER_NAMES[key]}{equals}{value}" if section == "training" and key in OTHER_NAMES else setting


def _without_empty_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with each section that has nothing under it, null in YAML, as an empty one."""
    sections = {name: {} if section is None else section for name, section in values.items()}
    phases = sections.get("phases")
    if isinstance(phases, Mapping):
        sections["phases"] = {name: {} if row is None else row for name, row in phases.items()}
    return sections
