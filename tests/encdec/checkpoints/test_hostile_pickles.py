"""A checkpoint that would run a program when it is unpickled: refused before, whoever wrote its manifest."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from encdec.checkpoints import CheckpointManager, logical_digest
from encdec.checkpoints import __main__ as command
from encdec.checkpoints.dcp_index import INDEX, PayloadReader
from encdec.checkpoints.manifest import hash_file, read_manifest, verify, write_manifest
from encdec.errors import CheckpointError
from tests.encdec.checkpoints.damage import Lab, payload


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def index_that_runs(folder: Path, canary: Path) -> None:
    (folder / "fsdp2" / INDEX).write_bytes(pickle.dumps(Canary(canary)))


def index_with_a_program_in_it(folder: Path, canary: Path) -> None:
    """All else in it is right, so that whoever loads it gets as far as that."""
    index = PayloadReader(folder / "fsdp2").read_metadata()
    index.planner_data = Canary(canary)
    (folder / "fsdp2" / INDEX).write_bytes(pickle.dumps(index))


def tensor_said_to_be_bytes(folder: Path, canary: Path) -> None:
    """DCP unpickles bytes with no restriction at all."""
    index = PayloadReader(folder / "fsdp2").read_metadata()
    name = "model.0.bias"
    [(where, info)] = [(key, info) for key, info in index.storage_data.items() if key.fqn == name]
    content = bytearray(payload(folder).read_bytes())
    program = pickle.dumps(Canary(canary))
    info.offset, info.length = len(content), len(program)
    payload(folder).write_bytes(content + program)
    index.storage_data[type(where)(name)] = info
    index.state_dict_metadata[name] = BytesStorageMetadata()
    (folder / "fsdp2" / INDEX).write_bytes(pickle.dumps(index))


def file_elsewhere(folder: Path, canary: Path) -> None:
    index = PayloadReader(folder / "fsdp2").read_metadata()
    for info in index.storage_data.values():
        info.relative_path = f"../../step-2/fsdp2/{info.relative_path}"
    (folder / "fsdp2" / INDEX).write_bytes(pickle.dumps(index))


def tensor_that_runs(folder: Path, canary: Path) -> None:
    index = PayloadReader(folder / "fsdp2").read_metadata()
    info = next(info for key, info in index.storage_data.items() if key.fqn == "model.0.bias")
    beside = folder.parent / "beside.pt"
    torch.save(Canary(canary), beside)
    content = payload(folder).read_bytes()
    info.offset, info.length = len(content), beside.stat().st_size
    payload(folder).write_bytes(content + beside.read_bytes())
    (folder / "fsdp2" / INDEX).write_bytes(pickle.dumps(index))


# name -> (what is done to a payload, word in the refusal)
ATTACKS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "index that runs": (index_that_runs, r"mkdir"),
    "index with a program in it": (index_with_a_program_in_it, r"mkdir"),
    "tensor said to be bytes": (tensor_said_to_be_bytes, r"model\.0\.bias, which is no tensor"),
    "file elsewhere": (file_elsewhere, r"\.\./step-2"),
    "tensor that runs": (tensor_that_runs, r"made by posix\.mkdir"),
}


def make_consistent(folder: Path) -> None:
    """A manifest for what lies there now, as its rightful writer would have made it."""
    manifest = read_manifest(folder)
    records = [hash_file(folder, folder / record.path) for record in manifest.files]
    write_manifest(folder, dataclasses.replace(manifest, files=records))


def test_canary_sings(tmp_path: Path):
    """The test can fail: unpickled without care, it does run."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "sang")))
    assert (tmp_path / "sang").is_dir()


@pytest.mark.parametrize("attack", ATTACKS)
def test_with_a_stale_manifest_the_previous_checkpoint_is_used(saved, tmp_path: Path, attack: str):
    manager, _ = saved
    ATTACKS[attack][0](manager.output_dir / "step-3", tmp_path / "sang")
    assert manager.load_latest(*Lab(seed=9).parts())[0] == 2
    assert "step-3" in manager.rejected[0]
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_with_a_manifest_of_its_own_it_is_refused_all_the_same(saved, tmp_path: Path, capsys, attack: str):
    manager, _ = saved
    folder, canary = manager.output_dir / "step-3", tmp_path / "sang"
    do, word = ATTACKS[attack]
    do(folder, canary)
    make_consistent(folder)
    verify(folder)  # nothing is wrong with it as far as digests tell
    with pytest.raises(CheckpointError, match=word):
        manager.load_latest(*Lab(seed=9).parts())
    with pytest.raises(CheckpointError, match=word):
        logical_digest(folder)
    assert command.main(["average", str(manager.output_dir), str(tmp_path / "mean")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "mean").exists()
    assert not canary.exists()


def test_index_that_is_no_pickle_is_named(saved):
    manager, _ = saved
    folder = manager.output_dir / "step-3"
    for content in (b"", b"\x80\x05", b"not a pickle", pickle.dumps([1, 2])):
        (folder / "fsdp2" / INDEX).write_bytes(content)
        make_consistent(folder)
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            manager.load(folder, *Lab(seed=9).parts())


def test_what_torch_writes_is_admitted(saved, tmp_path: Path):
    """Every dtype that a model may have."""
    lab = Lab()
    for number, dtype in enumerate((torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)):
        lab.model.register_buffer(f"extra{number}", torch.zeros(3, dtype=dtype))
    manager = CheckpointManager(tmp_path / "dtypes")
    lab.step()
    lab.save(manager)
    assert manager.load_latest(*lab.parts())[0] == 1
