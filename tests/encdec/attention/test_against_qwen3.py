"""Every implementation against transformers' own Qwen3 with the same weights, padded batches included."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from tests.encdec.attention.batches import SHAPE, UNEVEN, tiny_model, tokens

MASK = torch.tensor([row for row in UNEVEN if row == sorted(row, reverse=True)])
"""Padded on the right: Qwen3 itself counts padding on the left as positions, unless it is told them."""


def causal_twin(stack: torch.nn.Module) -> Qwen3ForCausalLM:
    """transformers' decoder-only Qwen3 with the weights of one stack."""
    twin = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)).eval()
    twin.model.load_state_dict(stack.state_dict() | {"embed_tokens.weight": stack.embed_tokens.weight}, strict=True)
    return twin


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_encoder_with_a_causal_mask_gives_qwen3_hidden_states(masked):
    """By split, whose encoder kernel takes causality from ``is_causal``."""
    encoder, input_ids, mask = tiny_model("split").encoder, tokens(2, 9), MASK if masked else None
    expected = causal_twin(encoder).model(input_ids, attention_mask=mask).last_hidden_state
    kept = MASK.bool() if masked else torch.ones_like(MASK, dtype=torch.bool)
    bidirectional = encoder(input_ids, mask).last_hidden_state
    assert not torch.allclose(bidirectional[kept], expected[kept], atol=1e-2)
    for layer in encoder.layers:
        layer.self_attn.is_causal = True
    torch.testing.assert_close(encoder(input_ids, mask).last_hidden_state[kept], expected[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("attention", ["split", "sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("empty_by", ["no tokens", "mask"])
@torch.no_grad()
def test_decoder_with_an_empty_encoder_gives_qwen3_logits(attention, empty_by):
    model, ids = tiny_model(attention), tokens(2, 9)
    expected = causal_twin(model.decoder)(ids, attention_mask=MASK).logits
    if empty_by == "mask":
        encoder = {"input_ids": tokens(2, 5), "attention_mask": torch.zeros(2, 5)}
    else:
        encoder = {"encoder_outputs": BaseModelOutput(torch.zeros(2, 0, SHAPE["hidden_size"]))}
    logits = model(decoder_input_ids=ids, decoder_attention_mask=MASK, **encoder).logits
    torch.testing.assert_close(logits[MASK.bool()], expected[MASK.bool()], atol=1e-5, rtol=1e-5)
