"""Models that compute no padding against models that do, and each implementation against plain attention."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.model_peers import padding_computed
from encdec.attention.sequences import Sequences
from tests.encdec.attention.batches import (
    SHAPE,
    UNEVEN,
    loss_and_gradients,
    tiny_model,
    tokens,
    uneven_batch,
)  # fmt: skip

TRAINABLE = ["split", "sdpa", "eager"]


@pytest.mark.parametrize("attention", TRAINABLE)
class TestTheSameResult:
    def test_loss_and_gradients(self, attention):
        model, batch = tiny_model("eager"), uneven_batch()
        with padding_computed():
            expected = loss_and_gradients(model, batch)
        model.set_attn_implementation(attention)
        torch.testing.assert_close(loss_and_gradients(model, batch), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_with_activation_checkpointing(self, attention, reentrant):
        model, batch = tiny_model(attention), uneven_batch()
        expected = loss_and_gradients(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        torch.testing.assert_close(loss_and_gradients(model, batch), expected)

    def test_examples_without_any_token(self, attention):
        model, batch = tiny_model(attention), uneven_batch()
        batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
        loss, gradients = loss_and_gradients(model, batch)
        model.set_attn_implementation("eager")
        with padding_computed():
            expected = loss_and_gradients(model, batch)[0]
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_gives_the_same_hidden_states():
    """torch's has no backward pass on CPU: with gradients the model takes sdpa instead."""
    model, input_ids, decoder_input_ids = tiny_model("eager"), tokens(4, 9), tokens(4, 9)
    mask = torch.tensor(UNEVEN)
    results = {}
    with torch.no_grad():
        for attention in ("eager", "flex_attention"):
            model.set_attn_implementation(attention)
            encoded = model.encoder(input_ids, mask).last_hidden_state
            decoded = model.decoder(decoder_input_ids, encoded, mask.flip(0), mask).last_hidden_state
            results[attention] = encoded, decoded
    torch.testing.assert_close(results["flex_attention"], results["eager"], atol=1e-5, rtol=1e-5)
    batch = uneven_batch()
    found = loss_and_gradients(model, batch)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, loss_and_gradients(model, batch), atol=0, rtol=0)


@pytest.mark.parametrize("attention", TRAINABLE)
def test_layers_see_real_tokens_alone(attention):
    """Tokens that projections and feed-forward layers compute: all of the padded batch before, the real ones now."""
    model, batch, seen = tiny_model(attention), uneven_batch(), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[:-1].numel()))
    real = int(batch["attention_mask"].sum()), 7 + 3 + 7 + 1  # a row without labels keeps its first token
    model(**batch)
    assert set(seen) == set(real)
    seen.clear()
    with padding_computed():
        model(**batch)
    assert set(seen) == {4 * 9, 4 * 7}


def test_a_step_takes_less_time():
    """Three quarters of this batch are padding: even with what packing costs, less than 0.8 of the time is left."""
    model = tiny_model("sdpa", hidden_size=192, intermediate_size=768)
    mask = (torch.arange(96) < torch.tensor([96, 8, 8, 8, 8, 8, 8, 8])[:, None]).long()
    labels = tokens(8, 96).masked_fill(mask == 0, -100)
    batch = {"input_ids": tokens(8, 96), "attention_mask": mask, "labels": labels}

    def step() -> float:
        began = time.process_time()
        loss_and_gradients(model, batch)
        return time.process_time() - began

    step()
    packed = min(step() for _ in range(5))
    with padding_computed():
        padded = min(step() for _ in range(5))
    assert packed < 0.8 * padded


class TestLeaks:
    """Gradients of one token's hidden state with respect to embeddings, of which each position has its own row: exactly
    zero where nothing may flow, and not zero where it should."""

    MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]])

    @staticmethod
    def rows(first: int) -> torch.Tensor:
        """[3, 6] token ids, no two alike."""
        return torch.arange(first, first + 18).view(3, 6)

    @pytest.mark.parametrize("attention", TRAINABLE)
    @pytest.mark.parametrize("form", ["packed", "padded", "cached"])
    @pytest.mark.parametrize(("row", "position"), [(0, 2), (1, 4), (2, 3)])
    def test_neither_the_future_nor_padding_nor_a_neighbour(self, attention, form, row, position):
        model, mask = tiny_model(attention), self.MASK
        hidden = torch.randn(3, 6, SHAPE["hidden_size"], requires_grad=True)
        ids, cache = self.rows(20), None
        if form == "cached":
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with padding_computed() if form == "padded" else torch.enable_grad():
            decoded = model.decoder(ids, hidden, mask, mask.flip(0), cache).last_hidden_state
        decoded[row, position].square().sum().backward()
        of_encoder = hidden.grad.norm(dim=-1)
        of_decoder = model.shared.weight.grad.norm(dim=-1)[ids]
        sees = torch.zeros_like(mask)
        sees[row, : position + 1] = mask[row, : position + 1]
        assert torch.equal(of_decoder != 0, sees.bool())
        crossed = torch.zeros_like(mask)
        crossed[row] = mask.flip(0)[row]
        assert torch.equal(of_encoder != 0, crossed.bool())

    @pytest.mark.parametrize("attention", TRAINABLE)
    @pytest.mark.parametrize("form", ["packed", "padded"])
    def test_an_encoders_token_sees_its_own_sequence(self, attention, form):
        model, mask, ids = tiny_model(attention), self.MASK, self.rows(20)
        with padding_computed() if form == "padded" else torch.enable_grad():
            encoded = model.encoder(ids, mask).last_hidden_state
        encoded[1, 3].square().sum().backward()
        sees = torch.zeros_like(mask)
        sees[1] = mask[1]
        assert torch.equal(model.shared.weight.grad.norm(dim=-1)[ids] != 0, sees.bool())

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
    @torch.no_grad()
    def test_flex_attention_does_not_either(self):
        """No backward pass on CPU: so other tokens there must change no bit."""
        model, mask, hidden = tiny_model("flex_attention"), self.MASK, torch.randn(3, 6, SHAPE["hidden_size"])
        ids = self.rows(20)
        first = model.decoder(ids, hidden, mask, mask.flip(0)).last_hidden_state
        changed, other = ids.clone(), hidden.clone()
        changed[0, 3:], changed[1, :2], changed[2, 1] = 240, 241, 242
        other[mask.flip(0) == 0] = 7.0
        second = model.decoder(changed, other, mask, mask.flip(0)).last_hidden_state
        assert torch.equal(first[0, :3], second[0, :3])
        assert torch.equal(first[1, 2:], second[1, 2:])
        assert torch.equal(first[2, [0, 2, 3, 4, 5]], second[2, [0, 2, 3, 4, 5]])
        assert not torch.equal(first[0, 3], second[0, 3])


@pytest.mark.parametrize("attention", TRAINABLE)
class TestPositions:
    """Encoder keys get no RoPE, so a decoder's attention to them depends on its absolute positions."""

    def test_padding_on_the_left_changes_nothing(self, attention):
        model, encoded, ids = tiny_model(attention), torch.randn(1, 5, SHAPE["hidden_size"]), tokens(1, 4)
        expected = model(encoder_outputs=(encoded,), decoder_input_ids=ids).logits
        padded, mask = torch.cat([tokens(1, 3), ids], dim=1), torch.tensor([[0] * 3 + [1] * 4])
        for use_cache in (False, True):
            logits = model(
                encoder_outputs=(encoded,), decoder_input_ids=padded, decoder_attention_mask=mask, use_cache=use_cache
            ).logits
            torch.testing.assert_close(logits[:, 3:], expected, atol=1e-5, rtol=1e-5)
        shifted = model(encoder_outputs=(encoded,), decoder_input_ids=padded).logits
        assert (shifted[:, 3:] - expected).abs().max() > 1e-2  # without the mask they would be other positions

    def test_padding_on_the_left_of_the_encoder_is_exact(self, attention):
        model, ids = tiny_model(attention), tokens(1, 5)
        padded, mask = torch.cat([tokens(1, 3), ids], dim=1), torch.tensor([[0] * 3 + [1] * 5])
        expected = model.encoder(ids).last_hidden_state
        torch.testing.assert_close(model.encoder(padded, mask).last_hidden_state[:, 3:], expected, atol=0, rtol=0)

    def test_generation_from_prompts_padded_on_the_left(self, attention):
        model, input_ids = tiny_model(attention), tokens(2, 6)
        mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
        prompts = torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens(2, 4)], dim=1)
        prompt_mask = torch.tensor([[1] * 5, [0] * 2 + [1] * 3])
        prompts[1, :3] = torch.tensor([99, 99, 0])
        arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 255}
        together = model.generate(
            input_ids, attention_mask=mask, decoder_input_ids=prompts, decoder_attention_mask=prompt_mask, **arguments
        )
        alone = [
            model.generate(input_ids[:1], decoder_input_ids=prompts[:1], **arguments),
            model.generate(input_ids[1:, 2:], decoder_input_ids=prompts[1:, 2:], **arguments),
        ]
        assert len(set(together[:, 5:].flatten().tolist())) > 3
        assert together[:, -8:].tolist() == [row[0, -8:].tolist() for row in alone]


@pytest.mark.parametrize("attention", TRAINABLE)
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 3, 2], [2, 7]])
def test_cached_decoding_equals_one_pass(attention, chunks):
    """Over chunks of several tokens, and examples padded on either side and in between."""
    model, input_ids, ids, mask = tiny_model(attention), tokens(4, 9), tokens(4, 9), torch.tensor(UNEVEN)
    whole = model(input_ids, mask.flip(0), decoder_input_ids=ids, decoder_attention_mask=mask).logits
    cache, parts, done = None, [], 0
    for chunk in ids.split(chunks, dim=1):
        done += chunk.shape[1]
        output = model(
            input_ids, mask.flip(0), decoder_input_ids=chunk, decoder_attention_mask=mask[:, :done],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = output.past_key_values
        parts.append(output.logits)
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[kept], whole[kept], atol=1e-5, rtol=1e-5)


def test_a_cache_needs_masks_as_tensors():
    model, ids, mask = tiny_model(), tokens(4, 9), torch.tensor(UNEVEN)
    cache = model(ids, decoder_input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(TypeError, match="tensor of ones and zeros"):
        model.decoder(ids, torch.randn(4, 9, SHAPE["hidden_size"]), Sequences.from_mask(mask), mask, cache)


def test_a_copy_of_the_model_computes_alike():
    model, batch = tiny_model("split"), uneven_batch()
    torch.testing.assert_close(copy.deepcopy(model)(**batch).logits, model(**batch).logits, atol=0, rtol=0)


def test_dropout_in_attention_falls_back_to_what_has_it():
    model, batch = tiny_model("split", attention_dropout=0.5).train(), uneven_batch()
    first, second = model(**batch).loss, model(**batch).loss
    assert first != second
    encoded = BaseModelOutput(torch.randn(4, 3, SHAPE["hidden_size"]))
    decoded = [model.eval()(encoder_outputs=encoded, labels=batch["labels"]).loss for _ in range(2)]
    assert decoded[0] == decoded[1]
