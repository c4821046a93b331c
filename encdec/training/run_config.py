"""The resolved run: what one phase of one configuration comes to on a given number of ranks.

Precedence of a phase's numbers: defaults < phase table < the YAML file's ``phases:`` section < ``--set``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from encdec.denoisers import raw_sample_length
from encdec.errors import ConfigError, RunDirectoryError
from encdec.files import RunPaths, atomic_write_text
from encdec.gates import GateLevel, ValidationGate
from encdec.training.config import (
    FullConfig,
    NonNegativeInt,
    PositiveInt,
    setting_with_own_name,
    with_own_names,
)
from encdec.training.execution import PHASE_CONFIGS, PhaseConfig, StartingPoint, TrainingPhase, previous_phases
from encdec.training.rules import check_rules, settled_micro_batch
from encdec.training.yaml_values import apply_settings, dump_yaml, read_yaml

PLACE_KEYS = (
    "name", "nodes", "ranks_per_node", "config.infra.num_gpus", "config.infra.output_dir", "config.infra.logging_dir",
    "config.infra.checkpoint_mirror", "config.data.packed_dir", "config.data.preprocessing_num_workers",
    "starts_from.source",
    "config.infra.notify_env", "config.infra.notify_file",
    "config.training.monitor_loss_spike", "config.training.monitor_grad_norm",
    "config.training.monitor_throughput_share", "config.training.monitor_data_wait_share",
    "config.training.monitor_memory_growth", "config.training.monitor_alert_steps",
)  # fmt: skip
"""Dotted paths that say where a run runs, what it is called and who is told what about it, not what it computes."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The resolved run: everything a job needs to know, frozen. Written as ``run.yaml``."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    phase: PhaseConfig | None
    """The phase's row with all overrides laid over it; None: training as the ``training:`` section says, ungated."""
    config: FullConfig
    nodes: PositiveInt
    ranks_per_node: PositiveInt
    sample_length: PositiveInt
    """Raw tokens per sample."""
    global_batch_size: PositiveInt
    """Samples per optimizer step, all ranks."""
    num_train_steps: PositiveInt
    """Optimizer steps this run will do: the smaller of what steps and tokens allow."""
    bound_by: Literal["steps", "tokens"]
    """Which of the two ends the run: steps | tokens."""
    warmup_steps: NonNegativeInt
    starts_from: StartingPoint | None = None
    """None: the weights that the configuration names."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def tokens_per_step(self) -> int:
        """Raw tokens per optimizer step."""
        return self.global_batch_size * self.sample_length

    @property
    def data_seed(self) -> int:
        """Seed of the order of samples and of their corruption: each phase of a chain has an order of its own, or a
        later one would begin with the very examples of the first.
        """
        return self.config.training.seed + (len(previous_phases(self.phase.phase)) if self.phase else 0)

    @property
    def identity(self) -> str:
        """Hex digest of all that decides what is computed; not of where it runs, nor of the name."""
        facts = {path: value for path, value in flatten(self.to_mapping()).items() if path not in PLACE_KEYS}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def mirror_folder(self) -> str:
        """Name of this run's folder under ``infra.checkpoint_mirror``, which several runs may share."""
        tail = self.identity[:8]
        return self.name if self.name.endswith(tail) else f"{self.name}-{tail}"

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """(micro-batch size, accumulation steps) of one rank at ``world_size``; their product keeps the global batch.

        Where the configuration says auto, the most that there can be: a rank's whole share of the global batch.

        Raises:
            ConfigError: the global batch cannot be cut evenly.
        """
        return divide_global_batch(self.global_batch_size, self.config.training.per_device_train_batch_size, world_size)

    def to_mapping(self) -> dict[str, Any]:
        """Plain nested values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {
            "phase": self.phase.to_mapping() if self.phase else None,
            "config": self.config.model_dump(),
            "starts_from": asdict(self.starts_from) if self.starts_from else None,
        }

    def write(self, path: Path) -> None:
        """Write ``run.yaml``."""
        atomic_write_text(path, dump_yaml(self.to_mapping()))


def divide_global_batch(
    global_batch_size: int, largest_micro_batch: int | Literal["auto"], world_size: int
) -> tuple[int, int]:
    """Largest micro-batch up to ``largest_micro_batch`` that divides a rank's share, and the accumulation it needs.

    ``auto`` is no bound.

    Raises:
        ConfigError: ``global_batch_size`` is no multiple of ``world_size``.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest or not share:
        raise ConfigError(
            "The global batch must be a multiple of the number of ranks",
            found=f"training.global_batch_size={global_batch_size} on {world_size} ranks",
            remedy=f"Use {max(1, share) * world_size} samples, or a number of ranks that divides {global_batch_size}",
        )
    most = share if largest_micro_batch == "auto" else min(largest_micro_batch, share)
    micro = next(size for size in range(most, 0, -1) if share % size == 0)
    return micro, share // micro


def read_run_config(paths: RunPaths) -> RunConfig:
    """Read ``run.yaml`` back.

    Raises:
        RunDirectoryError: there is none, or it is not what ``RunConfig.write`` wrote; says what is wrong.
    """
    if not os.path.lexists(paths.run_yaml):
        raise RunDirectoryError(
            "A run directory holds run.yaml",
            found=f"none in {paths.root}",
            remedy="Make one with python -m launchers.submit --phase sanity_check --config configs/tiny.yaml",
        )
    try:
        return _run_from(read_yaml(paths.run_yaml))
    except ConfigError as error:
        damage = str(error.found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        damage = f"{paths.run_yaml} ({'.'.join(map(str, first['loc']))}: {first['msg'].lower()})"
    except (ValueError, TypeError) as error:  # values that are no JSON: a date, an alias of itself
        damage = f"{paths.run_yaml} ({error})"
    raise RunDirectoryError(
        "run.yaml must be as it was when the run was made",
        found=damage,
        remedy="Restore run.yaml from a copy, or give another directory",
    )


def _run_from(values: Mapping[str, Any]) -> RunConfig:
    """``RunConfig.to_mapping`` turned round. Every key must be there: a default could be another run's value."""
    run = TypeAdapter(RunConfig).validate_json(json.dumps(values), strict=True)
    missing = sorted(flatten(run.to_mapping()).keys() - flatten(values).keys())
    if missing:
        raise ValueError(f"{missing[0]}: field required")
    return run


def require_same_run(paths: RunPaths, run: RunConfig) -> RunConfig:
    """The run of an existing directory, which may have been made for another place, but for no other configuration.

    Raises:
        RunDirectoryError: naming the first values that differ, or that it is no run directory.
    """
    if not os.path.lexists(paths.run_yaml):
        raise RunDirectoryError(
            "A run directory holds run.yaml or does not exist yet",
            found=f"{paths.root}, which exists without one",
            remedy="Choose another directory or name",
        )
    existing = read_run_config(paths)
    if existing.identity == run.identity:
        return existing
    there, now = flatten(existing.to_mapping()), flatten(run.to_mapping())
    differences = [
        f"{path}: {there.get(path)} there, {now.get(path)} now"
        for path in {**there, **now}
        if path not in PLACE_KEYS and there.get(path) != now.get(path)
    ]
    raise RunDirectoryError(
        f"{paths.root} was made for another configuration and keeps it",
        found="; ".join(differences[:3]),
        remedy="Give the same values as then, or another directory or name",
    )


def make_run_directory(paths: RunPaths, run: RunConfig) -> None:
    """The directory with its run.yaml, for a start that claims its own attempt.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    try:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            paths.stop_request.unlink(missing_ok=True)  # a request of last time must not stop this start
        paths.make()
        if not os.path.lexists(paths.run_yaml):
            run.write(paths.run_yaml)
    except OSError as error:
        raise RunDirectoryError(
            "The run directory must be writable",
            found=f"{paths.root} ({error.strerror})",
            remedy="Choose another with --output_dir, or free or open the folder above it",
        ) from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keyed by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def resolve_run(
    phase: TrainingPhase | None,
    *,
    config_file: str | Path,
    settings: Iterable[str] = (),
    nodes: int = 1,
    ranks_per_node: int | None = None,
    name: str | None = None,
    starts_from: StartingPoint | None = None,
) -> RunConfig:
    """File, table and settings -> the resolved run.

    Raises:
        ConfigError: any rule broken; nothing has been written.
    """
    settings = [setting_with_own_name(setting) for setting in settings]
    source = str(config_file)
    from_file = with_own_names(read_yaml(config_file), source=source)
    FullConfig.from_mapping(from_file, source=source)  # refuse the file's own mistakes under the file's name
    config = FullConfig.from_mapping(
        apply_settings(from_file, settings), source=f"{source} with --set" if settings else source
    )
    row = _phase_row(phase, config) if phase else None
    if row:
        config = _lay_phase_under_settings(config, row, settings)
    check_rules(config)
    ranks = ranks_per_node or config.infra.num_gpus
    config.infra.num_gpus = ranks
    config.data.packed_dir = str(Path(config.data.packed_dir).absolute())
    if config.infra.notify_file:
        config.infra.notify_file = str(Path(config.infra.notify_file).expanduser().absolute())
    suites = {metric: str(Path(name).absolute()) for metric, name in config.data.eval_benchmarks.items()}
    config.data.eval_benchmarks = suites
    if config.infra.checkpoint_mirror and "://" not in config.infra.checkpoint_mirror:
        config.infra.checkpoint_mirror = str(Path(config.infra.checkpoint_mirror).absolute())
    config.phases = {}  # laid over the table; those of other phases are none of this run's
    return _with_arithmetic(config, row, nodes, ranks, name, starts_from)


def _phase_row(phase: TrainingPhase, config: FullConfig) -> PhaseConfig:
    overrides = config.phases.get(phase.value)
    given = {key: value for key, value in overrides.model_dump().items() if value is not None} if overrides else {}
    if "gates" in given:
        given["gates"] = tuple(map(GateLevel, given["gates"]))
    if "custom_gates" in given:
        given["custom_gates"] = tuple(ValidationGate(**gate) for gate in given["custom_gates"])
    return replace(PHASE_CONFIGS[phase], **given)


def _lay_phase_under_settings(config: FullConfig, row: PhaseConfig, settings: list[str]) -> FullConfig:
    """The table's numbers replace those of ``training:``, except where --set named a key itself."""
    named = {setting.partition("=")[0].strip() for setting in settings}
    config = config.model_copy(deep=True)
    for key in ("num_train_steps", "eval_steps", "save_steps", "logging_steps"):
        value = getattr(row, key)
        if value is not None and f"training.{key}" not in named:
            setattr(config.training, key, value)
    if "training.total_tokens" not in named:
        config.training.total_tokens = row.num_tokens
    return config


def _with_arithmetic(
    config: FullConfig,
    row: PhaseConfig | None,
    nodes: int,
    ranks: int,
    name: str | None,
    starts_from: StartingPoint | None,
) -> RunConfig:
    training, data = config.training, config.data
    world_size = nodes * ranks
    length = raw_sample_length(
        data.max_encoder_length - config.model.use_mode_tokens, data.max_decoder_length, data.max_seq_length,
        config.model.num_sentinel_tokens, data.ul2_task_weights,
    )  # fmt: skip
    micro = training.per_device_train_batch_size
    global_batch = (
        training.global_batch_size or settled_micro_batch(training) * training.gradient_accumulation_steps * world_size
    )
    divide_global_batch(global_batch, micro, world_size)
    by_tokens = (training.total_tokens or 0) // (global_batch * length)
    if training.total_tokens and not by_tokens:
        raise ConfigError(
            "A phase must hold the tokens of at least one optimizer step",
            found=f"{training.total_tokens} tokens, {global_batch * length} per step",
            remedy="Raise the phase's num_tokens, or lower the global batch or the lengths",
        )
    steps = min(training.num_train_steps, by_tokens or training.num_train_steps)
    row = row and replace(
        row,
        num_tokens=training.total_tokens or steps * global_batch * length,
        num_train_steps=training.num_train_steps,
        eval_steps=training.eval_steps,
        save_steps=training.save_steps,
        logging_steps=training.logging_steps,
    )
    run = RunConfig(
        name="",
        phase=row,
        config=config,
        nodes=nodes,
        ranks_per_node=ranks,
        sample_length=length,
        global_batch_size=global_batch,
        num_train_steps=steps,
        bound_by="tokens" if steps < training.num_train_steps else "steps",
        warmup_steps=min(training.warmup_steps, steps // 10),  # else a short phase never leaves warm-up
        starts_from=starts_from,
    )
    return replace(run, name=name or f"{row.phase if row else 'train'}-{run.identity[:8]}")
