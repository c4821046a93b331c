"""What a phase begins with: the weights that passed the gate before it, or what a person gave."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from blake3 import blake3
from torch import nn

from encdec import distributed
from encdec.checkpoints.catalog import committed
from encdec.checkpoints.manifest import MANIFEST, manifest_digest, read_manifest, verify
from encdec.checkpoints.payload import open_weights
from encdec.checkpoints.stored import feed_tensor, require_same_model
from encdec.checkpoints.weights import Weights, box, digest_weights
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import CheckpointError, ConfigError, MissingPrerequisite, RunDirectoryError, UnreadableCheckpoint
from encdec.files import RunPaths, atomic_write_json
from encdec.initialization.saved import SavedWeights
from encdec.initialization.source import FILES, SourceFiles, checkpoint_directory, model_type_of
from encdec.initialization.streams import Stream
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


class Opening:
    """The weights that a run begins from instead of its configured ones; verified when this is made, read by
    ``stream``, and written down by ``record``. Making and recording is collective.

    Raises:
        GateNotPassed: the phase before has not passed its gate.
        CheckpointError: they do not verify, or are not those that were named.
    """

    def __init__(self, run: RunConfig, paths: RunPaths) -> None:
        start = run.starts_from
        assert start is not None and run.phase is not None, (
            "only a phase starts from other weights than its configured ones"
        )
        self.start, self.phase, self._paths = start, run.phase.phase, paths
        self.gate = require_passed(start, self.phase) if start.kind == "gate" else None
        given = Path(start.source)
        self.source = given / "checkpoints" / str(self.gate.checkpoint) if self.gate else given
        self._is_checkpoint = self.gate is not None or (self.source / MANIFEST).is_file()
        if self._is_checkpoint:
            distributed.on_rank_zero_however_long(lambda: require_sound(self.source, self.gate, start))
        self._found = ""

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint from which training is to continue once the model is sharded; None: it begins at step 0."""
        return self.source if self.start.kind == "checkpoint" else None

    def stream(self, model: nn.Module) -> Stream:
        """The values of a model's parameters and persistent buffers, in order of name; rank 0 takes their digest.

        Raises:
            CheckpointError: they are of another model.
            ConfigError: what was given is no model of this architecture.
        """
        return self._values(self._weights(model))

    def _values(self, weights: Weights) -> Stream:
        hasher = blake3()
        for name in sorted(weights.tensors):
            if distributed.rank():
                yield name, functools.partial(weights.read, name)
                continue
            values = weights.read(name)
            if not self._is_checkpoint:
                values = values.float()  # as training holds them
            feed_tensor(hasher, name, values)
            yield name, functools.partial(box, values)
        self._found = hasher.hexdigest()

    def record(self) -> None:
        """Write down what the run has begun from, once the stream is read to its end.

        Raises:
            RunDirectoryError: it is not what passed the gate.
        """
        distributed.on_rank_zero(self._write)
        log.info(
            "%s from %s, weights %s",
            "begins" if self.gate else "begins, without proof,", self.source, self._found[:16],
        )  # fmt: skip

    def _write(self) -> None:
        gate, found = self.gate, self._found
        if gate and found != gate.weights_digest:
            raise RunDirectoryError(
                f"{self.phase} starts from the weights that were judged",
                found=f"weights {found[:16]} in {self.source}, while the gate was passed by "
                f"{str(gate.weights_digest)[:16]}",
                remedy=again(gate, self.start),
            )
        origin = Origin(
            kind=self.start.kind, source=str(self.source) if gate else self.start.source, proved=gate is not None,
            weights_digest=found, first_loss=gate.first_loss if gate else None,
        )  # fmt: skip
        atomic_write_json(self._paths.origin, origin.to_json())

    def _weights(self, model: nn.Module) -> Weights:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if not self._is_checkpoint:
            return given_model(self.start.source, shapes)
        manifest = read_manifest(self.source)
        weights = open_weights(self.source, manifest)
        stored = {name: tensor.shape for name, tensor in weights.tensors.items()}
        require_same_model(self.source / manifest.sharding, stored, shapes, REMEDY)
        return weights


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


def given_model(name_or_path: str, shapes: Mapping[str, torch.Size]) -> Weights:
    """The weights of a Hugging Face directory or hub id of our architecture.

    Args:
        shapes: of the parameters that they are for, by name.

    Raises:
        ConfigError: there is none.
        CheckpointError: it is of another model.
    """
    try:
        directory = checkpoint_directory(name_or_path, FILES)
        model_type = model_type_of(directory)
        if model_type != Qwen3EncoderDecoderConfig.model_type:
            raise _not_given(name_or_path, f"model_type {model_type}")
        source = SourceFiles(directory)
    except MissingPrerequisite as error:
        raise _not_given(name_or_path, error.found) from None
    there = {name: tensor.shape for name, tensor in source.tensors.items()}
    require_same_model(Path(name_or_path, "weights"), there, shapes, REMEDY)
    return SavedWeights(source, shapes)


def _not_given(name_or_path: str, found: object) -> ConfigError:
    return ConfigError(
        "--from-weights must name a checkpoint, or a model directory or hub id of this architecture",
        found=f"{name_or_path} ({' '.join(str(found).split())[:200]})",
        remedy="A decoder-only Qwen3 goes into model.model_name_or_path instead",
    )
