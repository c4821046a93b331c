"""The average of the last step checkpoints: a checkpoint of its own, made piece by piece.

    OUT/manifest.json          ``made_of`` names the sources and the digests of their manifests
    OUT/trainer_state.json     the newest source's
    OUT/fsdp2/                 the mean of each parameter; no optimizer state, whose mean means nothing
    OUT/model/                 the run's model configuration and tokenizer, where it has them

Memory: the piece at hand, as one rank wrote it (or a whole tensor, where it is small), in float64 and as read.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from encdec.checkpoints import folders
from encdec.checkpoints.dcp_index import plain_error
from encdec.checkpoints.manifest import (
    STEP_FOLDER,
    TRAINER_STATE,
    Manifest,
    hash_file,
    manifest_digest,
    read_manifest,
    verify,
    verify_names,
    write_manifest,
)
from encdec.checkpoints.model_files import MODEL_FOLDER, find_model_files
from encdec.checkpoints.payload import open_weights
from encdec.checkpoints.weights import PREFIX, Piece, Weights, whole
from encdec.errors import CheckpointError, ConfigError
from encdec.files import staged_directory

WHOLE_BYTES = 16 * 2**20
"""Tensors up to this size are not cut: many small files are slow on shared storage."""
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Source:
    """A verified checkpoint that goes into an average."""

    folder: Path
    manifest: Manifest


def choose_sources(
    root: Path,
    last: int,
    progress: Progress = lambda count: None,
    *,
    among: Callable[[Manifest], bool] = lambda manifest: True,
) -> tuple[list[Source], list[CheckpointError]]:
    """The newest ``last`` step checkpoints under ``root`` that verify, oldest first, and why others were passed over.

    Those count that the schedule of steps asked for: a signal or a person may have asked for more, and a run's average
    must not depend on that. Links (``best``, ``final``) are other names of step checkpoints and never count; nor does
    one of which ``among`` says no.

    Raises:
        CheckpointError: fewer than two verify; the average of one is itself.
    """
    sources: list[Source] = []
    passed_over: list[CheckpointError] = []
    for step in reversed(folders.committed_steps(root)):
        folder = root / f"step-{step}"
        if folder.is_symlink() or len(sources) == last:
            continue
        try:
            manifest = read_manifest(folder)
            if manifest.scheduled and among(manifest):
                sources.append(Source(folder, verify(folder, progress)))
        except CheckpointError as error:
            passed_over.append(error)
    if len(sources) < 2:
        raise CheckpointError(
            f"An average needs two or more valid step checkpoints in {root}",
            found=f"{len(sources)}" + (f" ({passed_over[0].rule} fails)" if passed_over else ""),
            remedy="Keep more of them (training.save_total_limit), or export the one there is",
        )
    return sources[::-1], passed_over


def average(
    sources: Sequence[Source],
    out: Path,
    progress: Progress = lambda count: None,
    *,
    before_commit: Callable[[], None] = lambda: None,
) -> Manifest:
    """Write the arithmetic mean of the sources' weights to ``out``, which is there whole or not at all.

    Args:
        sources: verified checkpoints of one model, oldest first.
        out: the new checkpoint's folder.
        progress: told the bytes that each piece comes to, over all sources.
        before_commit: called last; what it raises leaves nothing.

    Raises:
        CheckpointError: the sources are not of one model.
        ConfigError: ``out`` exists, or has the name of a step checkpoint.
        OSError: it cannot be written.
    """
    require_new(out)
    weights = [open_weights(source.folder, source.manifest) for source in sources]
    _require_one_model(sources, weights)
    newest = sources[-1]
    try:
        with staged_directory(out) as staging:
            write_mean(staging / "fsdp2", weights, progress)
            shutil.copyfile(newest.folder / TRAINER_STATE, staging / TRAINER_STATE)
            files = find_model_files(newest.folder)
            if files:
                shutil.copytree(files, staging / MODEL_FOLDER)
            manifest = _manifest_of(staging, sources)
            write_manifest(staging, manifest)
            verify_names(staging, manifest)
            before_commit()
    except FileExistsError:
        require_new(out)
        raise
    return manifest


def bytes_to_read(sources: Sequence[Source]) -> int:
    """What ``average`` will read of the sources' weights, bytes."""
    return sum(
        tensor.nbytes for source in sources for tensor in open_weights(source.folder, source.manifest).tensors.values()
    )


def require_new(out: Path) -> None:
    if out.is_symlink() or out.exists():
        raise ConfigError("The place of an average must not exist yet", found=out, remedy="Give another one")
    if STEP_FOLDER.fullmatch(out.name):
        raise ConfigError(
            "An average must not be called as a step checkpoint is",
            found=out.name,
            remedy="Call it average-<k>, for example",
        )


def _require_one_model(sources: Sequence[Source], weights: Sequence[Weights]) -> None:
    newest = {name: (tensor.shape, tensor.dtype) for name, tensor in weights[-1].tensors.items()}
    for source, other in zip(sources, weights, strict=True):
        theirs = {name: (tensor.shape, tensor.dtype) for name, tensor in other.tensors.items()}
        if theirs != newest:
            differing = sorted(name for name in {**newest, **theirs} if newest.get(name) != theirs.get(name))
            raise CheckpointError(
                f"Checkpoints that are averaged must be of one model, as {sources[-1].folder.name} is",
                found=f"{source.folder.name}, which differs in {', '.join(differing[:3])}",
                remedy="Average fewer (--last)",
            )


def _manifest_of(staging: Path, sources: Sequence[Source]) -> Manifest:
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in paths:
        path.chmod(0o600)
    return dataclasses.replace(
        sources[-1].manifest,
        world_size=1,
        sharding="fsdp2",
        metrics={},
        versions={"python": platform.python_version(), "torch": torch.__version__},
        time=time.time(),
        files=[hash_file(staging, path) for path in paths],
        made_of={source.folder.name: manifest_digest(source.folder) for source in sources},
    )


def write_mean(folder: Path, weights: Sequence[Weights], progress: Progress) -> None:
    """A DCP payload of the means, in the pieces of the newest source; one file a piece, so that none is kept."""
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, sync_files=True)
    with warnings.catch_warnings(action="ignore"):  # one process is no process group: a choice, not an accident
        try:
            dcp.save({}, storage_writer=writer, planner=_MeanPlanner(weights, progress), no_dist=True)
        except BaseException as error:  # DCP's own exception derives from BaseException
            raise plain_error(error, folder) from None


class _MeanPlanner(dcp.DefaultSavePlanner):
    """Plans one piece after another and computes each only when DCP is about to write it."""

    def __init__(self, weights: Sequence[Weights], progress: Progress) -> None:
        super().__init__()
        self._weights, self._progress = weights, progress
        self._pieces: dict[MetadataIndex, Piece] = {}

    def create_local_plan(self) -> SavePlan:
        newest, items = self._weights[-1], []
        for name, meta in newest.tensors.items():
            pieces = newest.pieces(name) if meta.nbytes > WHOLE_BYTES else [whole(meta)]
            for number, piece in enumerate(pieces):
                index = MetadataIndex(PREFIX + name, piece.offsets, number)
                self._pieces[index] = piece
                chunk = ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=torch.Size(piece.sizes))
                data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=meta.dtype), size=meta.shape)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data={PREFIX + name: (PREFIX + name,) for name in newest.tensors})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name = write_item.index.fqn.removeprefix(PREFIX)
        return mean(self._weights, name, self._pieces[write_item.index], self._progress)


def mean(weights: Sequence[Weights], name: str, piece: Piece, progress: Progress) -> Tensor:
    """Arithmetic mean of one piece, summed in float64; of whole numbers the newest."""
    meta = weights[-1].tensors[name]
    if not meta.dtype.is_floating_point:
        return weights[-1].read(name, piece)
    total = torch.zeros(piece.sizes, dtype=torch.float64)
    for one in weights:
        total += one.read(name, piece)
        progress(piece.elements * meta.element_size())
    return total.div_(len(weights)).to(meta.dtype)
