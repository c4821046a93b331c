"""What model, configuration and tokenizer refuse by rule, and the card that is pushed to the hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, Qwen3Config
from transformers.utils import hub

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError, InputError
from encdec.model_inputs import UNKNOWN, check_inputs, refuse_unknown
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from tests.encdec.tiny_model import tiny_model, tokens


def test_another_architecture_is_refused(tmp_path):
    Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"found qwen3\. .*encdec\.weight_initialization --from"):
        Qwen3EncoderDecoderConfig.from_pretrained(tmp_path)
    tiny_model().config.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), Qwen3EncoderDecoderConfig)


def test_mode_tokens_keep_their_rows():
    model = tiny_model(vocab_size=270, mode_token_ids=[256, 257, 258])
    with pytest.raises(ConfigError, match="259 at least"):
        model.resize_token_embeddings(258)
    assert model.resize_token_embeddings(259).num_embeddings == 259


@pytest.mark.parametrize("ids", [tokens(7), torch.zeros(2, 7)], ids=["one dimension", "floats"])
def test_ids_that_are_no_rows_of_integers(ids):
    with pytest.raises(InputError, match="input_ids must be integers, one row"):
        check_inputs(tiny_model().config, ids, None, None, tokens(2, 5), None, None)


@pytest.mark.parametrize("name", UNKNOWN)
def test_arguments_of_other_models(name: str):
    refuse_unknown({name: None, "use_cache": True})
    with pytest.raises(InputError, match=f"found {name} given"):
        refuse_unknown({name: torch.zeros(1)})


def test_tokenizers_numbers(tmp_path):
    texts = ["def greet(name):\n    return name\n" * 9]
    with pytest.raises(ConfigError, match="0 or more, found -1"):
        Qwen3EncoderDecoderTokenizer.train_from_texts(texts, 270, -1)
    tokenizer = Qwen3EncoderDecoderTokenizer.train_from_texts(texts, 270, 0)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="0 or more, found -1"):
        Qwen3EncoderDecoderTokenizer.from_pretrained(tmp_path, num_sentinel_tokens=-1)
    assert tokenizer.convert_ids_to_tokens(np.int64(3)) == tokenizer.convert_ids_to_tokens(3)
    assert tokenizer.decode(np.int64(3)) == tokenizer.decode(3)


@pytest.mark.parametrize("how", ["push", "save"])
def test_our_card_is_pushed(how: str, tmp_path, monkeypatch):
    cards = []

    class Made:
        repo_id = "someone/model"

    def commit(self, operations, **options):
        cards.extend(Path(o.path_or_fileobj).read_text() for o in operations if o.path_in_repo == "README.md")

    def none_there(*names, **options):
        raise EntryNotFoundError("no card")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, *names, **options: Made)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(hub.ModelCard, "load", none_there)
    if how == "push":
        tiny_model().push_to_hub("someone/model")
    else:
        tiny_model().save_pretrained(tmp_path / "model", push_to_hub=True)
    assert len(cards) == 1 and "# Qwen3 encoder-decoder" in cards[0] and "automatically generated" not in cards[0]
