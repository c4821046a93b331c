"""The model against transformers' own Qwen3, against itself by another route, and against leaks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSeq2SeqLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.modeling_qwen3_encdec import Qwen3DecoderLayer, Qwen3Encoder, Qwen3EncoderLayer, Qwen3ForSeq2SeqLM

SHAPE = {
    "vocab_size": 256, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}  # fmt: skip
IDS = {"decoder_start_token_id": 0, "sentinel_start_id": 246, "num_sentinel_tokens": 10}


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny_model(**changes) -> Qwen3ForSeq2SeqLM:
    """A random model, its weights large enough for differences to show."""
    model = Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig(**(SHAPE | IDS | {"initializer_range": 0.2} | changes)))
    return model.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, IDS["sentinel_start_id"], shape)


def causal_twin(stack: torch.nn.Module) -> Qwen3ForCausalLM:
    """transformers' decoder-only Qwen3 with the weights of one stack."""
    twin = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)).eval()
    weights = stack.state_dict() | {"embed_tokens.weight": stack.embed_tokens.weight}
    twin.model.load_state_dict(weights, strict=True)
    return twin


class TestAgainstQwen3:
    def test_encoder_with_a_causal_mask_gives_qwen3_hidden_states(self, monkeypatch):
        encoder, input_ids = tiny_model().encoder, tokens(2, 9)
        expected = causal_twin(encoder).model(input_ids).last_hidden_state
        assert not torch.allclose(encoder(input_ids).last_hidden_state, expected, atol=1e-2)  # bidirectional as it is
        for layer in encoder.layers:
            monkeypatch.setattr(layer.self_attn, "is_causal", True)
        torch.testing.assert_close(encoder(input_ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("empty_by", ["no tokens", "mask"])
    def test_decoder_with_an_empty_encoder_gives_qwen3_logits(self, empty_by, attention):
        model, decoder_input_ids = tiny_model(), tokens(2, 9)
        model.set_attn_implementation(attention)
        expected = causal_twin(model.decoder)(decoder_input_ids).logits
        if empty_by == "mask":
            input_ids = tokens(2, 5)
            encoder = {"input_ids": input_ids, "attention_mask": torch.zeros_like(input_ids)}
        else:
            encoder = {"encoder_outputs": BaseModelOutput(torch.zeros(2, 0, SHAPE["hidden_size"]))}
        logits = model(decoder_input_ids=decoder_input_ids, **encoder).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    def test_encoder_keys_get_no_position(self):
        model = tiny_model()
        hidden, decoder_input_ids = torch.randn(1, 6, SHAPE["hidden_size"]), tokens(1, 4)
        forward, backward = (
            model(encoder_outputs=(order,), decoder_input_ids=decoder_input_ids).logits
            for order in (hidden, hidden.flip(1))
        )
        torch.testing.assert_close(forward, backward, atol=1e-5, rtol=1e-5)

    def test_one_softmax_over_both_kinds_of_keys(self):
        """An encoder that repeats itself draws attention away from the decoder's own keys; two softmaxes would not."""
        model = tiny_model()
        hidden, decoder_input_ids = torch.randn(1, 6, SHAPE["hidden_size"]), tokens(1, 4)
        once = model(encoder_outputs=(hidden,), decoder_input_ids=decoder_input_ids).logits
        twice = model(encoder_outputs=(hidden.repeat(1, 2, 1),), decoder_input_ids=decoder_input_ids).logits
        assert (once - twice).abs().max() > 1e-2


class TestOneMatrix:
    def test_parameters_of_the_default_shape(self):
        with torch.device("meta"):
            model = Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig())
        assert sum(parameter.numel() for parameter in model.parameters()) == 1_036_517_376

    def test_one_module_one_name(self):
        model = tiny_model()
        assert model.shared is model.encoder.embed_tokens is model.decoder.embed_tokens
        names = [name for name, _ in model.named_parameters()]
        assert names[0] == "shared.weight"
        assert names == list(model.state_dict())
        assert [name for name in names if "embed" in name or "head" in name] == []

    def test_deep_copies_and_replacements_stay_tied(self):
        model = copy.deepcopy(tiny_model())
        model.resize_token_embeddings(320)
        assert model.shared is model.encoder.embed_tokens is model.decoder.embed_tokens
        assert model.shared.num_embeddings == model.config.vocab_size == 320
        model.set_input_embeddings(torch.nn.Embedding(320, SHAPE["hidden_size"]))
        assert model.shared is model.encoder.embed_tokens is model.decoder.embed_tokens
        assert len(model.state_dict()) == len(list(model.parameters()))

    def test_save_and_load_with_one_copy_in_the_file(self, tmp_path):
        model = tiny_model(num_encoder_layers=3)
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            assert sorted(file.keys()) == sorted(name for name, _ in model.named_parameters())
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        assert type(loaded) is Qwen3ForSeq2SeqLM
        assert loaded.shared is loaded.decoder.embed_tokens
        batch = {"input_ids": tokens(2, 5), "labels": tokens(2, 4)}
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=0, rtol=0)

    def test_encoder_saved_alone_is_complete(self, tmp_path):
        model, input_ids = tiny_model(), tokens(2, 5)
        model.encoder.save_pretrained(tmp_path)
        alone = Qwen3Encoder.from_pretrained(tmp_path)
        torch.testing.assert_close(alone(input_ids)[0], model.encoder(input_ids)[0], atol=0, rtol=0)


class TestLeaks:
    """Gradients with respect to inputs: exactly zero where nothing may flow, and not zero where it should."""

    @staticmethod
    def hidden_gradients(model, encoder_mask, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Size of d logits[:, position] / d encoder tokens [S_e] and / d decoder tokens [S_d]."""
        embedded = {}

        def keep(name):
            def hook(module, arguments, output):
                embedded[name] = output.detach().requires_grad_()
                return embedded[name]

            return hook

        input_ids, decoder_input_ids = tokens(1, encoder_mask.shape[1]), tokens(1, 6)
        handle = model.shared.register_forward_hook(keep("encoder"))
        encoder_outputs = model.encoder(input_ids, encoder_mask)
        handle.remove()
        handle = model.shared.register_forward_hook(keep("decoder"))
        logits = model(
            attention_mask=encoder_mask, decoder_input_ids=decoder_input_ids, encoder_outputs=encoder_outputs
        ).logits
        handle.remove()
        logits[:, position].square().sum().backward()
        return embedded["encoder"].grad.norm(dim=-1)[0], embedded["decoder"].grad.norm(dim=-1)[0]

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_neither_the_future_nor_padding_leaks(self, attention):
        model = tiny_model()
        model.set_attn_implementation(attention)
        mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
        encoder_gradient, decoder_gradient = self.hidden_gradients(model, mask, position=2)
        assert (encoder_gradient[4:] == 0).all()
        assert (encoder_gradient[:4] > 0).all()
        assert (decoder_gradient[3:] == 0).all()
        assert (decoder_gradient[:3] > 0).all()

    def test_padding_changes_nothing(self):
        model, input_ids, labels = tiny_model(), tokens(1, 5), tokens(1, 4)
        plain = model(input_ids, labels=labels)
        mask = torch.tensor([[1] * 5 + [0] * 3])
        padded_labels = torch.cat([labels, torch.full((1, 2), -100)], dim=1)
        padded = model(torch.cat([input_ids, tokens(1, 3)], dim=1), mask, padded_labels)
        torch.testing.assert_close(padded.logits[:, :4], plain.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(padded.loss, plain.loss, atol=1e-5, rtol=1e-5)

    def test_padded_decoder_positions_are_not_read(self):
        model, decoder_input_ids = tiny_model(), tokens(1, 6)
        mask = torch.tensor([[1, 0, 1, 1, 1, 1]])
        changed = decoder_input_ids.clone()
        changed[0, 1] = (changed[0, 1] + 1) % 200
        first, second = (
            model(tokens(1, 3).fill_(7), decoder_input_ids=ids, decoder_attention_mask=mask).logits
            for ids in (decoder_input_ids, changed)
        )
        torch.testing.assert_close(first[:, 2:], second[:, 2:], atol=0, rtol=0)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_an_example_without_any_token_stays_finite(self, attention):
        model, input_ids = tiny_model(), tokens(2, 5)
        model.set_attn_implementation(attention)
        mask = torch.tensor([[1] * 5, [0] * 5])
        output = model(input_ids, mask, labels=tokens(2, 4))
        output.loss.backward()
        assert output.logits.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class TestForward:
    def test_sdpa_agrees_with_eager(self):
        model, input_ids = tiny_model(), tokens(2, 7)
        batch = {"input_ids": input_ids, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
        batch["labels"] = tokens(2, 5)
        logits = {}
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            logits[attention] = model(**batch).logits
        torch.testing.assert_close(logits["sdpa"], logits["eager"], atol=1e-5, rtol=1e-5)

    def test_labels_are_shifted_right(self):
        labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
        shifted = tiny_model(decoder_start_token_id=3).prepare_decoder_input_ids_from_labels(labels)
        assert shifted.tolist() == [[3, 5, 6, 7], [3, 8, 1, 0]]

    def test_loss_is_the_sum_over_the_given_count(self):
        model, input_ids, labels = tiny_model(), tokens(2, 5), tokens(2, 4)
        labels[1, 2:] = -100
        mean = model(input_ids, labels=labels).loss
        logits = model(input_ids, labels=labels).logits
        kept = labels != -100
        expected = -logits.log_softmax(-1)[kept].gather(-1, labels[kept][:, None]).mean()
        torch.testing.assert_close(mean, expected)
        for count in (12, torch.tensor(12)):
            torch.testing.assert_close(model(input_ids, labels=labels, num_items_in_batch=count).loss, mean * 6 / 12)

    def test_no_label_no_loss_and_no_nan(self):
        loss = tiny_model()(tokens(1, 3), labels=torch.full((1, 4), -100)).loss
        assert loss.item() == 0

    def test_the_loss_is_float32_in_a_bfloat16_model(self):
        output = tiny_model().bfloat16()(tokens(1, 3), labels=tokens(1, 4))
        assert (output.logits.dtype, output.loss.dtype) == (torch.bfloat16, torch.float32)

    def test_the_start_token_can_learn(self):
        """The start token is the padding token, and an embedding with padding_idx would freeze its row."""
        model = tiny_model()
        start = torch.full((1, 1), model.config.decoder_start_token_id)
        model.decoder(start, torch.randn(1, 3, SHAPE["hidden_size"])).last_hidden_state[..., 0].sum().backward()
        assert model.shared.weight.grad[model.config.decoder_start_token_id].abs().sum() > 0

    def test_heads_may_be_wider_than_the_hidden_size(self):
        attention = tiny_model().decoder.layers[0].self_attn
        assert attention.q_proj.weight.shape == (4 * 16, 48)

    def test_missing_inputs_are_named(self):
        with pytest.raises(ValueError, match="input_ids or encoder_outputs"):
            tiny_model()(labels=tokens(1, 4))


class TestGenerate:
    def test_cached_equals_uncached(self):
        model, input_ids = tiny_model(num_encoder_layers=3), tokens(3, 7)
        mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])
        arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": 255}
        cached, uncached = (model.generate(input_ids, **arguments, use_cache=use) for use in (True, False))
        assert len(set(cached.flatten().tolist())) > 3  # a constant output would prove nothing
        assert cached.tolist() == uncached.tolist()

    def test_step_by_step_logits_equal_one_pass(self):
        model, input_ids, decoder_input_ids = tiny_model(), tokens(2, 7), tokens(2, 6)
        whole = model(input_ids, decoder_input_ids=decoder_input_ids).logits
        cache, steps = None, []
        for chunk in decoder_input_ids.split([1, 3, 2], dim=1):
            output = model(input_ids, decoder_input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)

    def test_the_encoders_keys_are_computed_once(self):
        model, widths = tiny_model(), []
        attention = model.decoder.layers[0].self_attn
        attention.k_proj.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
        model.generate(tokens(1, 7), max_new_tokens=4, do_sample=False, eos_token_id=255)
        assert widths == [1, 7, 1, 1, 1]

    def test_beam_search_runs(self):
        output = tiny_model().generate(tokens(2, 5), num_beams=3, max_new_tokens=4, eos_token_id=255)
        assert output.shape == (2, 5)


class TestTraining:
    @staticmethod
    def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        model.train().zero_grad()
        loss = model(tokens(2, 7), labels=tokens(2, 5)).loss
        loss.backward()
        full = {name: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for name, p in model.named_parameters()}
        return loss.detach(), {name: gradient.clone() for name, gradient in full.items()}

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_changes_no_gradient(self, reentrant):
        model = tiny_model()
        expected = self.loss_and_gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert all(layer.gradient_checkpointing for layer in model.transformer_layers())
        torch.testing.assert_close(self.loss_and_gradients(model), expected)

    def test_fully_shard_changes_no_gradient(self):
        model = tiny_model()
        expected = self.loss_and_gradients(model)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            for layer in model.transformer_layers():
                fully_shard(layer)
            fully_shard(model)
            assert model.shared is model.encoder.embed_tokens
            torch.testing.assert_close(self.loss_and_gradients(model), expected)
        finally:
            dist.destroy_process_group()

    def test_transformer_layers_in_order(self):
        layers = list(tiny_model(num_encoder_layers=3).transformer_layers())
        assert [type(layer) for layer in layers] == [Qwen3EncoderLayer] * 3 + [Qwen3DecoderLayer] * 2

    def test_initialisation_follows_the_global_generator(self):
        first, second = [], []
        for weights, seed in ((first, 3), (second, 3)):
            torch.manual_seed(seed)
            weights += tiny_model().parameters()
        assert all(map(torch.equal, first, second))
        torch.manual_seed(4)
        assert not torch.equal(first[0], tiny_model().shared.weight)
