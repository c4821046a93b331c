"""Commits, finds, loads and prunes checkpoints.

A save goes to ``step-<k>.tmp-<attempt>``; every rank syncs and hashes its own files; rank 0 writes the manifest,
renames the folder and syncs the parent. A kill at any point leaves the previous checkpoint as the newest valid one.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from blake3 import blake3
from torch import nn
from torch.optim import Optimizer

from encdec import distributed, files
from encdec.checkpoints import folders, fsdp2
from encdec.checkpoints.manifest import (
    FileRecord,
    Manifest,
    hash_file,
    read_manifest,
    reading,
    verify,
    verify_files,
    verify_names,
    write_manifest,
)
from encdec.errors import CheckpointError, UnreadableCheckpoint

TRAINER_STATE = "trainer_state.json"
PAYLOAD = "fsdp2"


class Stateful(Protocol):
    """Anything with state as plain JSON values: the learning-rate schedule."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class CheckpointInfo:
    """One committed checkpoint as its manifest describes it (files not yet verified)."""

    checkpoint_id: str
    step: int
    metrics: dict[str, float]
    bytes: int
    time: float


class CheckpointManager:
    """Checkpoints of one run. ``save`` and the ``load`` family are collective: every rank calls them.

    Args:
        output_dir: folder that holds the ``step-<k>`` folders.
        save_total_limit: checkpoints kept; the best and the newest are never deleted.
        best_metric: name of the metric that makes a checkpoint the best one.
        best_metric_mode: whether less or more of it is better.
        attempt: number of the attempt that writes; part of the temporary folder's name.
        run_identity: digest of the configuration, recorded in the manifest.
        fence: called on rank 0 just before a commit; raises if this attempt may no longer write.
    """

    def __init__(
        self,
        output_dir: str | Path,
        save_total_limit: int = 3,
        best_metric: str = "loss",
        best_metric_mode: Literal["min", "max"] = "min",
        *,
        attempt: int = 0,
        run_identity: str = "",
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.save_total_limit = save_total_limit
        self.best_metric, self.best_metric_mode = best_metric, best_metric_mode
        self.attempt, self.run_identity, self.fence = attempt, run_identity, fence
        self.rejected: list[str] = []

    # ---- save

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: Stateful,
        step: int,
        metrics: dict[str, float] | None = None,
        *,
        extra_state: dict[str, Any] | None = None,
    ) -> str:
        """Write and commit one checkpoint; returns its id, ``step-<k>``.

        Args:
            extra_state: plain JSON values to have back at load: data position, seed, losses.

        Raises:
            OSError: a rank could not write (the previous checkpoint is untouched).
            FencedError: a newer attempt exists.
        """
        final = self.output_dir / f"step-{step}"
        temporary = self.output_dir / f"step-{step}.tmp-{self.attempt}"
        state = {"step": step, "scheduler": scheduler.state_dict(), **(extra_state or {})}
        distributed.on_rank_zero(lambda: folders.make_empty(temporary, PAYLOAD))
        fsdp2.save_payload(temporary / PAYLOAD, fsdp2.training_tensors(model, optimizer))
        parts = distributed.together(lambda: self._own_records(temporary, state))
        manifest = Manifest(
            step=step,
            samples_consumed=int(state.get("samples_consumed", 0)),
            world_size=distributed.world_size(),
            sharding=PAYLOAD,
            attempt=self.attempt,
            run_identity=self.run_identity,
            metrics={name: value for name, value in (metrics or {}).items() if math.isfinite(value)},
            versions={"python": platform.python_version(), "torch": torch.__version__},
            time=time.time(),
            files=sorted((record for part in parts for record in part), key=lambda record: record.path),
        )
        distributed.on_rank_zero(lambda: self._commit(temporary, final, manifest))
        return final.name

    def _own_records(self, temporary: Path, state: dict[str, Any]) -> list[FileRecord]:
        """Sync and hash the files this rank wrote (rank 0 also those that belong to nobody)."""
        rank, payload = distributed.rank(), temporary / PAYLOAD
        paths = sorted(payload.glob(f"__{rank}_*.distcp"))
        if rank == 0:
            files.atomic_write_json(temporary / TRAINER_STATE, state)
            paths += [payload / ".metadata", temporary / TRAINER_STATE]
        for path in paths:
            path.chmod(0o600)
            files.fsync_file(path)
        files.fsync_directory(payload)
        return [hash_file(temporary, path) for path in paths]

    def _commit(self, temporary: Path, final: Path, manifest: Manifest) -> None:
        write_manifest(temporary, manifest)
        verify_names(temporary, manifest)
        self.fence()
        # the same step again: with metrics that were still owed, or after a resume from further back
        replaced = folders.set_aside(final, "replaced") if final.exists() else None
        os.rename(temporary, final)
        files.fsync_directory(self.output_dir)
        if replaced:
            folders.delete(replaced)
        self._prune()

    def _prune(self) -> None:
        """Delete the oldest beyond the limit; never the newest, never the best."""
        infos = self.list_checkpoints()
        best = self._best(infos)
        spare = [info for info in infos[:-1] if best is None or info.checkpoint_id != best.checkpoint_id]
        for info in spare[: max(0, len(infos) - self.save_total_limit)]:
            folders.delete(folders.set_aside(self.output_dir / info.checkpoint_id, "deleted"))

    # ---- find

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """Committed checkpoints with a sound manifest, by step."""
        infos = []
        for step in folders.committed_steps(self.output_dir):
            folder = self.output_dir / f"step-{step}"
            try:
                manifest = read_manifest(folder)
            except CheckpointError:
                continue
            size = sum(record.bytes for record in manifest.files)
            infos.append(CheckpointInfo(folder.name, manifest.step, manifest.metrics, size, manifest.time))
        return infos

    def validate(self, checkpoint_id: str) -> None:
        """Verify one checkpoint in this process.

        Raises:
            CheckpointError: naming what is wrong.
        """
        verify(self.output_dir / checkpoint_id)

    def newest_valid(self) -> Path | None:
        """Folder of the newest checkpoint that verifies, or None; collective, the ranks share the hashing.

        Newer ones that are proven wrong are moved to ``quarantine/`` with their reason; those that cannot be read are
        left where they are. ``rejected`` names them all.

        Raises:
            CheckpointError: none is valid, but one could not be read or moved: the run must not start over in silence.
        """
        left: list[str] = []
        for step in reversed(distributed.on_rank_zero(lambda: folders.committed_steps(self.output_dir))):
            folder = self.output_dir / f"step-{step}"
            try:
                self._verify_together(folder)
                return folder
            except CheckpointError as error:
                if self._moved_away(folder, error):
                    self.rejected.append(f"moved to quarantine: {error}")
                else:
                    self.rejected.append(f"left where it is: {error}")
                    left.append(str(error))
        if left:
            raise CheckpointError(
                "A run must be able to examine its checkpoints before it starts over from its initial weights",
                found=f"{len(left)} left where they are and no other valid: {left[0].removesuffix('.')}",
                remedy="Mend that and give the same command again; to start over all the same, move them away",
            )
        return None

    @staticmethod
    def _moved_away(folder: Path, error: CheckpointError) -> bool:
        """Quarantine what is proven wrong. What could not be read stays: it may well be sound."""
        if isinstance(error, UnreadableCheckpoint):
            return False
        return distributed.on_rank_zero(lambda: folders.quarantine(folder, error))

    def _verify_together(self, folder: Path) -> Manifest:
        def own_share() -> Manifest:
            manifest = read_manifest(folder)
            if distributed.rank() == 0:
                verify_names(folder, manifest)
            verify_files(folder, manifest.files[distributed.rank() :: distributed.world_size()])
            return manifest

        return distributed.together(own_share)[0]

    def discard_unfinished(self) -> None:
        """Delete what killed saves left behind. Rank 0 only, at the start of an attempt."""
        folders.discard_unfinished(self.output_dir)

    # ---- load

    def load(self, folder: Path, model: nn.Module, optimizer: Optimizer, scheduler: Stateful) -> dict[str, Any]:
        """Verify and load one checkpoint at any world size; returns its trainer state.

        Raises:
            CheckpointError: it does not verify, or it is of another model.
        """
        self._verify_together(folder)
        return self._load_verified(folder, model, optimizer, scheduler)

    def _load_verified(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, scheduler: Stateful
    ) -> dict[str, Any]:
        state = distributed.on_rank_zero(lambda: read_trainer_state(folder))
        fsdp2.load_payload(folder / PAYLOAD, model, optimizer)
        with reading(folder / TRAINER_STATE, "the state of this schedule"):
            scheduler.load_state_dict(state["scheduler"])
        return state

    def load_latest(
        self, model: nn.Module, optimizer: Optimizer, scheduler: Stateful
    ) -> tuple[int, int, dict[str, Any]] | None:
        """Load the newest valid checkpoint: (step, epoch, trainer state), or None where there is none."""
        folder = self.newest_valid()
        if folder is None:
            return None
        state = self._load_verified(folder, model, optimizer, scheduler)
        return state["step"], state.get("epoch", 0), state

    def load_best(
        self, model: nn.Module, optimizer: Optimizer, scheduler: Stateful
    ) -> tuple[int, int, dict[str, Any]] | None:
        """Load the checkpoint with the best metric: (step, epoch, trainer state), or None where none has the metric."""
        best = distributed.on_rank_zero(lambda: self._best(self.list_checkpoints()))
        if best is None:
            return None
        state = self.load(self.output_dir / best.checkpoint_id, model, optimizer, scheduler)
        return state["step"], state.get("epoch", 0), state

    def _best(self, infos: list[CheckpointInfo]) -> CheckpointInfo | None:
        measured = [info for info in infos if self.best_metric in info.metrics]
        choose = min if self.best_metric_mode == "min" else max
        return choose(measured, key=lambda info: info.metrics[self.best_metric], default=None)

    def print_summary(self) -> None:
        """One line a checkpoint: id, size, metrics, which is best."""
        infos = self.list_checkpoints()
        best = self._best(infos)
        for info in infos:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in sorted(info.metrics.items()))
            mark = "  best" if best and info.checkpoint_id == best.checkpoint_id else ""
            print(f"{info.checkpoint_id:<14} {info.bytes / 1e6:>10.1f} MB  {metrics}{mark}")
        if not infos:
            print(f"no checkpoints in {self.output_dir}")


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The plain values of a verified checkpoint.

    Raises:
        CheckpointError: not JSON, or without a step and a scheduler.
    """
    with reading(folder / TRAINER_STATE, "step and scheduler"):
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        return {**state, "step": int(state["step"]), "scheduler": dict(state["scheduler"])}


def logical_digest(folder: Path) -> str:
    """64 hex digits of what a checkpoint means: model, optimizer, scheduler, data position, seed and step.

    The same for any sharding and world size. The checkpoint is verified first.

    Raises:
        CheckpointError: it does not verify.
    """
    verify(folder)
    state = read_trainer_state(folder)
    hasher = blake3()
    fsdp2.digest_payload(folder / PAYLOAD, hasher)
    logical = {key: state.get(key) for key in ("scheduler", "samples_consumed", "seed", "step")}
    hasher.update(json.dumps(logical, sort_keys=True).encode())
    return hasher.hexdigest()
