"""python -m encdec.weight_initialization: a model's directory from a Qwen3's, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, LlamaConfig, Qwen2Config, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from encdec import sanity_check
from encdec.checkpoints import export, space
from encdec.checkpoints.stored import feed_tensor
from encdec.initialization import folder
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.weight_initialization import initialize_from_qwen3, main, parse
from tests.conftest import REPOSITORY

TOKENS = 400
"""Of the source's tokenizer."""
ROWS = 448
"""Of its embedding."""
SHAPE = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def source_tokenizer() -> Qwen2Tokenizer:
    """As Qwen3's base models have it: ends as it pads, and knows <|im_end|>."""
    texts = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    trained = Qwen3EncoderDecoderTokenizer.train_from_texts(texts, TOKENS, 0)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    vocab = {token: index for token, index in model["vocab"].items() if index < trained.pad_token_id}
    base = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])
    base.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    assert len(base) == TOKENS and base.pad_token_id == TOKENS - 2
    return base


@pytest.fixture
def source(source_tokenizer: Qwen2Tokenizer, tmp_path: Path) -> Path:
    """An untied bf16 Qwen3 in several files."""
    return saved(tmp_path / "qwen3", source_tokenizer, tie_word_embeddings=False)


def saved(place: Path, tokenizer: Qwen2Tokenizer, shard: str = "60KB", **changes: Any) -> Path:
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.pad_token_id}
    model = Qwen3ForCausalLM(Qwen3Config(**(SHAPE | ids | changes)))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.bfloat16().save_pretrained(place, max_shard_size=shard)
    tokenizer.save_pretrained(place)
    return place


def words(source: Path, out: Path, *more: str) -> list[str]:
    return ["--from", str(source), "--to", str(out), "--num-sentinel-tokens", "30", *more]


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 78) -> str:
    """The one paragraph that a refusal says; nothing is written."""
    out = Path(argv[argv.index("--to") + 1])
    before = sorted(out.parent.iterdir())
    assert main(list(argv)) == code
    assert sorted(out.parent.iterdir()) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_written_model_is_the_one_built_in_memory(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "deep" / "model"
    assert main(words(source, out, "--max-shard-size", "100KB", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), Qwen3EncoderDecoderTokenizer.from_pretrained(out)
    tokenizer.assert_matches(model.config)
    assert tokenizer.sentinel_ids == list(range(TOKENS, TOKENS + 30))
    assert model.config.vocab_size == ROWS  # they fit: nothing was resized
    built = initialize_from_qwen3(source, 30, tokenizer=tokenizer)
    hasher = blake3()
    for name, tensor in sorted(built.state_dict().items()):
        assert torch.equal(model.state_dict()[name], tensor), name
        feed_tensor(hasher, name, tensor)
    assert report["digest"] == hasher.hexdigest()
    assert len(report["files"]) > 2 and all((out / name).stat().st_size < 110_000 for name in report["files"])
    assert sum(len(load_file(out / name)) for name in report["files"]) == report["tensors"]
    assert model.encoder.embed_tokens.weight.data_ptr() == model.shared.weight.data_ptr()
    assert sanity_check.main(["--model-path", str(out)]) == 0


def test_the_report_names_every_tensor(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "model"
    assert main(words(source, out)) == 0
    text, report = capsys.readouterr().out, json.loads((out / folder.REPORT).read_text())
    keys = {name for file in source.glob("*.safetensors") for name in load_file(file)}
    assert set(report["used"]) | set(report["unused"]) == keys and not set(report["used"]) & set(report["unused"])
    filled = [target for targets in report["used"].values() for target in targets]
    names = [name for file in report["files"] for name in load_file(out / file)]
    assert sorted(filled) == sorted(names)
    assert report["unused"] == {"lm_head.weight": "our head is the embedding"} and not report["source_tied"]
    assert "the source has a head of its own, which is left out" in text and "lm_head.weight" in text
    assert (report["drawn"]["first"], report["drawn"]["end"]) == (TOKENS, ROWS)
    assert report["parameters"] == sum(p.numel() for p in AutoModelForSeq2SeqLM.from_pretrained(out).parameters())


def test_half_precision_and_mode_tokens(source: Path, tmp_path: Path):
    out = tmp_path / "model"
    assert main(words(source, out, "--dtype", "bf16", "--mode-tokens")) == 0
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), Qwen3EncoderDecoderTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert tokenizer.mode_token_ids == model.config.mode_token_ids == [TOKENS + 30, TOKENS + 31, TOKENS + 32]
    tokenizer.assert_matches(model.config)


def test_sentinels_that_do_not_fit_grow_the_embedding_to_a_multiple_of_64(source: Path, tmp_path: Path):
    out = tmp_path / "model"
    assert main([*words(source, out)[:-1], "100"]) == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert model.config.vocab_size == model.shared.weight.shape[0] == 512  # 400 + 100 do not fit 448


@pytest.mark.parametrize(("kind", "config"), [("qwen2", Qwen2Config()), ("llama", LlamaConfig())])
def test_another_architecture(kind: str, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config.save_pretrained(tmp_path / "other")
    assert kind in refused(capsys, *words(tmp_path / "other", tmp_path / "out"))


def test_a_place_that_is_taken(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "model"
    assert main(words(source, out)) == 0
    capsys.readouterr()
    assert "--force" in refused(capsys, *words(source, out))
    (out / "own-notes").touch()
    assert main(words(source, out, "--force", "--dtype", "bf16")) == 0
    assert not (out / "own-notes").exists() and AutoModelForSeq2SeqLM.from_pretrained(out).dtype == torch.bfloat16
    capsys.readouterr()
    (tmp_path / "home").mkdir()
    assert "nothing else" in refused(capsys, *words(source, tmp_path / "home", "--force"))
    assert not list(tmp_path.glob(".*"))


def test_no_room(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    class Full:
        f_bavail, f_frsize, f_files, f_favail = 10, 4096, 0, 0

    monkeypatch.setattr(space.os, "statvfs", lambda place: Full)
    assert "room for the model" in refused(capsys, *words(source, tmp_path / "out"))


def damage_data(source: Path) -> None:
    file = min(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(source: Path) -> None:
    file = min(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:8] + b"}" + file.read_bytes()[9:])


def damage_index(source: Path) -> None:
    (source / "model.safetensors.index.json").write_text('{"weight_map": ')


def leave_out_of_index(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(document))


def lead_index_astray(source: Path) -> None:
    index = source / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(document))


def lose_index(source: Path) -> None:
    first, *_ = sorted(source.glob("*.safetensors"))
    (source / "another.safetensors").write_bytes(first.read_bytes())
    (source / "model.safetensors.index.json").unlink()


def lose_file(source: Path) -> None:
    min(source.glob("*.safetensors")).unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_data, "can be read"), (damage_header, "can be read"), (damage_index, "can be read"),
        (leave_out_of_index, "model.norm.weight not listed"), (lead_index_astray, "weight_map"),
        (lose_file, "all of its safetensors"), (lose_index, "without an index"),
    ],
)  # fmt: skip
def test_a_damaged_source(damage: Any, says: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damage(source)
    assert says in refused(capsys, *words(source, tmp_path / "out"))


def test_a_missing_key(source_tokenizer: Qwen2Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = saved(tmp_path / "qwen3", source_tokenizer, num_hidden_layers=2, shard="1GB")
    document = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(document | {"num_hidden_layers": 3, "layer_types": None}))
    capsys.readouterr()
    error = refused(capsys, *words(place, tmp_path / "out"))
    assert "fill every parameter" in error and "decoder.layers.2.input_layernorm.weight" in error


def test_the_tokenizer_of_another_model(
    source: Path, source_tokenizer: Qwen2Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One that makes ids of text for which the source has no row, and one that lacks what Qwen3's own has."""
    source_tokenizer.save_pretrained(tmp_path / "larger")
    larger = Qwen2Tokenizer.from_pretrained(tmp_path / "larger")
    larger.add_tokens([f"word{index}" for index in range(60)])
    larger.save_pretrained(tmp_path / "larger")
    given = words(source, tmp_path / "out", "--tokenizer", str(tmp_path / "larger"))
    assert "460 tokens and 448 rows" in refused(capsys, *given)
    document = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(document | {"vocab_size": 151_936}))
    assert "151,669" in refused(capsys, *words(source, tmp_path / "out"))


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_nothing_half_made_is_left(stop: BaseException, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "model"
    assert main(words(source, out)) == 0
    before = (out / folder.REPORT).read_text()
    save, calls = export.save_file, []

    def stopped(*what: Any, **options: Any) -> None:
        calls.append(what)
        if len(calls) == 2:
            raise stop
        save(*what, **options)

    monkeypatch.setattr(export, "save_file", stopped)
    expected = 1 if isinstance(stop, OSError) else 130
    assert main(words(source, out, "--force", "--max-shard-size", "60KB")) == expected
    calls.clear()
    assert main(words(source, tmp_path / "fresh", "--max-shard-size", "60KB")) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "qwen3"]
    assert (out / folder.REPORT).read_text() == before


def test_sizes_are_understood():
    def size(text: str) -> int:
        return parse(["--from", "a", "--to", "b", "--max-shard-size", text]).max_shard_size

    assert [size(text) for text in ("5", "5KB", "2 mb", "1GB")] == [5, 5_000, 2_000_000, 10**9]


MEASURED = """
import sys
from pathlib import Path
from encdec.weight_initialization import main

def memory(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

main(["--from", sys.argv[1], "--to", sys.argv[2] + "/first", "--num-sentinel-tokens", "30"])  # all imports
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
code = main(["--from", sys.argv[3], "--to", sys.argv[2] + "/second", "--num-sentinel-tokens", "30",
             "--max-shard-size", "30MB"])
print(code, memory("VmHWM") - before)
"""


def test_memory_is_one_file_and_one_tensor(source: Path, source_tokenizer: Qwen2Tokenizer, tmp_path: Path):
    """The kernel's own count, also of mapped files; the model is several times as large."""
    large = saved(
        tmp_path / "large",
        source_tokenizer,
        hidden_size=512,
        intermediate_size=4_096,
        num_hidden_layers=4,
        shard="25MB",
    )
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path), str(large)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    code, used = map(int, done.stdout.splitlines()[-1].split())
    total = sum(file.stat().st_size for file in (tmp_path / "second").glob("*.safetensors"))
    tensor, shard, mapped = 4 * 4_096 * 512, 30_000_000, 25_000_000
    assert code == 0
    assert used < shard + mapped + 2 * tensor + 24_000_000 < 0.5 * total
