"""An exported directory: from_pretrained loads it, and it computes what the sharded model computes."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from encdec.checkpoints import CheckpointManager
from encdec.checkpoints import __main__ as command
from encdec.checkpoints.catalog import best
from encdec.checkpoints.export import export
from encdec.checkpoints.manifest import verify
from encdec.files import RunPaths
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from tests.conftest import Lab as Runs
from tests.encdec.checkpoints.conftest import load_model
from tests.encdec.checkpoints.damage import flip, payload
from tests.encdec.checkpoints.ranks import run_ranks
from tests.encdec.checkpoints.sharded_logits import LOGITS, RUN, example, write_logits


def logits_of(folder: Path, **options) -> torch.Tensor:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(**example(model.config.vocab_size)).logits


def test_logits_equal_those_of_the_sharded_model(lab: Runs, twin: RunPaths, tmp_path: Path):
    code, output = lab.run("encdec.checkpoints", "export", str(twin.root), str(tmp_path / "hf"))
    assert code == 0, output
    (tmp_path / RUN).symlink_to(twin.root)
    assert run_ranks(write_logits, tmp_path) == [0, 0]
    sharded, exported = torch.load(tmp_path / LOGITS), logits_of(tmp_path / "hf")
    assert sharded.std() > 0.1
    assert torch.allclose(exported, sharded, rtol=0, atol=1e-5)
    assert not list(tmp_path.glob(".hf.*"))


def test_everything_from_pretrained_needs_is_there(twin: RunPaths, tmp_path: Path):
    out = tmp_path / "hf"
    assert command.main(["export", str(twin.checkpoints / "step-30"), str(out)]) == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    ours = load_model(twin, 30)
    for (name, exported), (_, trained) in zip(model.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(exported, trained), name
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(out)
    tokenizer.assert_matches(model.config)
    assert AutoTokenizer.from_pretrained(out)("def f(x):").input_ids == tokenizer("def f(x):").input_ids
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    for ours_at, like in (
        (out, "plain"),
        (out / "config.json", "plain/file"),
        (out / "model.safetensors", "plain/file"),
    ):
        assert stat.S_IMODE(ours_at.stat().st_mode) == stat.S_IMODE((tmp_path / like).stat().st_mode)
    with safe_open(out / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
    assert len(names) == len(set(names)) == len(list(ours.named_parameters()))  # the embedding once


def test_card_tells_how_the_run_was_trained(twin: RunPaths, tmp_path: Path):
    out = tmp_path / "hf"
    assert command.main(["export", str(twin.checkpoints / "step-30"), str(out)]) == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.tags and card.data.base_model is None and card.data.datasets is None  # from scratch, on local text
    for told in ("python-stdlib", "R1 1, R2 1, X1 1, X2 1, S 4", "60 steps", "step 30", "FSDP2", "torch 2."):
        assert told in card.text, told
    assert str(tmp_path.parent) not in card.text  # no path of this machine
    assert (out / "modeling_qwen3_encdec.py").is_file()
    assert json.loads((out / "config.json").read_text())["auto_map"].keys() == {"AutoConfig", "AutoModelForSeq2SeqLM"}


def test_files_of_another_run_tell_nothing_about_this_one(twin: RunPaths, tmp_path: Path):
    shutil.copytree(twin.model, tmp_path / "files")
    facts = json.loads((tmp_path / "files" / "training.json").read_text())
    (tmp_path / "files" / "training.json").write_text(json.dumps(facts | {"run_identity": "another"}))
    (tmp_path / "files" / "modeling_qwen3_encdec.py").unlink()  # as in a run directory from before code was kept
    words = ["export", str(twin.checkpoints / "step-30"), str(tmp_path / "hf"), "--files-from", str(tmp_path / "files")]
    assert command.main(words) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "python-stdlib" not in card
    assert "step 30" in card
    assert (tmp_path / "hf" / "modeling_qwen3_encdec.py").is_file()


def test_best_of_a_run(twin: RunPaths, tmp_path: Path, capsys):
    info = best(CheckpointManager(twin.checkpoints).list_checkpoints(), "loss", "min")
    assert command.main(["export", str(twin.root), str(tmp_path / "hf"), "--best", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == info.step
    assert command.main(["export", str(twin.checkpoints / "step-30"), str(tmp_path / "other"), "--best"]) == 78


def test_half_precision_in_several_files(large_run: RunPaths, tmp_path: Path, capsys):
    out = tmp_path / "hf"
    words = ["export", str(large_run.root), str(out), "--dtype", "bf16", "--shard-mb", "8", "--json"]
    assert command.main(words) == 0
    document = json.loads(capsys.readouterr().out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(document["files"])
    assert all((out / name).stat().st_size < 8.1e6 for name in document["files"])
    assert len(document["files"]) >= 3
    model = AutoModelForSeq2SeqLM.from_pretrained(out)  # the dtype is the config's
    assert model.dtype == torch.bfloat16
    ours = load_model(large_run, 5).state_dict()
    assert all(torch.equal(tensor, ours[name].bfloat16()) for name, tensor in model.state_dict().items())


def test_average_is_exported_from_anywhere(twin: RunPaths, tmp_path: Path):
    assert command.main(["average", str(twin.root), str(tmp_path / "mean"), "--last", "2"]) == 0
    assert command.main(["export", str(tmp_path / "mean"), str(tmp_path / "hf")]) == 0
    exported = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").state_dict()
    states = [load_model(twin, step).state_dict() for step in (45, 60)]
    for name, tensor in exported.items():
        expected = torch.stack([state[name].double() for state in states]).mean(0)
        assert torch.equal(tensor, expected.float()), name


def test_newest_valid_is_taken_and_nothing_is_moved(twin: RunPaths, tmp_path: Path, capsys):
    shutil.copytree(twin.checkpoints, tmp_path / "run" / "checkpoints")
    shutil.copytree(twin.model, tmp_path / "run" / "model")
    flip(payload(tmp_path / "run" / "checkpoints" / "step-60"))
    words = ["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--json"]
    assert command.main(words) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 45
    assert (tmp_path / "run" / "checkpoints" / "step-60").is_dir()
    assert command.main(["export", str(tmp_path / "run" / "checkpoints" / "step-60"), str(tmp_path / "bad")]) == 1
    assert not (tmp_path / "bad").exists()


def test_existing_directory_is_refused(twin: RunPaths, tmp_path: Path, capsys):
    (tmp_path / "hf").mkdir()
    assert command.main(["export", str(twin.root), str(tmp_path / "hf")]) == 78
    assert "must not exist yet" in capsys.readouterr().err
    assert not list((tmp_path / "hf").iterdir())


def test_model_files_of_another_model_are_refused(twin: RunPaths, large_run: RunPaths, tmp_path: Path, capsys):
    words = ["export", str(twin.root), str(tmp_path / "hf"), "--files-from", str(large_run.model)]
    assert command.main(words) == 1
    error = capsys.readouterr().err
    assert "must describe the model of the checkpoint" in error
    assert error.count("\n") == 1
    shutil.copytree(twin.model, tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text("{")
    assert command.main([*words[:-1], str(tmp_path / "torn")]) == 1
    assert "configuration that transformers reads" in capsys.readouterr().err
    shutil.copytree(twin.checkpoints / "step-60", tmp_path / "alone" / "step-60")
    assert command.main(["export", str(tmp_path / "alone" / "step-60"), str(tmp_path / "hf")]) == 1
    assert "--files-from DIR" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_weights_that_lie_beside_model_files_are_not_taken_along(twin: RunPaths, tmp_path: Path):
    """An exported directory is a good source of model files for another checkpoint."""
    assert command.main(["export", str(twin.checkpoints / "step-15"), str(tmp_path / "first")]) == 0
    (tmp_path / "first" / "model-00001-of-00009.safetensors").write_text("stale")
    (tmp_path / "first" / "model.safetensors.index.json").write_text("{}")
    words = ["export", str(twin.checkpoints / "step-60"), str(tmp_path / "hf"), "--files-from", str(tmp_path / "first")]
    assert command.main(words) == 0
    assert sorted(path.name for path in (tmp_path / "hf").glob("model[.-]*")) == ["model.safetensors"]
    assert torch.equal(logits_of(tmp_path / "hf"), load_model(twin, 60)(**example(512)).logits.detach())


@pytest.mark.parametrize("how", ["full", "interrupted"])
def test_nothing_half_made_is_left(twin: RunPaths, tmp_path: Path, how: str):
    """Whatever stops it: here a disk that takes no more, or Ctrl-C, after the first tensors."""
    stop = {"full": OSError(28, "No space left on device"), "interrupted": KeyboardInterrupt()}[how]
    folder = twin.checkpoints / "step-60"

    def progress(count: int) -> None:
        raise stop

    with pytest.raises(type(stop)):
        export(folder, verify(folder), tmp_path / "hf", progress=progress)
    assert list(tmp_path.iterdir()) == []
