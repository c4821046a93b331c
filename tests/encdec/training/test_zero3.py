"""ZeRO-3: knobs that change no result, checkpoints that either engine goes on from, files as they should be."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from encdec import distributed
from encdec.checkpoints import __main__ as command
from encdec.checkpoints import averaging, logical_digest
from encdec.checkpoints.manager import bytes_of_first
from encdec.checkpoints.manifest import read_manifest, verify
from encdec.checkpoints.model_files import keep_model_files
from encdec.checkpoints.partitions import Partitions
from encdec.checkpoints.payload import open_weights
from encdec.checkpoints.weights import Piece
from encdec.checkpoints.zero3 import ZeroSnapshot
from encdec.errors import CheckpointError, ShardingError, UnreadableCheckpoint
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training.build import build_model
from tests.encdec.training.engine_lab import END, SAVED, Made, Scene, farthest
from tests.many_ranks import in_ranks


@pytest.fixture(scope="module")
def whole(whole_run: Callable[[str], Scene]) -> Scene:
    return whole_run("deepspeed")


@pytest.fixture(scope="module")
def saved(whole: Scene) -> Path:
    return whole.root / f"step-{SAVED}"


def test_either_engine_goes_on_from_the_other_s_checkpoint(made: Made, whole: Scene, saved: Path, tmp_path: Path):
    digest = logical_digest(saved)
    there = Scene(made, "fsdp", tmp_path / "there", END, saved)
    in_ranks(3, there)
    assert read_manifest(there.root / saved.name).sharding == "fsdp2"
    assert logical_digest(there.root / saved.name) == digest
    assert farthest(there, whole) < 1e-5
    back = Scene(made, "deepspeed", tmp_path / "back", SAVED + 5, there.root / saved.name)
    in_ranks(2, back)
    assert logical_digest(back.root / saved.name) == digest
    assert farthest(back, whole) < 1e-5


KNOBS = {
    "zero_optimization": {
        "stage": 3, "sub_group_size": 4000, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 5e3,
        "reduce_scatter": False,
    },
    "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("offload", [False, True], ids=["knobs", "knobs and offload"])
def test_how_zero_works_changes_no_result(made: Made, whole: Scene, saved: Path, tmp_path: Path, offload: bool):
    (tmp_path / "ds.json").write_text(json.dumps(KNOBS))
    settings = [f"infra.deepspeed_config={tmp_path / 'ds.json'}", f"infra.fsdp_cpu_offload={offload}"]
    scene = Scene(made, "deepspeed", tmp_path / "run", SAVED + 8, saved, settings)
    in_ranks(2, scene)
    assert logical_digest(scene.root / saved.name) == logical_digest(saved)
    assert farthest(scene, whole) < 1e-5


def test_deepspeed_s_own_tool_reads_the_payload(saved: Path, tmp_path: Path):
    command = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", str(saved / "zero3"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    ours = Partitions(saved / "zero3")
    assert len(theirs) == len(ours.parameters) > 20  # the tied embedding once
    for name, value in theirs.items():
        assert torch.equal(value, ours.read(f"model.{name}")), name


def test_average_is_the_arithmetic_mean_and_either_engine_s(made: Made, whole: Scene, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(averaging, "WHOLE_BYTES", 0)  # every tensor in its pieces
    assert command.main(["average", str(whole.root), str(tmp_path / "mean")]) == 0
    manifest = verify(tmp_path / "mean")
    assert (manifest.sharding, list(manifest.made_of)) == ("fsdp2", ["step-10", "step-20", "step-30"])
    sources = [Partitions(whole.root / f"step-{step}" / "zero3") for step in (10, 20, 30)]
    found = open_weights(tmp_path / "mean", manifest)
    assert found.tensors.keys() == sources[0].parameters.keys()
    for name in found.tensors:
        expected = torch.stack([source.read(f"model.{name}").double() for source in sources]).mean(0).float()
        assert torch.equal(found.read(name), expected), name
    on = Scene(made, "deepspeed", tmp_path / "on", END + 3, tmp_path / "mean")
    in_ranks(2, on)  # with a fresh optimizer state
    assert list(on.losses) == [31, 32, 33] and all(map(math.isfinite, on.losses.values()))
    again = open_weights(on.root / f"step-{END}", verify(on.root / f"step-{END}"))
    assert all(torch.equal(again.read(name), found.read(name)) for name in found.tensors)


def test_pieces_make_up_the_tensor(saved: Path):
    weights, stored = open_weights(saved, verify(saved)), Partitions(saved / "zero3")
    counts = set()
    for name in weights.tensors:
        pieces = weights.pieces(name)
        counts.add(len(pieces))
        whole = stored.read(f"model.{name}")
        assert torch.equal(torch.cat([weights.read(name, piece) for piece in pieces]), whole), name
    assert max(counts) == 4  # the ranks that wrote it
    box = weights.read("shared.weight", Piece((3, 2), (7, 5)))
    assert torch.equal(box, stored.read("model.shared.weight")[3:10, 2:7])


def test_export_is_what_from_pretrained_loads(made: Made, saved: Path, tmp_path: Path):
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(str(made.folder / "tokenizer"))
    config = Scene(made, "deepspeed", tmp_path, END).run().config
    keep_model_files(build_model(config, tokenizer), tokenizer, tmp_path / "files")
    arguments = ["export", str(saved), str(tmp_path / "hf"), "--files-from", str(tmp_path / "files")]
    assert command.main(arguments) == 0
    model, stored = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf"), Partitions(saved / "zero3")
    parameters = dict(model.named_parameters())
    assert parameters.keys() == stored.places.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, stored.read(f"model.{name}")), name


def test_snapshot_does_not_change_while_training_goes_on(made: Made, tmp_path: Path):
    in_ranks(2, write_twice, Scene(made, "deepspeed", tmp_path, 9))
    files = [path.relative_to(tmp_path / "at once") for path in (tmp_path / "at once").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "at once" / file).read_bytes() == (tmp_path / "later" / file).read_bytes(), file
    newer = Partitions(tmp_path / "newer")
    assert not torch.equal(
        newer.read("model.shared.weight"), Partitions(tmp_path / "later").read("model.shared.weight")
    )


def write_twice(scene: Scene) -> None:
    trainer = scene.trainer()
    payload, parts = trainer.checkpoints.payload, (trainer.engine.module, trainer.optimizer)
    for name in ("at once", "later", "newer"):
        (scene.root / name).mkdir(exist_ok=True)
    trainer._step()
    snapshot = payload.snapshot(*parts)
    snapshot.write(scene.root / "at once")
    trainer._step()
    snapshot.write(scene.root / "later")
    payload.snapshot(*parts).write(scene.root / "newer")


def test_payload_is_hashed_and_private(saved: Path):
    manifest = verify(saved)
    assert (manifest.sharding, manifest.world_size, manifest.step) == ("zero3", 4, SAVED)
    names = {record.path for record in manifest.files}
    assert "zero3/latest" in names and sum(name.endswith("_optim_states.pt") for name in names) == 4
    assert not any(path.stat().st_mode & 0o077 for path in saved.rglob("*") if path.is_file())


class Canary:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_pickle_that_would_execute_is_refused_even_if_its_digest_is_right(saved: Path, tmp_path: Path, kind: str):
    shutil.copytree(saved / "zero3", tmp_path / "zero3")
    [path, *_] = sorted((tmp_path / "zero3" / "state").glob(f"*_{kind}_states.pt"))
    values = torch.load(path, weights_only=False)
    torch.save({**values, "canary": Canary(tmp_path / "sang")}, path)
    assert pickle.loads(pickle.dumps(Canary(tmp_path / "proof"))) is None and (tmp_path / "proof").exists()
    with pytest.raises(CheckpointError, match=r"posix\.mkdir, which a checkpoint has no use for"):
        assert Partitions(tmp_path / "zero3").names
    assert not (tmp_path / "sang").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "another"])
def test_payload_that_is_not_whole_is_named(saved: Path, tmp_path: Path, damage: str):
    shutil.copytree(saved / "zero3", tmp_path / "zero3")
    path = next((tmp_path / "zero3" / "state").glob("*rank_2_*_optim_states.pt"))
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "truncated" else pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"ZeRO-3 checkpoint must have|DeepSpeed's state at"):
        assert Partitions(tmp_path / "zero3").names


def test_storage_that_fails_amid_reading_is_an_error_not_the_end_of_the_process(saved: Path, tmp_path: Path):
    shutil.copytree(saved / "zero3", tmp_path / "zero3")
    path = next((tmp_path / "zero3" / "state").glob("*rank_2_*_optim_states.pt"))
    stored = Partitions(tmp_path / "zero3")
    assert torch.equal(stored.read("model.shared.weight"), Partitions(saved / "zero3").read("model.shared.weight"))
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError, match=r"all elements of a rank's part at .*rank_2.*ends before them"):
        stored.read("model.shared.weight")
    path.unlink()
    path.symlink_to("/proc/self/mem")  # opens, and gives EIO
    with pytest.raises(UnreadableCheckpoint, match=r"Storage must let the checkpoint be read at .*rank_2"):
        Partitions(tmp_path / "zero3").read("model.shared.weight")


def test_storage_that_takes_no_more_is_an_os_error(tmp_path: Path):
    snapshot = ZeroSnapshot({"a.pt": {"weights": torch.zeros(100_000)}})
    assert snapshot.nbytes == 400_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            snapshot.write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_checkpoint_of_another_model_is_refused(made: Made, saved: Path, tmp_path: Path):
    other = Scene(made, "deepspeed", tmp_path, END, saved, ["model.from_scratch.num_hidden_layers=2"])
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="must have the parameters of this model"):
        in_ranks(1, other)


def test_bfloat16_keeps_positions_masters_and_reductions_in_fp32(made: Made, tmp_path: Path):
    in_ranks(2, look_at_bfloat16, Scene(made, "deepspeed", tmp_path, 2))


def look_at_bfloat16(scene: Scene) -> None:
    trainer = scene.trainer(dtype=torch.bfloat16)
    model = trainer.engine.module.module
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    frequencies = model.encoder.rotary_emb.inv_freq
    half = torch.arange(0, 16, 2) / 16
    assert torch.equal(frequencies, 1.0 / (model.config.rope_parameters["rope_theta"] ** half))
    assert {flat.dtype for flat in trainer.optimizer.fp32_partitioned_groups_flat} == {torch.float32}
    trainer.computation.forward_backward()
    assert {gradient.dtype for gradient in trainer.engine.local_gradients()} == {torch.float32}
    assert math.isfinite(trainer.train().last_loss)


def test_sharding_is_proved(made: Made, tmp_path: Path):
    in_ranks(2, look_at_sharding, Scene(made, "deepspeed", tmp_path, 2))


def look_at_sharding(scene: Scene) -> None:
    import deepspeed

    engine = scene.trainer().engine
    assert engine.prove_sharding(2) == "ZeRO-3 over 2 ranks: 35,072 parameters, 17,536 on this rank"
    assert bytes_of_first(engine.module) == 35_072 * 12
    with pytest.raises(ShardingError, match="all 3 ranks by ZeRO-3, found ZeRO stage 3 over 2 ranks"):
        engine.prove_sharding(3)
    weight = engine.module.module.shared.weight
    with deepspeed.zero.GatheredParameters(weight), pytest.raises(ShardingError, match="elements held beside its part"):
        engine.prove_sharding(2)
    assert distributed.world_size() == 2
