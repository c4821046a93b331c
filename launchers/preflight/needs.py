"""What a run needs to begin: a sound configuration, text, weights, memory."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import psutil

from encdec.errors import EncdecError
from encdec.estimates import GIGABYTE
from encdec.files import MANIFEST
from encdec.training.model_sizes import model_size
from encdec.training.run_config import RunConfig
from launchers.cluster import require_text
from launchers.planning.feasibility import ESTIMATE_AT_MOST_ABOVE, SAFE_PART
from launchers.planning.footprint import rank_memory
from launchers.preflight import hub
from launchers.preflight.check import Check
from launchers.preflight.storage import damage

MIB = 2**20


def check_configuration(run: RunConfig) -> Check:
    """It is valid, or there would be no resolved run; what it lacks for a long one."""
    training, lacks = run.config.training, []
    if not training.eval_samples or not run.config.data.validation_fraction:
        lacks.append("no evaluation, so no best checkpoint (training.eval_samples)")
    if training.save_steps >= run.num_train_steps and training.save_every != "auto":
        lacks.append("no checkpoint before the last step (training.save_steps, training.save_every)")
    said = f"{run.num_train_steps:,} steps of {run.tokens_per_step:,} tokens on {run.world_size} ranks"
    if lacks:
        return Check("configuration", "warn", f"{said}; {'; '.join(lacks)}", "Set what is named, or live without it")
    return Check("configuration", "ok", said)


def check_text(run: RunConfig) -> Check:
    """Local text is opened; of a hub's, only whether it answers for it."""
    name, kind = run.config.data.dataset_name, "text"
    try:
        is_local = require_text(run)
    except EncdecError as error:
        return Check(kind, "fail", f"{error.rule}, found {error.found}", error.remedy)
    if is_local:
        return Check(kind, "ok", f"{name} has text")
    return _from_hub(kind, "datasets", name, "Pack the text where there is a network: data.packed_dir is shared")


def check_weights(run: RunConfig) -> Check:
    """What the model starts from."""
    model, kind = run.config.model, "weights"
    name = model.model_name_or_path
    if run.starts_from and run.starts_from.kind == "gate":
        return Check(kind, "ok", f"those that pass the gate of {run.starts_from.source}")
    if run.starts_from:
        name = run.starts_from.source
        if (Path(name) / MANIFEST).is_file():
            problem = damage(Path(name))
            remedy = "Give another checkpoint: python -m encdec.checkpoints verify says more"
            return (
                Check(kind, "fail", f"{name}: {problem}", remedy) if problem else Check(kind, "ok", f"{name}, unproved")
            )
    elif model.from_scratch:
        return Check(kind, "ok", "random initial weights")
    if Path(name).is_dir():
        found = [pattern for pattern in ("config.json", "*.safetensors") if any(Path(name).glob(pattern))]
        if len(found) < 2:
            return Check(kind, "fail", f"{name} lacks config.json or *.safetensors", "Give a model's whole folder")
        return Check(kind, "ok", f"{name} is a model's folder")
    if hub.cached(name):
        return Check(kind, "ok", f"{name} is in this user's cache")
    return _from_hub(kind, "models", name, f"Fetch it once where there is a network: hf download {name}")


def _from_hub(check: str, kind: str, name: str, remedy: str) -> Check:
    answer = hub.ask(kind, name)
    if answer.there:
        return Check(check, "ok", f"the hub has {name}")
    if answer.reached:
        return Check(
            check, "fail", f"the hub does not give {name}: {answer.words}", "Check its name, and hf auth login"
        )
    return Check(check, "warn", f"{name} is on a hub that does not answer from here: {answer.words}", remedy)


def check_memory(run: RunConfig, device_gb: float | None) -> Check:
    """The estimate against one GPU, or against this machine where ranks compute on its processors."""
    size = model_size(run.config.model)
    if size is None:
        return Check(
            "memory", "warn", f"the sizes of {run.config.model.model_name_or_path} are not known here",
            "Watch memory_gb in the first steps",
        )  # fmt: skip
    estimate = rank_memory(run, size)["total_gb"]
    micro, _ = run.micro_batches(run.world_size)
    auto = run.config.training.per_device_train_batch_size == "auto"
    batch = "1 sample (auto finds the most that fit)" if auto else f"{micro} sample{'s' * (micro != 1)}"
    said = f"about {estimate:,.1f} GB a rank with a micro-batch of {batch}"
    if device_gb is None:
        return Check("memory", "warn", f"{said}; a GPU's memory is not known here", "Give --gpu-memory-gb")
    said = f"{said}, of {device_gb:,.1f} GB"
    remedy = (
        "Lower training.per_device_train_batch_size or the lengths, keep infra.fsdp_activation_checkpointing on, "
        "or take more ranks"
    )
    if estimate > ESTIMATE_AT_MOST_ABOVE * device_gb:
        return Check("memory", "fail", said, remedy)
    return Check("memory", "warn", said, remedy) if estimate > SAFE_PART * device_gb else Check("memory", "ok", said)


def device_memory_gb(run: RunConfig) -> float | None:
    """GB of a rank's device by what this machine is: its smallest GPU, or a rank's share of its memory; None where
    that is not known.
    """
    if run.config.infra.device == "cpu":
        return psutil.virtual_memory().total / run.ranks_per_node / GIGABYTE if run.nodes == 1 else None
    try:
        return min(int(line) for line in ask_gpus("memory.total")) * MIB / GIGABYTE
    except ValueError:  # no line, or no number
        return None


def device_name(run: RunConfig) -> str:
    """What this machine's GPUs are called: "NVIDIA H100 80GB HBM3"; empty where that is not known, or they differ."""
    names = set(ask_gpus("name")) if run.config.infra.device == "cuda" else set()
    return names.pop() if len(names) == 1 else ""


def ask_gpus(what: str) -> list[str]:
    """A property of each of this machine's GPUs, by nvidia-smi; none where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    words = [program, f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
