"""export: a checkpoint as a Hugging Face directory."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

from encdec.checkpoints import CheckpointManager, folders
from encdec.checkpoints.commands.shared import (
    checkpoints_of,
    is_checkpoint,
    megabytes,
    print_json,
    progress_bar,
    require_folder,
    size_of,
    writing,
)
from encdec.checkpoints.encoder import EncoderWeights, export_encoder
from encdec.checkpoints.export import bytes_to_write, export, part_of, require_absent
from encdec.checkpoints.manifest import Manifest, verify
from encdec.checkpoints.model_files import find_model_files
from encdec.checkpoints.pruning import best_of
from encdec.errors import CheckpointError, ConfigError


def show(arguments: argparse.Namespace) -> int:
    if arguments.pooling and not arguments.encoder:
        raise ConfigError("--pooling goes with --encoder", found="--pooling alone", remedy="Add --encoder")
    if arguments.encoder and arguments.part != "merged":
        raise ConfigError(
            "--encoder writes the encoder of the merged model",
            found=f"--part {arguments.part}",
            remedy="Leave one of the two out",
        )
    require_absent(arguments.out)
    folder, manifest = find(arguments.path, arguments.best)
    weights = part_of(folder, manifest, arguments.files_from or find_model_files(folder), arguments.part)
    write: Callable[..., list[Path]] = functools.partial(export, part=arguments.part)
    if arguments.encoder:
        weights = EncoderWeights(weights)
        write = functools.partial(export_encoder, pooling=arguments.pooling or "mean")
    total = bytes_to_write(weights, arguments.dtype)
    with progress_bar("exporting", total) as progress, writing(arguments.out):
        files = write(
            folder, manifest, arguments.out, dtype=arguments.dtype, shard_mb=arguments.shard_mb,
            files_from=arguments.files_from, progress=progress,
        )  # fmt: skip
    if arguments.json:
        written = [path.name for path in files]
        print_json(
            {"directory": str(arguments.out), "checkpoint": str(folder), "step": manifest.step, "files": written,
             "dtype": arguments.dtype, "bytes": total}
        )  # fmt: skip
    else:
        what = f"encoder of {folder.name}" if arguments.encoder else folder.name
        print(f"{arguments.out}: {what} in {arguments.dtype}, {megabytes(total)}, {len(files)} weight file(s)")
    return 0


def find(path: Path, best: bool) -> tuple[Path, Manifest]:
    """The checkpoint that is meant, verified: ``path`` itself, or a run's newest valid one, or its best.

    Raises:
        CheckpointError: there is none that verifies.
        ConfigError: --best of what is no run.
    """
    require_folder(path)
    if not is_checkpoint(path):
        manager = checkpoints_of(path)
        return _best(manager) if best else _newest_valid(manager)
    if best:
        raise ConfigError("--best needs a run directory", found=path, remedy="Leave --best out, or give the run")
    return _verified(path)


def _verified(folder: Path) -> tuple[Path, Manifest]:
    with progress_bar("verifying", size_of(folder)) as progress:
        return folder, verify(folder, progress)


def _best(manager: CheckpointManager) -> tuple[Path, Manifest]:
    info = best_of(manager)
    if info is None:
        raise CheckpointError(
            f"The best checkpoint in {manager.output_dir} needs one that was evaluated",
            found="none",
            remedy="Leave --best out: the newest valid one is taken",
        )
    return _verified(manager.output_dir / info.checkpoint_id)


def _newest_valid(manager: CheckpointManager) -> tuple[Path, Manifest]:
    """Nothing is moved away, unlike at the start of a run: this only looks."""
    faults = []
    for step in reversed(folders.committed_steps(manager.output_dir)):
        try:
            return _verified(manager.output_dir / f"step-{step}")
        except CheckpointError as error:
            faults.append(str(error).removesuffix("."))
    raise CheckpointError(
        f"There must be a valid checkpoint in {manager.output_dir}",
        found=faults[0] if faults else "none at all",
        remedy="Look with python -m encdec.checkpoints list RUN",
    )
