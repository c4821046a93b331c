"""What a phase begins with: the weights that passed the gate before it, or what a person gave."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import SafetensorError
from torch import nn

from encdec import distributed
from encdec.checkpoints.catalog import committed
from encdec.checkpoints.manifest import MANIFEST, manifest_digest, read_manifest, verify
from encdec.checkpoints.payload import open_weights
from encdec.checkpoints.stored import feed_tensor, require_same_model
from encdec.checkpoints.weights import digest_weights
from encdec.errors import CheckpointError, ConfigError, RunDirectoryError, UnreadableCheckpoint
from encdec.files import RunPaths, atomic_write_json
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.execution import StartingPoint
from encdec.training.promotion import GateFile, Origin, gate_path, read_origin, require_passed
from encdec.training.run_config import RunConfig

log = logging.getLogger("encdec.train")
REMEDY = "Give weights of the model that the configuration describes"


def has_checkpoint(paths: RunPaths) -> bool:
    """Whether a checkpoint of the run itself lies there to go on from; the same on all ranks."""
    return distributed.on_rank_zero(lambda: bool(committed(paths.checkpoints)))


def require_origin(run: RunConfig, paths: RunPaths) -> None:
    """A run that goes on says which weights it has begun from; the same on all ranks.

    Raises:
        RunDirectoryError: it does not any more.
    """
    if run.starts_from and distributed.on_rank_zero(lambda: read_origin(paths)) is None:
        raise RunDirectoryError(
            "A run that has begun from other weights than its configured ones says which",
            found=f"no {paths.origin}",
            remedy="Restore the file from a copy, or begin the phase anew in another directory",
        )


def require_weights(run: RunConfig, *, goes_on: bool, step: int) -> None:
    """The weights that a run starts from are read only where it has no checkpoint to go on from.

    Args:
        goes_on: whether it has.
        step: at which it goes on.

    Raises:
        CheckpointError: it had some, and none of them could be used.
    """
    if run.starts_from and goes_on and not step:
        raise CheckpointError(
            "A run that starts from given weights reads them before it shards the model",
            found="only checkpoints that cannot be used",
            remedy="Nothing to do where they were moved to quarantine: the next start reads the given weights again",
        )


def begin_from(run: RunConfig, paths: RunPaths, model: nn.Module) -> Path | None:
    """Fill an unsharded model with the weights that the run begins from, on every rank, and write down which they are.

    Returns:
        The checkpoint from which training is to continue once the model is sharded; None where it begins at step 0.

    Raises:
        GateNotPassed: the phase before has not passed its gate.
        CheckpointError: they do not verify, are not those that were judged, or are of another model.
    """
    start = run.starts_from
    assert start is not None and run.phase is not None, (
        "only a phase starts from other weights than its configured ones"
    )
    gate = require_passed(start, run.phase.phase) if start.kind == "gate" else None
    source = Path(start.source) / "checkpoints" / str(gate.checkpoint) if gate else Path(start.source)
    if gate or (source / MANIFEST).is_file():
        distributed.on_rank_zero_however_long(lambda: require_sound(source, gate, start))
        found = fill_from_checkpoint(model, source)
    else:
        found = fill_from_pretrained(model, start.source)
    if gate and found != gate.weights_digest:
        raise RunDirectoryError(
            f"{run.phase.phase} starts from the weights that were judged",
            found=f"weights {found[:16]} in {source}, while the gate was passed by {str(gate.weights_digest)[:16]}",
            remedy=again(gate, start),
        )
    origin = Origin(
        kind=start.kind, source=str(source) if gate else start.source, proved=gate is not None, weights_digest=found,
        first_loss=gate.first_loss if gate else None,
    )  # fmt: skip
    distributed.on_rank_zero(lambda: atomic_write_json(paths.origin, origin.to_json()))
    log.info(
        "%s from %s, weights %s", "begins" if origin.proved else "begins, without proof,", origin.source, found[:16]
    )
    return source if start.kind == "checkpoint" else None


def require_sound(source: Path, gate: GateFile | None, start: StartingPoint) -> None:
    """The checkpoint must verify, and be the one that a person has named.

    Raises:
        RunDirectoryError: it does not, and a gate was passed by it.
        CheckpointError: it does not, or is not.
    """
    try:
        verify(source)
    except UnreadableCheckpoint:
        raise
    except CheckpointError as error:
        if gate is None:
            raise
        raise RunDirectoryError(
            f"The weights that passed the gate of {gate.phase} must be there",
            found=f"{error.rule}: {error.found}",
            remedy=again(gate, start),
        ) from None
    if gate is None and start != StartingPoint.at_checkpoint(start.kind, source, manifest_digest(source)):
        raise CheckpointError(
            "A run begins from the checkpoint that was named when it was submitted",
            found=f"another one in {source} now",
            remedy="Restore it; or give the submit command again, with another --name if it gave one",
        )


def again(gate: GateFile, start: StartingPoint) -> str:
    """What to do about weights that are not those that were judged."""
    file = gate_path(RunPaths(Path(start.source)), gate.phase)
    return (
        f"Restore the checkpoint; or delete {file} and give the submit command again: {gate.phase} then goes on from "
        "its newest valid checkpoint and is judged anew"
    )


@torch.no_grad()
def fill_from_checkpoint(model: nn.Module, folder: Path) -> str:
    """Copy the weights of a verified checkpoint of either engine into a model on the host; returns their digest.

    Raises:
        CheckpointError: they are of another model.
    """
    manifest = read_manifest(folder)
    weights, wanted = open_weights(folder, manifest), model.state_dict()
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    require_same_model(
        folder / manifest.sharding, shapes, {name: tensor.shape for name, tensor in wanted.items()}, REMEDY
    )
    return digest_weights(weights, lambda name, tensor: wanted[name].copy_(tensor))


@torch.no_grad()
def fill_from_pretrained(model: nn.Module, name_or_path: str) -> str:
    """Copy the weights of a Hugging Face directory or hub id of our architecture into a model on the host; returns the
    digest of what the model then holds.

    Raises:
        ConfigError: there is none, or it is of another model.
    """
    try:
        given = Qwen3ForSeq2SeqLM.from_pretrained(name_or_path, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            "--from-weights must name a checkpoint, or a model directory or hub id of this architecture",
            found=f"{name_or_path} ({' '.join(str(error).split())[:200]})",
            remedy="A decoder-only Qwen3 goes into model.model_name_or_path instead",
        ) from None
    there, wanted = given.state_dict(), model.state_dict()
    require_same_model(
        Path(name_or_path, "weights"), {name: tensor.shape for name, tensor in there.items()},
        {name: tensor.shape for name, tensor in wanted.items()}, REMEDY,
    )  # fmt: skip
    hasher = blake3()
    for name in sorted(wanted):
        wanted[name].copy_(there[name])
        feed_tensor(hasher, name, wanted[name])
    return hasher.hexdigest()
