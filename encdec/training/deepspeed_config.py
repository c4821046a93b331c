"""DeepSpeed's JSON file (``infra.deepspeed_config``): what may stand in it, and what DeepSpeed gets in the end.

A run's own keys decide what is computed: steps, batches, clipping, precision, optimizer, schedule. The file decides how
ZeRO-3 does it: buckets, prefetching, offload. A key that would contradict the run, or that is not known, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from encdec.errors import ConfigError
from encdec.training.config import FullConfig, Section
from encdec.training.config_errors import explain

Auto = Literal["auto"]
BUCKET_ELEMENTS = {"cuda": 2 * 10**8, "cpu": 10**6}
"""Elements that are reduced, or fetched ahead, at once; DeepSpeed keeps a buffer of that size."""


def _whole(value: Any) -> Any:
    """5e8 is how people write a bucket; JSON makes a float of it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Elements = Annotated[int, BeforeValidator(_whole), Field(ge=0)]


class Offload(Section):
    """Where optimizer state or parameters are kept."""

    device: Literal["none", "cpu"] = "none"
    """Host memory, or none: where the computation is."""
    pin_memory: bool = False
    """Page-locked, so that copies overlap the computation."""


class ZeroOptimization(Section):
    """How parameters, gradients and optimizer state are partitioned; sizes in elements."""

    stage: Literal[3] = 3
    """3: all three of them."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on; GPUs only."""
    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they come."""
    reduce_scatter: bool = True
    """Reduce by reduce-scatter rather than all-reduce."""
    reduce_bucket_size: Elements | Auto | None = None
    """Elements that are reduced at once; auto: hidden size squared."""
    sub_group_size: Elements = 10**9
    """Elements that the optimizer updates at once."""
    stage3_prefetch_bucket_size: Elements | Auto | None = None
    """Elements that are fetched ahead; auto: 0.9 of the hidden size squared."""
    stage3_param_persistence_threshold: Elements | Auto = 0
    """Parameters smaller than this stay whole on every rank between steps, beside their part; auto: 10 hidden sizes."""
    stage3_max_live_parameters: Elements = 10**9
    """Most elements that are whole at once."""
    stage3_max_reuse_distance: Elements = 10**9
    """A parameter that is needed again within so many elements is not freed."""
    stage3_gather_16bit_weights_on_model_save: bool = False
    """Without effect: checkpoints are saved sharded."""
    offload_optimizer: Offload = Field(default_factory=Offload)
    """Optimizer state, and the update itself."""
    offload_param: Offload = Field(default_factory=Offload)
    """Parameters."""


class Precision(Section):
    """One of bf16 and fp16."""

    enabled: bool | Auto = "auto"
    """As ``training`` says."""


class DeepSpeedFile(Section):
    """What ``infra.deepspeed_config`` may hold."""

    zero_optimization: ZeroOptimization = Field(default_factory=ZeroOptimization)
    train_batch_size: Auto = "auto"
    """As ``training.global_batch_size`` says, at any number of ranks."""
    train_micro_batch_size_per_gpu: Auto = "auto"
    """As ``training.per_device_train_batch_size`` says."""
    gradient_accumulation_steps: Auto = "auto"
    """What the two above come to."""
    gradient_clipping: Annotated[float, Field(gt=0)] | Auto = "auto"
    """As ``training.max_grad_norm`` says."""
    bf16: Precision = Field(default_factory=Precision)
    fp16: Precision = Field(default_factory=Precision)
    wall_clock_breakdown: bool = False
    """Log how long DeepSpeed's parts of a step take."""
    memory_breakdown: bool = False
    """Log memory at each of them."""
    steps_per_print: Any = None
    """Without effect: steps are logged by ``training.logging_steps``."""


def embed_file(config: FullConfig) -> None:
    """Put the file's text in the place of its path, so that a run needs no file beside its own, and its identity
    depends on what the file says, not on where it lies.

    Raises:
        ConfigError: no such file, no JSON object, an unknown key, or one that contradicts the run.
    """
    given = config.infra.deepspeed_config
    if given is None:
        return
    if given.lstrip().startswith("{"):
        source, text = "infra.deepspeed_config", given
    else:
        source, text = given, _read(Path(given))
    file = parse(text, source)
    _require_agreement(file, config, source)
    config.infra.deepspeed_config = file.model_dump_json(exclude_unset=True)


def parse(text: str, source: str) -> DeepSpeedFile:
    """The checked content of a file.

    Raises:
        ConfigError: naming the key.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            "infra.deepspeed_config must be a JSON file", found=f"{source}: {error}", remedy="Mend that line"
        ) from None
    try:
        return DeepSpeedFile.model_validate(values)
    except ValidationError as error:
        remedy = 'Correct {path} in the file; leave it out or write "auto" where the run\'s own keys decide'
        raise explain(error, source, tree=DeepSpeedFile, remedy=remedy) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "infra.deepspeed_config must be a readable JSON file",
            found=f"{path.absolute()} ({getattr(error, 'strerror', None) or error})",
            remedy="Correct the path, or leave the key out",
        ) from None


def _require_agreement(file: DeepSpeedFile, config: FullConfig, source: str) -> None:
    """What the file says of the run's own matters must be what the run says."""
    training = config.training
    for key, value, rule, wanted in (
        ("gradient_clipping", file.gradient_clipping, "training.max_grad_norm", training.max_grad_norm),
        ("bf16.enabled", file.bf16.enabled, "training.bf16", training.bf16),
        ("fp16.enabled", file.fp16.enabled, "training.fp16", training.fp16),
    ):
        if value not in ("auto", wanted):
            raise ConfigError(
                f"{source}: {key} must agree with {rule}={wanted}",
                found=value,
                remedy=f'Write "auto" there or leave it out: {rule} decides',
            )


def engine_config(
    config: FullConfig,
    environment: Mapping[str, str],
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
    bf16: bool,
) -> dict[str, Any]:
    """All that DeepSpeed is told. Pure.

    The trainer clips, for both engines the same way, so DeepSpeed does not; reductions are fp32 as FSDP2's are.

    Args:
        environment: where ``accelerate launch`` leaves its file's offload devices: they say where, not what.
    """
    file = parse(config.infra.deepspeed_config or "{}", "infra.deepspeed_config")
    zero = file.zero_optimization.model_dump()
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size"):
        zero[key] = BUCKET_ELEMENTS[config.infra.device] if zero[key] is None else zero[key]
    for key in ("offload_optimizer", "offload_param"):
        asked = environment.get(f"ACCELERATE_DEEPSPEED_{key.upper()}_DEVICE")
        if config.infra.fsdp_cpu_offload or asked == "cpu":
            zero[key]["device"] = "cpu"
    zero["overlap_comm"] = zero["overlap_comm"] and config.infra.device == "cuda"
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch_size * accumulation_steps * world_size,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": file.wall_clock_breakdown,
        "memory_breakdown": file.memory_breakdown,
        "zero_optimization": zero,
    }
