"""The average of step checkpoints: the arithmetic mean, a checkpoint like any other, in the memory of one shard."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from encdec.checkpoints import CheckpointManager
from encdec.checkpoints import __main__ as command
from encdec.checkpoints.averaging import choose_sources
from encdec.checkpoints.manifest import manifest_digest, verify
from encdec.checkpoints.payload import open_weights
from encdec.files import RunPaths
from tests.conftest import REPOSITORY
from tests.encdec.checkpoints.damage import Lab, flip, payload


def tensors_of(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by torch's own converter."""
    dcp_to_torch_save(checkpoint / "fsdp2", scratch)
    return torch.load(scratch)


def mean_of(root: Path, steps: list[int], scratch: Path) -> dict[str, torch.Tensor]:
    """The means of the weights, computed independently."""
    states = [tensors_of(root / f"step-{step}", scratch) for step in steps]
    names = [name for name in states[0] if name.startswith("model.")]
    return {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in names}


def test_average_of_a_sharded_run_is_the_arithmetic_mean(twin: RunPaths, tmp_path: Path, capsys):
    assert command.main(["average", str(twin.root), str(tmp_path / "mean"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    steps = [15, 30, 45, 60]
    assert list(document["made_of"]) == [f"step-{step}" for step in steps]
    expected = mean_of(twin.checkpoints, steps, tmp_path / "state.pt")
    found = tensors_of(tmp_path / "mean", tmp_path / "state.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    newest = tensors_of(twin.checkpoints / "step-60", tmp_path / "state.pt")
    assert any(not torch.equal(found[name], newest[name]) for name in expected)


def test_average_of_the_last_n_says_what_it_is_made_of(twin: RunPaths, tmp_path: Path, capsys):
    assert command.main(["average", str(twin.root), str(tmp_path / "mean"), "--last", "2"]) == 0
    assert "mean of step-45, step-60" in capsys.readouterr().out
    manifest = verify(tmp_path / "mean")
    assert manifest.made_of == {f"step-{step}": manifest_digest(twin.checkpoints / f"step-{step}") for step in (45, 60)}
    assert (manifest.step, manifest.metrics, manifest.sharding) == (60, {}, "fsdp2")
    assert "made_of" not in (twin.checkpoints / "step-60" / "manifest.json").read_text()
    assert command.main(["verify", str(tmp_path / "mean")]) == 0
    flip(payload(tmp_path / "mean"))
    assert command.main(["verify", str(tmp_path / "mean")]) == 1


def test_average_can_be_trained_on(saved, tmp_path: Path):
    manager, _ = saved
    assert command.main(["average", str(manager.output_dir), str(tmp_path / "mean"), "--last", "3"]) == 0
    lab = Lab(seed=9)
    state = manager.load(tmp_path / "mean", *lab.parts())
    assert (state["step"], lab.schedule.step) == (3, 3)
    expected = mean_of(manager.output_dir, [1, 2, 3], tmp_path / "state.pt")
    for name, parameter in lab.model.named_parameters():
        assert torch.equal(parameter, expected[f"model.{name}"])
    before = lab.model[0].weight.clone()
    lab.step()  # with a fresh optimizer state
    assert not torch.equal(lab.model[0].weight, before)


def test_best_and_final_links_and_averages_never_count(saved, tmp_path: Path):
    manager, _ = saved
    root = manager.output_dir
    for name in ("best", "final", "step-9"):
        (root / name).symlink_to("step-1")
    assert command.main(["average", str(root), str(root / "average-3")]) == 0
    sources, passed_over = choose_sources(root, 5)
    assert [source.folder.name for source in sources] == ["step-1", "step-2", "step-3"]
    assert passed_over == []


def test_damaged_source_is_passed_over_aloud(saved, tmp_path: Path, capsys):
    manager, _ = saved
    flip(payload(manager.output_dir / "step-3"))
    assert command.main(["average", str(manager.output_dir), str(tmp_path / "mean"), "--last", "2"]) == 0
    captured = capsys.readouterr()
    assert "step-3" in captured.err
    assert "mean of step-1, step-2" in captured.out
    flip(payload(manager.output_dir / "step-2"))
    assert command.main(["average", str(manager.output_dir), str(tmp_path / "other")]) == 1
    assert "two or more valid step checkpoints" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_other_model_among_the_sources_is_named(saved, tmp_path: Path, capsys):
    manager, _ = saved
    other = Lab(width=7)
    for _ in range(4):
        other.step()
    other.save(CheckpointManager(manager.output_dir, save_total_limit=9))
    assert command.main(["average", str(manager.output_dir), str(tmp_path / "mean")]) == 1
    assert "must be of one model, as step-4 is, found step-1, which differs in 0.weight" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["there", "link", "step-7"])
def test_place_of_an_average_is_refused_before_work(saved, tmp_path: Path, capsys, name: str):
    manager, _ = saved
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    assert command.main(["average", str(manager.output_dir), str(tmp_path / name)]) == 78
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def growth(large_run: RunPaths, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """How far memory rose in each of three pieces of work, in units of what one rank wrote of one checkpoint."""
    out = tmp_path_factory.mktemp("out")
    words = [sys.executable, "-m", "tests.encdec.checkpoints.peak_memory", str(large_run.root), str(out)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((out / "hf").glob("model-*.safetensors"))) >= 6
    shutil.rmtree(out)
    shard = payload(large_run.checkpoints / "step-5").stat().st_size
    return {name: count / shard for name, count in json.loads(done.stdout).items()}


def test_memory_of_an_average_is_bounded_by_one_shard(growth: dict[str, float]):
    """The control, which holds all five, shows that the measurement sees memory."""
    print(growth)
    assert growth["average"] < 1
    assert growth["everything"] > 3


def test_memory_of_an_export_is_bounded_by_its_files(growth: dict[str, float]):
    assert growth["export"] < 0.6


def test_large_tensors_are_read_in_the_pieces_that_were_written(twin: RunPaths):
    folder = twin.checkpoints / "step-60"
    weights = open_weights(folder, verify(folder))
    name = "shared.weight"
    pieces = weights.pieces(name)
    assert len(pieces) == 2  # one a rank
    whole = weights.read(name)
    assert torch.equal(torch.cat([weights.read(name, piece) for piece in pieces]), whole)
