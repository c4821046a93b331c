"""What may not go into a model, and what is said about it."""

from __future__ import annotations

import pytest
import torch

from encdec.errors import EncdecError, InputError
from encdec.model_inputs import check_token_ids
from tests.encdec.tiny_model import SHAPE, padded, tiny_model, tokens

LONGEST = SHAPE["max_position_embeddings"]


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def with_id(ids: torch.Tensor, value: int) -> torch.Tensor:
    ids[1, 2] = value
    return ids


REFUSED = {
    "no input at all": ({"input_ids": None}, "give input_ids or encoder_outputs, and labels or decoder_input_ids"),
    "no decoder side": ({"labels": None}, r"give .*, found input_ids \[2, 7\], .* decoder_input_ids none"),
    "id too high": ({"input_ids": with_id(tokens(2, 7), 256)}, r"input_ids .* from 0 to 255, found 256 at \[1, 2\]"),
    "id too low": ({"input_ids": with_id(tokens(2, 7), -1)}, r"input_ids .* from 0 to 255, found -1 at \[1, 2\]"),
    "label too high": ({"labels": with_id(tokens(2, 5), 999)}, r"labels .* 255, or -100, found 999 at \[1, 2\]"),
    "label of another mark": ({"labels": with_id(tokens(2, 5), -1)}, r"labels .* or -100, found -1"),
    "decoder id too high": (
        {"labels": None, "decoder_input_ids": with_id(tokens(2, 5), 256)},
        "decoder_input_ids must hold token ids from 0 to 255",
    ),
    "input too long": ({"input_ids": tokens(2, 65), "attention_mask": None}, "no longer .*=64, found 65 tokens"),
    "target too long": ({"labels": tokens(2, 65)}, "decoder_input_ids must be no longer .*=64, found 65 tokens"),
    "empty decoder input": ({"labels": tokens(2, 0)}, "decoder_input_ids must have a token at least, found none"),
    "empty encoder input": (
        {"input_ids": tokens(2, 0), "attention_mask": None},
        "input_ids must have a token at least, found none. .* the end token",
    ),
    "two batches": ({"labels": tokens(3, 5)}, "must be of one batch, found 2 and 3 examples"),
    "mask of another length": (
        {"attention_mask": torch.ones(2, 6)},
        r"the shape of input_ids, \[2, 7\], found \[2, 6\]",
    ),
    "decoder mask of another length": (
        {"decoder_attention_mask": torch.ones(2, 4)},
        r"decoder_attention_mask must have the shape of the cache .*, \[2, 5\], found \[2, 4\]",
    ),
    "labels of another length": (
        {"decoder_input_ids": tokens(2, 4)},
        r"labels must have the shape of decoder_input_ids, \[2, 4\], found \[2, 5\]",
    ),
    "mask of other encoder outputs": (
        {"input_ids": None, "encoder_outputs": (torch.zeros(2, 9, 48),)},
        r"attention_mask must have the shape of encoder_outputs, \[2, 9\], found \[2, 7\]",
    ),
    "encoder outputs of another batch": (
        {"input_ids": None, "attention_mask": None, "encoder_outputs": (torch.zeros(1, 9, 48),)},
        "encoder_outputs and decoder_input_ids must be of one batch, found 1 and 2",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_with_rule_value_and_remedy(case: str):
    change, told = REFUSED[case]
    inputs = {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7), "labels": tokens(2, 5)}
    model = tiny_model()
    with pytest.raises(InputError, match=told) as caught:
        model(**(inputs | change))
    assert caught.value.remedy
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, EncdecError)


def test_the_cache_counts():
    model, encoder = tiny_model(), tokens(1, 3)
    cache = model(encoder, decoder_input_ids=tokens(1, LONGEST - 1), use_cache=True).past_key_values
    model(encoder, decoder_input_ids=tokens(1, 1), past_key_values=cache)
    with pytest.raises(InputError, match=r"the cache and .* max_position_embeddings=64, found 65 tokens"):
        model(encoder, decoder_input_ids=tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"inputs": with_id(tokens(2, 7), 300)}, "input_ids .* found 300"),
        ({"decoder_input_ids": with_id(tokens(2, 7), 300)}, "decoder_input_ids .* found 300"),
        ({"inputs": tokens(2, 65)}, "input_ids must be no longer"),
        ({"inputs": tokens(2, 0)}, "input_ids must have a token at least"),
    ],
    ids=["encoder", "decoder", "long", "empty"],
)
def test_generation_looks_before_it_begins(change, told):
    """On a GPU, too, where an id without a row would end the process's use of it."""
    model = tiny_model()
    model.forward = None  # it does not come to that
    with pytest.raises(InputError, match=told):
        model.generate(**({"inputs": tokens(2, 7), "max_new_tokens": 2} | change))


def test_a_static_cache_is_refused():
    with pytest.raises(InputError, match=r"found dict\. In generate, leave cache_implementation out"):
        tiny_model().generate(tokens(1, 5), max_new_tokens=2, cache_implementation="static")


def test_boundaries_are_inside():
    model = tiny_model()
    ids = tokens(2, LONGEST)
    ids[0, 0], ids[0, 1] = 0, 255
    labels = tokens(2, LONGEST)
    labels[0, 0], labels[0, 1], labels[0, 2] = 0, 255, -100
    assert model(ids, labels=labels).loss.isfinite()


def test_what_is_not_ids_is_not_looked_at():
    check_token_ids("scores", torch.full((2, 2), 1e9), 10)
    check_token_ids("nothing", torch.zeros(0, dtype=torch.long), 10)
    check_token_ids("meta", torch.zeros(2, dtype=torch.long, device="meta"), 10)


def test_encoder_outputs_without_a_mask_are_all_tokens():
    model, labels = tiny_model(), tokens(2, 5)
    ids, mask = padded([tokens(7), tokens(3)])
    encoded = model.encoder(ids, mask)
    bare = model(encoder_outputs=encoded, labels=labels).loss
    assert torch.equal(bare, model(encoder_outputs=encoded, attention_mask=torch.ones_like(mask), labels=labels).loss)
    assert bare != model(encoder_outputs=encoded, attention_mask=mask, labels=labels).loss
