"""Saves that are written while training goes on: the same checkpoints, or none and an error on every rank."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from encdec import distributed
from encdec.checkpoints import CheckpointManager, commit, image, logical_digest
from encdec.checkpoints.fsdp2 import training_tensors
from encdec.checkpoints.image import Image
from encdec.checkpoints.manifest import MANIFEST
from encdec.errors import FencedError
from tests.encdec.checkpoints.damage import Lab, flip, payload
from tests.encdec.checkpoints.ranks import ShardedLab, run_ranks


def begin(lab: Lab, manager: CheckpointManager) -> str:
    step = lab.schedule.step
    state = {"samples_consumed": 8 * step, "seed": 1, "epoch": 0}
    return manager.save(lab.model, lab.optimizer, lab.schedule, step, extra_state=state, blocking=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Digest by step of checkpoints that one process has saved and waited for."""
    manager, lab = CheckpointManager(tmp_path_factory.mktemp("undisturbed"), save_total_limit=9), Lab()
    for _ in range(6):
        lab.step()
        lab.save(manager)
    return {step: logical_digest(manager.output_dir / f"step-{step}") for step in range(1, 7)}


def test_state_is_that_of_the_call_whatever_training_does_meanwhile(tmp_path: Path, undisturbed: dict[int, str]):
    manager, lab = CheckpointManager(tmp_path, save_total_limit=9), Lab()
    for step in range(1, 7):
        lab.step()
        assert begin(lab, manager) == f"step-{step}"  # the one before it is waited for
        assert manager.flying and manager.flying.step == step
    saved = manager.wait()
    assert saved and (saved.step, saved.checkpoint_id) == (6, "step-6")
    assert 0 < saved.blocking_seconds <= saved.seconds
    assert manager.flying is None and manager.wait() is None
    assert {step: logical_digest(tmp_path / f"step-{step}") for step in range(1, 7)} == undisturbed


def test_load_waits_for_what_is_being_written(tmp_path: Path, undisturbed: dict[int, str]):
    manager, lab, other = CheckpointManager(tmp_path), Lab(), Lab(seed=9)
    lab.step()
    begin(lab, manager)
    assert manager.load_latest(*other.parts())[0] == 1
    assert manager.flying is None


def test_error_in_the_background_is_raised_once_where_training_waits(tmp_path: Path):
    fenced = threading.Event()

    def fence() -> None:
        if fenced.is_set():
            raise FencedError("Only the newest attempt may write", remedy="Nothing to do")

    manager, lab = CheckpointManager(tmp_path, fence=fence), Lab()
    lab.step()
    begin(lab, manager)
    manager.wait()
    fenced.set()
    lab.step()
    begin(lab, manager)
    with pytest.raises(FencedError):
        manager.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]
    fenced.clear()
    begin(lab, manager)
    assert manager.wait().step == 2


def test_thread_that_dies_of_a_bug_is_a_crash_and_no_checkpoint(tmp_path: Path):
    def fence() -> None:
        raise ZeroDivisionError

    manager, lab = CheckpointManager(tmp_path, fence=fence), Lab()
    lab.step()
    begin(lab, manager)
    flying = manager.flying
    with pytest.raises(ZeroDivisionError):
        manager.wait()
    assert flying.crashed
    assert not list(tmp_path.glob("step-1"))


# ---- the format


def test_index_is_what_dcp_itself_would_write(tmp_path: Path):
    lab = Lab()
    lab.step()
    lab.save(CheckpointManager(tmp_path / "ours"))
    tensors = {name: tensor.detach() for name, tensor in training_tensors(lab.model, lab.optimizer).items()}
    dcp.save(tensors, checkpoint_id=tmp_path / "theirs", no_dist=True)
    ours, theirs = (
        pickle.loads((folder / ".metadata").read_bytes())
        for folder in (tmp_path / "ours" / "step-1" / "fsdp2", tmp_path / "theirs")
    )
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.version == theirs.version
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert {type(info) for info in ours.storage_data.values()} == {type(info) for info in theirs.storage_data.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_every_slice_is_a_file_of_torch_save(tmp_path: Path, dtype: torch.dtype):
    tensors = {
        f"t{number}": torch.randint(0, 2, sizes).to(dtype) for number, sizes in enumerate([(), (1,), (3, 5), (129, 7)])
    }
    chunks = [
        image.Chunk(name, dtype, tuple(tensor.shape), (0,) * tensor.dim(), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    made = Image(chunks, "file")
    made.copy(list(tensors.values()))
    record = made.write(tmp_path)
    content = (tmp_path / record.path).read_bytes()
    assert len(content) == record.bytes
    for entry in made.entries:
        path = tmp_path / entry.chunk.name
        path.write_bytes(content[entry.offset : entry.offset + entry.length])
        loaded = torch.load(path, weights_only=True)
        assert loaded.dtype == dtype and torch.equal(loaded, tensors[entry.chunk.name])


def test_tools_of_torch_and_accelerate_read_the_payload(tmp_path: Path):
    from accelerate.utils import merge_fsdp_weights
    from safetensors.torch import load_file

    lab = Lab()
    lab.step()
    lab.save(CheckpointManager(tmp_path))
    dcp_to_torch_save(tmp_path / "step-1" / "fsdp2", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    merge_fsdp_weights(str(tmp_path / "step-1" / "fsdp2"), str(tmp_path / "merged"))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = training_tensors(lab.model, lab.optimizer)
    assert whole.keys() == merged.keys() == expected.keys()
    assert all(
        torch.equal(whole[name], tensor) and torch.equal(merged[name], tensor) for name, tensor in expected.items()
    )


def test_the_buffer_is_used_again(tmp_path: Path):
    manager, lab = CheckpointManager(tmp_path), Lab()
    lab.step()
    lab.save(manager)
    buffer = manager.payload._image.buffer.data_ptr()
    lab.step()
    begin(lab, manager)
    assert manager.payload._image.buffer.data_ptr() == buffer
    manager.wait()


def test_what_is_written_is_what_was_hashed_and_damage_still_shows(saved):
    manager, lab = saved
    lab.step()
    begin(lab, manager)
    manager.wait()
    manager.validate("step-4")
    flip(payload(manager.output_dir / "step-4"), 2000)
    assert manager.load_latest(*Lab(seed=9).parts())[0] == 3


# ---- two ranks


def two_ranks(folder: Path) -> None:
    """Background saves of two ranks; one that fails on rank 1 alone, one that is fenced off on rank 0."""
    fenced = threading.Event()

    def fence() -> None:
        if fenced.is_set():
            raise FencedError("Only the newest attempt may write", remedy="Nothing to do")

    root = folder / "checkpoints"
    manager, lab = CheckpointManager(root, save_total_limit=9, fence=fence), ShardedLab()
    blocking = CheckpointManager(folder / "blocking", save_total_limit=9)
    for _ in range(3):
        lab.step()
        begin(lab, manager)
        lab.save(blocking)
    lab.step()  # beside the save of step 3
    saved = manager.wait()
    assert saved and saved.step == 3

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    begin(lab, manager)
    with pytest.raises(OSError, match=r"__1_0\.distcp") as caught:  # on both
        manager.wait()
    assert caught.value.errno == errno.EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()
    assert sorted(path.name for path in root.iterdir()) == ["step-1", "step-2", "step-3"]
    dist.barrier()  # neither begins the next one while the other is looking

    fenced.set()
    begin(lab, manager)
    lab.step()
    with pytest.raises(FencedError):
        manager.wait()
    fenced.clear()
    begin(lab, manager)  # step 5
    lab.save(blocking)
    lab.step()
    manager.wait()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``two_ranks`` leaves: checkpoints/ and, of the same steps, blocking/."""
    folder = tmp_path_factory.mktemp("both")
    assert run_ranks(two_ranks, folder) == [0, 0]
    return folder


def test_two_ranks_agree_on_every_outcome(both: Path):
    names = sorted(path.name for path in (both / "checkpoints").iterdir())
    assert names == ["step-1", "step-2", "step-3", "step-5"]
    for name in names:
        assert logical_digest(both / "checkpoints" / name) == logical_digest(both / "blocking" / name)
        assert len(list((both / "checkpoints" / name / "fsdp2").glob("__*_0.distcp"))) == 2


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_copy() -> None:
    def copy(self: Image, tensors: list[torch.Tensor]) -> None:
        self.places[0].copy_(tensors[0])
        die()

    Image.copy = copy  # type: ignore[method-assign]


def die_in_the_write() -> None:
    whole = image.write_hashed

    def half(path: Path, content: memoryview) -> None:
        whole(path, content[: len(content) // 2])
        die()

    image.write_hashed = half  # type: ignore[assignment]


def die_after_the_shard() -> None:
    whole = Image.write

    def write(self: Image, folder: Path) -> None:
        whole(self, folder)
        die()

    Image.write = write  # type: ignore[assignment, method-assign]


def die_before_the_manifest() -> None:
    commit.write_manifest = die  # type: ignore[assignment]


def die_before_the_rename() -> None:
    commit.Committer._rename = die  # type: ignore[assignment, method-assign]


def die_after_the_rename() -> None:
    CheckpointManager._prune = die  # type: ignore[assignment, method-assign]


# name -> (rank that is killed, how, step of the newest checkpoint after it)
KILLS: dict[str, tuple[int, Callable[[], None], int]] = {
    "in the copy": (1, die_in_the_copy, 2),
    "in the write": (1, die_in_the_write, 2),
    "between shard and manifest": (1, die_after_the_shard, 2),
    "before the manifest": (0, die_before_the_manifest, 2),
    "before the rename": (0, die_before_the_rename, 2),
    "after the rename": (0, die_after_the_rename, 3),
}


def killed(folder: Path) -> None:
    victim, install, _ = KILLS[(folder / "kill").read_text()]
    manager, lab = CheckpointManager(folder / "checkpoints"), ShardedLab()
    for _ in range(2):
        lab.step()
        begin(lab, manager)
    manager.wait()
    lab.step()
    if distributed.rank() == victim:
        install()
    begin(lab, manager)
    manager.wait()
    for _ in itertools.count():  # the other rank learns of it here at the latest
        lab.step()


@pytest.mark.parametrize("name", KILLS)
def test_killed_rank_leaves_no_half_checkpoint(tmp_path: Path, both: Path, name: str):
    victim, _, newest = KILLS[name]
    (tmp_path / "kill").write_text(name)
    codes = run_ranks(killed, tmp_path)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1  # by an error, neither in silence nor hanging
    manager, lab = CheckpointManager(tmp_path / "checkpoints"), Lab(seed=9)
    manager.discard_unfinished()
    assert not list(manager.output_dir.glob("*.tmp-*"))
    assert manager.load_latest(*lab.parts())[0] == newest
    assert not manager.rejected
    assert all((path / MANIFEST).exists() for path in manager.output_dir.iterdir())
    name = f"step-{newest}"
    assert logical_digest(manager.output_dir / name) == logical_digest(both / "blocking" / name)
