"""A saved model's folder as one would put it on the hub: its code, its card, and both without this package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from encdec import hub_code
from encdec.errors import EncdecError
from encdec.model_card import MODEL_CARD, model_card
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from tests.encdec.tiny_model import tiny_model

WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class NotHere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "encdec":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NotHere())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer."""
    made = tmp_path_factory.mktemp("hub") / "model"
    tokenizer = Qwen3EncoderDecoderTokenizer.train_from_texts(["def greet(name):\n    return name\n" * 9], 280, 10)
    model = tiny_model(
        vocab_size=280, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id, sentinel_start_id=tokenizer.sentinel_ids[0],
    )  # fmt: skip
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def run_without_the_package(code: str, folder: Path, home: Path) -> str:
    """What a program in ``folder`` prints that can import nothing of this project and ask no hub."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE + code],
        cwd=folder,
        env=environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_folder_has_what_the_hub_shows_and_transformers_loads(folder: Path):
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", MODEL_CARD}
    assert {name for name in names if name.endswith(".py")} == {f"{name}.py" for name in hub_code.sources()}


def test_it_is_used_as_its_card_says_where_the_package_is_not(folder: Path, tmp_path: Path):
    """The card's own lines; then the model is saved again, whole, by a process that has only what the folder had."""
    example = re.search(r"```python\n(.*?)```", (folder / MODEL_CARD).read_text(), re.DOTALL)
    assert example
    save = f"\nmodel.save_pretrained({str(tmp_path / 'again')!r})\nprint(type(model).__module__)"
    output = run_without_the_package(example[1] + save, folder, tmp_path / "home")
    assert "<|endoftext|>" in output  # the start token, and what follows
    assert "transformers_modules" in output
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert {name for name in again if name.endswith(".py")} == {path.name for path in folder.glob("*.py")}
    for name, content in again.items():
        if not name.startswith("tokenizer"):
            assert content == (folder / name).read_bytes(), name


def test_code_is_complete_and_imports_nothing_of_the_package():
    sources = hub_code.sources()
    assert set(sources) >= {"modeling_qwen3_encdec", "configuration_qwen3_encdec", "merged_attention", "errors"}
    for name, text in sources.items():
        assert not re.search(r"^\s*(from|import) encdec", text, re.MULTILINE), name
        assert set(re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)) <= set(sources), name


def test_packages_are_laid_flat(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_code, "MODULES", ("training.model_sizes",))
    sources = hub_code.sources()
    assert {"training_model_sizes", "training_config", "estimates"} <= set(sources)
    assert "from .training_config import" in sources["training_model_sizes"]
    assert "from encdec" not in "".join(re.findall(r"^.* import ", "\n".join(sources.values()), re.MULTILINE))


@pytest.mark.parametrize(
    "line", ["from encdec import files", "import encdec.files", "from encdec.data import collator"]
)
def test_an_import_that_a_flat_folder_cannot_follow_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line):
    (tmp_path / "encdec").mkdir()
    (tmp_path / "encdec" / "hub_code.py").write_text("")
    (tmp_path / "encdec" / "model.py").write_text(f"{line}\n")
    monkeypatch.setattr(hub_code, "__file__", str(tmp_path / "encdec" / "hub_code.py"))
    monkeypatch.setattr(hub_code, "MODULES", ("model",))
    with pytest.raises(EncdecError, match=rf"must be names of a module, .*, found {line[:13]}"):
        hub_code.write_code(tmp_path / "encdec")


def test_the_card_says_what_is_known_and_no_more(folder: Path):
    card = ModelCard.load(folder / MODEL_CARD)
    assert card.data.library_name == "transformers"
    assert (card.data.license, card.data.base_model, card.data.datasets) == (None, None, None)
    parameters = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert f"{parameters:,}" in card.text
    assert "Nothing is recorded" in card.text


def test_the_card_of_a_trained_model(folder: Path, tmp_path: Path):
    config = tiny_model().config
    text = model_card(
        config, 12_345, base_model="Qwen/Qwen3-0.6B", datasets=["a/b"], training={"Phase": "full", "Seed": "42"}
    )
    data = yaml.safe_load(text.split("---")[1])
    assert data["license"] == "apache-2.0"  # Qwen3's own
    assert (data["base_model"], data["datasets"]) == ("Qwen/Qwen3-0.6B", ["a/b"])
    assert "| Seed | 42 |" in text and "Nothing is recorded" not in text


def test_a_card_that_someone_wrote_stays(tmp_path: Path):
    (tmp_path / MODEL_CARD).write_text("mine")
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / MODEL_CARD).read_text() == "mine"


def test_a_folder_from_before_the_code_was_in_it_loads_here(folder: Path, tmp_path: Path):
    """Neither auto_map nor code: the package alone is enough."""
    from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM

    for path in folder.glob("*.json"):
        text = path.read_text()
        (tmp_path / path.name).write_text(re.sub(r'\s*"auto_map": \{.*?\},', "", text, flags=re.DOTALL))
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert isinstance(Qwen3ForSeq2SeqLM.from_pretrained(tmp_path).shared.weight, torch.nn.Parameter)
