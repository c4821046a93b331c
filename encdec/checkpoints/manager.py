"""Commits, finds, loads and prunes checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn
from torch.optim import Optimizer

from encdec import distributed
from encdec.checkpoints import catalog, folders, space
from encdec.checkpoints.catalog import CheckpointInfo
from encdec.checkpoints.commit import Committer, Draft
from encdec.checkpoints.flight import Flight, Saved
from encdec.checkpoints.manifest import (
    TRAINER_STATE,
    Manifest,
    read_manifest,
    reading,
    verify,
    verify_files,
    verify_names,
)
from encdec.checkpoints.meaning import read_trainer_state
from encdec.checkpoints.payload import DEFAULT, Payload, payload_named
from encdec.checkpoints.retention import Retention
from encdec.distributed import Group
from encdec.errors import CheckpointError, ForeignCheckpoint, UnreadableCheckpoint

BYTES_PER_PARAMETER = 12
"""fp32 weight and AdamW's two moments."""


class Stateful(Protocol):
    """Anything with state as plain JSON values: the learning-rate schedule."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CheckpointManager:
    """Checkpoints of one run. ``save`` and the ``load`` family are collective: every rank calls them.

    Args:
        output_dir: folder that holds the ``step-<k>`` folders.
        save_total_limit: checkpoints kept; the best and the newest are never deleted, nor those to be averaged.
        best_metric: name of the metric that makes a checkpoint the best one.
        best_metric_mode: whether less or more of it is better.
        averaged: how many of the last scheduled checkpoints will be averaged at the end, or may be gone back to.
        averaged_from: first step that can be among them; 0 where the end is not known.
        payload: reads and writes what the engine trains; FSDP2's unless given.
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
        averaged: int = 0,
        averaged_from: int = 0,
        payload: Payload | None = None,
        attempt: int = 0,
        run_identity: str = "",
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.retention = Retention(limit=save_total_limit, averaged=averaged, averaged_from=averaged_from)
        self.best_metric, self.best_metric_mode = best_metric, best_metric_mode
        self.payload = payload or payload_named(DEFAULT)
        self.fence = fence
        self.rejected: list[str] = []
        self.withdrawn: Callable[[int, int], bool] = lambda step, samples_consumed: False
        """Whether the run has gone back to before the checkpoint of that step and data position: nobody may use it."""
        self._committer = Committer(root=self.output_dir, attempt=attempt, run_identity=run_identity, fence=fence)
        self._flight: Flight | None = None
        self._background: Group = None
        self._background_made = False

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
        scheduled: bool = True,
        blocking: bool = True,
    ) -> str:
        """Write and commit one checkpoint; returns its id, ``step-<k>``.

        Args:
            extra_state: plain JSON values to have back at load: data position, seed, losses.
            scheduled: whether the schedule of steps asks for it (and not a person, a signal or the clock).
            blocking: False: return once the state is copied; a thread commits it while training goes on, and ``wait``
                tells of it. One that is still being written is waited for first.

        Raises:
            OSError: a rank could not write (the previous checkpoint is untouched); now, or before in the background.
            FencedError: a newer attempt exists.
        """
        self.wait()
        group = None if blocking else self._background_group()
        began = time.perf_counter()
        state = {"step": step, "scheduler": scheduler.state_dict(), **(extra_state or {})}
        draft = Draft(
            step=step,
            samples_consumed=int(state.get("samples_consumed", 0)),
            state=json.dumps(state, indent=2) + "\n",
            metrics=metrics or {},
            scheduled=scheduled,
            sharding=self.payload.name,
            snapshot=self.payload.snapshot(model, optimizer),
        )
        if blocking:
            self._committer.commit(draft)
            self._tidy(step, None)
        else:
            self._flight = Flight(
                step, began, lambda: self._committer.commit(draft, group), lambda: self._tidy(step, group)
            )
        return f"step-{step}"

    def _background_group(self) -> Group:
        """The group of the threads that commit; made once."""
        if not self._background_made:
            self._background, self._background_made = distributed.background_group(), True
        return self._background

    def _tidy(self, step: int, group: Group) -> None:
        distributed.on_rank_zero(lambda: self._after_commit(step), group)

    def _after_commit(self, step: int) -> None:
        """On rank 0, in whichever thread made ``step-<step>`` a checkpoint."""
        self._prune(step)

    def close(self, *, hurried: bool = False) -> None:
        """The last call when training ends without an error, on every rank: waits for what goes on in the background.

        Args:
            hurried: somebody will end this process soon.
        """
        self.wait()

    def _prune(self, committed_step: int) -> None:
        infos = self.own_checkpoints()
        for info in self.retention.spare(infos, self._best(infos), committed_step):
            folders.retire(self.output_dir / info.checkpoint_id)

    @property
    def flying(self) -> Flight | None:
        """The save in the background that nobody has waited for yet."""
        return self._flight

    def wait(self, timeout: float | None = None) -> Saved | None:
        """Wait for the save in the background; what it came to, or None where there was none.

        Raises:
            OSError, EncdecError: it failed, on every rank; the previous checkpoint is untouched.
            TimeoutError: it is not done after ``timeout`` seconds.
        """
        flight = self._flight
        if flight is None:
            return None
        try:
            return flight.wait(timeout)
        finally:
            if not flight.writing:
                self._flight = None

    def require_room(self, model: nn.Module) -> None:
        """Rank 0 only, before training: there must be room for one more checkpoint.

        Raises:
            OSError: ENOSPC, with what is needed, by the last checkpoint or by the model's size, and what is there.
        """
        infos = catalog.committed(self.output_dir)
        expected = infos[-1].bytes if infos else bytes_of_first(model)
        space.require_room(self.output_dir, expected, distributed.world_size())

    # ---- find

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """Committed checkpoints with a sound manifest, by step."""
        return catalog.committed(self.output_dir)

    def own_checkpoints(self) -> list[CheckpointInfo]:
        """Those in ``output_dir`` that this run made and has not withdrawn, by step."""
        return [info for info in catalog.committed(self.output_dir) if self.is_own(info)]

    def validate(self, checkpoint_id: str) -> None:
        """Verify one checkpoint in this process.

        Raises:
            CheckpointError: naming what is wrong.
        """
        verify(self.output_dir / checkpoint_id)

    def newest_valid(self) -> Path | None:
        """Folder of the newest checkpoint that verifies, or None; collective, the ranks share the hashing.

        Newer ones that are proven wrong or withdrawn are moved to ``quarantine/`` with their reason; those that cannot
        be read, or are another run's, are left where they are. ``rejected`` names them all.

        Raises:
            CheckpointError: none is valid, but one could not be read or moved: the run must not start over in silence.
        """
        self.wait()
        left: list[str] = []
        for step in reversed(distributed.on_rank_zero(lambda: folders.committed_steps(self.output_dir))):
            folder = self.output_dir / f"step-{step}"
            try:
                self._require_own(folder, self._verify_together(folder))
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
        if isinstance(error, UnreadableCheckpoint | ForeignCheckpoint):
            return False
        return distributed.on_rank_zero(lambda: folders.quarantine(folder, error))

    def is_own(self, made: CheckpointInfo | Manifest) -> bool:
        """Whether this run made it, as far as both say which run they are of, and has not withdrawn it."""
        own = self._committer.run_identity
        of_this_run = not own or made.run_identity in ("", own)
        return of_this_run and not self.withdrawn(made.step, made.samples_consumed)

    def _require_own(self, folder: Path, manifest: Manifest) -> None:
        if self.withdrawn(manifest.step, manifest.samples_consumed):
            raise CheckpointError(
                "A run that was rolled back goes on from a checkpoint before its divergence",
                found=f"{folder}, after it",
                remedy="Nothing to do: the run goes on from an older one",
            )
        if not self.is_own(manifest):
            own, found = self._committer.run_identity, manifest.run_identity
            raise ForeignCheckpoint(
                f"A run goes on by itself from its own checkpoints alone, not from {folder}",
                found=f"one of another run, configuration {found[:8]} instead of {own[:8]}",
                remedy="Move it away; encdec.train --resume_from starts from it all the same",
            )

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
        self.wait()
        self._verify_together(folder)
        return self._load_verified(folder, model, optimizer, scheduler)

    def _load_verified(
        self, folder: Path, model: nn.Module, optimizer: Optimizer, scheduler: Stateful
    ) -> dict[str, Any]:
        state = distributed.on_rank_zero(lambda: read_trainer_state(folder))
        sharding = distributed.on_rank_zero(lambda: read_manifest(folder).sharding)
        if sharding == self.payload.name:
            self.payload.load(folder / sharding, model, optimizer)
        else:  # of the other engine: the same names and numbers, in other files
            stored = payload_named(sharding).stored(folder / sharding)
            self.payload.load_from(stored, folder / sharding, model, optimizer)
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
        self.wait()
        best = distributed.on_rank_zero(lambda: self._best(filter(self.is_own, self.list_checkpoints())))
        if best is None:
            return None
        state = self.load(self.output_dir / best.checkpoint_id, model, optimizer, scheduler)
        return state["step"], state.get("epoch", 0), state

    def _best(self, infos: Iterable[CheckpointInfo]) -> CheckpointInfo | None:
        return catalog.best(infos, self.best_metric, self.best_metric_mode)

    def print_summary(self) -> None:
        """One line a checkpoint: id, size, metrics, which is best."""
        infos = self.list_checkpoints()
        for line in catalog.lines(infos, self._best(infos)) or [f"no checkpoints in {self.output_dir}"]:
            print(line)


def bytes_of_first(model: nn.Module) -> int:
    """About what the first checkpoint of a model comes to; under ZeRO-3 its parameters are empty while not in use."""
    return BYTES_PER_PARAMETER * sum(
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()
    )
