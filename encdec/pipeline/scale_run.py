"""One scale's run, from its configuration to a plain model: trained in this process or by whoever launches it."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers.initialization import no_init_weights

from encdec.adapters import add_adapters
from encdec.checkpoints import folders
from encdec.checkpoints.manifest import verify
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import CheckpointError, ConfigError, ExitCode
from encdec.files import RunPaths
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.pipeline.config import Launch
from encdec.pipeline.facts import newest_attempt_says
from encdec.pipeline.scales import ScaleConfig
from encdec.training.attention_choice import attention_by_rule
from encdec.training.config import FullConfig
from encdec.training.execution import LoopGates
from encdec.training.origin import fill_from_checkpoint
from encdec.training.rank import ModelMaker, run_rank
from encdec.training.run_config import make_run_directory, require_same_run, resolve_run
from encdec.training.signals import STOP_SIGNALS

log = logging.getLogger("encdec.pipeline")
ModelFactory = Callable[[ScaleConfig, Any], nn.Module]
"""(the scale's sizes, tokenizer) -> the model, fp32 on the host: a transformers model that is called as
``Qwen3ForSeq2SeqLM`` is, with ``transformer_layers()``, the units of sharding."""
CAUSES: Mapping[int, str] = {
    ExitCode.COMPLETE: "complete", ExitCode.GATE_NOT_PASSED: "gate", ExitCode.CONTINUE_ME: "stop_requested",
    ExitCode.CONFIG_WRONG: "refused",
}  # fmt: skip
"""What the exit code of a launched run means; any other is a crash."""


@dataclass(frozen=True)
class Ending:
    """How training ended."""

    cause: str
    """complete | gate | signalled | stop_requested | refused | crash"""
    message: str


def train_here(config_file: Path, paths: RunPaths, make_model: ModelMaker | None, gates: LoopGates) -> Ending:
    """Train in this process, alone; a run directory of the same configuration is continued.

    Raises:
        EncdecError: what a user can mend.
    """
    run = resolve_run(None, config_file=config_file, ranks_per_node=1)
    if paths.run_yaml.exists():
        require_same_run(paths, run)
    make_run_directory(paths, run)
    try:
        with _kept_signal_handlers():
            outcome = run_rank(run, paths, make_model=make_model, gates=gates)
    finally:
        if dist.is_initialized():  # a rank that fails early leaves it to the end of its process; this one goes on
            dist.destroy_process_group()
    return Ending(outcome["cause"], outcome["message"])


@contextlib.contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """A rank listens for signals until its process ends; this process goes on."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_elsewhere(launch: Launch, config_file: Path, paths: RunPaths) -> Ending:
    """Have the run launched, and wait for its end."""
    code = launch(config_file, paths.root)
    said = newest_attempt_says(paths) or f"the launched run ended with exit code {code}"
    return Ending(CAUSES.get(code, "crash"), said)


def launch_with_torchrun(config_file: Path, run_dir: Path) -> int:
    """A ``Launch`` on this machine: as many ranks as ``infra.num_gpus`` says, started by torchrun."""
    ranks = FullConfig.from_yaml(config_file).infra.num_gpus
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "encdec.train", "--config", str(config_file), "--output_dir", str(run_dir), "--auto-resume",
    ]  # fmt: skip
    return subprocess.run(command, check=False).returncode


def model_maker(factory: ModelFactory | None, sizes: ScaleConfig) -> ModelMaker | None:
    """What builds the model of a run: the factory where there is one; None: the run itself.

    Raises (when called):
        ConfigError: the factory's model lacks what a run needs of it.
    """
    if factory is None:
        return None

    def make(config: FullConfig, tokenizer: Any) -> nn.Module:
        model = factory(sizes, tokenizer)
        lacking = [name for name in ("transformer_layers", "config", "generation_config") if not hasattr(model, name)]
        if lacking:
            raise ConfigError(
                "A model factory must return a transformers model with transformer_layers(), the units of sharding",
                found=f"{type(model).__name__} without {', '.join(lacking)}",
                remedy="Give it those; encdec.modeling_qwen3_encdec.Qwen3ForSeq2SeqLM shows it",
            )
        return model

    return make


@dataclass(frozen=True)
class TrainedModel:
    """A plain model with the weights of a checkpoint."""

    model: nn.Module
    checkpoint: str
    step: int


def load_trained(paths: RunPaths, config: FullConfig, tokenizer: Any, factory_made: ModelMaker | None) -> TrainedModel:
    """The newest valid checkpoint of a run as a plain fp32 model on the host; nothing is moved or deleted.

    Args:
        factory_made: builds the model that the weights go into; None: the one that the run directory describes.

    Raises:
        CheckpointError: there is none that verifies, or it is of another model.
    """
    faults = []
    for step in reversed(folders.committed_steps(paths.checkpoints)):
        folder = paths.checkpoints / f"step-{step}"
        try:
            verify(folder)
        except CheckpointError as error:
            faults.append(str(error))
            log.warning("passed over: %s", error)
            continue
        model = factory_made(config, tokenizer) if factory_made else empty_model(paths, config)
        fill_from_checkpoint(model, folder)
        return TrainedModel(model, folder.name, step)
    raise CheckpointError(
        f"There must be a valid checkpoint in {paths.checkpoints}",
        found=faults[0] if faults else "none at all",
        remedy="Give the same call again: the run goes on, or begins anew",
    )


def empty_model(paths: RunPaths, config: FullConfig) -> Qwen3ForSeq2SeqLM:
    """The model that a run directory describes, its parameters without values."""
    with no_init_weights():
        model = Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig.from_pretrained(paths.model))
    if config.model.lora is not None:
        add_adapters(model, config.model.lora, config.training.seed)
    model.set_attn_implementation(attention_by_rule(config))
    return model
