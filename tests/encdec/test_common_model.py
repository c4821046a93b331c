"""What transformers asks of each of its models, re-expressed for ours: its ModelTesterMixin and GenerationTesterMixin
are not shipped."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from tests.encdec.tiny_model import FIRST_SENTINEL, PAD, SHAPE, padded, tiny_model, tokens

NO_END = 255  # a sentinel that a random model may write or not: generation then has one length
LAYERS, ENCODER_LAYERS, HEADS = SHAPE["num_hidden_layers"], SHAPE["num_encoder_layers"], SHAPE["num_attention_heads"]


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def batch() -> dict[str, torch.Tensor]:
    """Two examples of unequal length, and their labels."""
    ids, mask = padded([tokens(7), tokens(4)])
    labels = tokens(2, 5)
    labels[1, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class TestSavingAndLoading:
    def test_round_trip_through_the_auto_classes(self, tmp_path):
        model, inputs = tiny_model(), batch()
        model.generation_config.max_new_tokens = 7
        model.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config) is Qwen3EncoderDecoderConfig
        assert {name: config.to_dict()[name] for name in SHAPE} == SHAPE
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        assert type(loaded) is Qwen3ForSeq2SeqLM and not loaded.training
        assert loaded.generation_config.max_new_tokens == 7
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    def test_a_second_save_is_the_first_one(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "first")
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
        names = sorted(path.name for path in (tmp_path / "first").iterdir())
        assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
        for name in names:
            assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name

    def test_shards_hold_each_tensor_once(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        files = sorted(tmp_path.glob("model-*-of-*.safetensors"))
        assert len(files) > 3
        stored = []
        for path in files:
            with safe_open(path, framework="pt") as tensors:
                stored += list(tensors.keys())
        assert sorted(stored) == sorted(name for name, _ in model.named_parameters())
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        assert all(map(torch.equal, model.parameters(), loaded.parameters()))

    def test_dtype_is_kept_and_can_be_chosen(self, tmp_path):
        tiny_model().bfloat16().save_pretrained(tmp_path)
        assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        assert loaded.encoder.rotary_emb.inv_freq.dtype == torch.float32

    def test_a_missing_weight_is_told(self, tmp_path):
        model = tiny_model()
        state = model.state_dict()
        del state["decoder.norm.weight"]
        model.save_pretrained(tmp_path, state_dict=state)
        _, told = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
        assert set(told["missing_keys"]) == {"decoder.norm.weight"}
        assert not told["unexpected_keys"] and not told["mismatched_keys"]

    def test_tokenizer_comes_back_through_its_auto_class(self, tmp_path):
        tokenizer = Qwen3EncoderDecoderTokenizer.train_from_texts(["to be or not to be " * 50], 275, 8)
        tiny_model().save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert type(loaded) is Qwen3EncoderDecoderTokenizer
        assert loaded("to be <extra_id_3> be").input_ids == tokenizer("to be <extra_id_3> be").input_ids
        assert loaded.sentinel_ids == tokenizer.sentinel_ids

    @pytest.mark.parametrize("save_alone", [False, True])
    def test_loaded_onto_the_meta_device_first(self, tmp_path, save_alone):
        """`low_cpu_mem_usage`, the only way that transformers 5 loads: no parameter may be left there."""
        model = tiny_model()
        (model.decoder if save_alone else model).save_pretrained(tmp_path)
        loaded = type(model.decoder if save_alone else model).from_pretrained(tmp_path)
        assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


class TestOneMatrix:
    def storages(self, model: Qwen3ForSeq2SeqLM) -> set[int]:
        owners = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.get_input_embeddings())
        return {owner.weight.untyped_storage().data_ptr() for owner in owners}

    def test_one_storage_through_all_that_is_done_to_a_model(self, tmp_path):
        model = tiny_model()
        assert len(self.storages(model)) == 1
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
        assert len(self.storages(loaded)) == 1
        loaded.resize_token_embeddings(300, pad_to_multiple_of=64)
        assert len(self.storages(loaded)) == len(self.storages(copy.deepcopy(loaded))) == 1
        loaded.bfloat16().float().tie_weights()
        assert len(self.storages(loaded)) == 1
        assert loaded.shared.num_embeddings == loaded.config.vocab_size == loaded(**batch()).logits.shape[-1] == 320

    def test_resizing_keeps_the_rows_that_were_there(self):
        model = tiny_model()
        before = model.shared.weight.detach().clone()
        inputs = batch()
        expected = model(**inputs).logits
        model.resize_token_embeddings(300)
        assert torch.equal(model.shared.weight[:256], before)
        torch.testing.assert_close(model(**inputs).logits[..., :256], expected)
        model.resize_token_embeddings(256)
        assert torch.equal(model.shared.weight, before)
        model(**inputs).loss.backward()
        assert model.shared.weight.grad.shape == before.shape

    @pytest.mark.parametrize(("rows", "multiple"), [(255, None), (200, 8)])
    def test_sentinels_keep_their_rows(self, rows, multiple):
        model = tiny_model()
        with pytest.raises(ConfigError, match=r"must keep the rows of the sentinels .* 256 at least"):
            model.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
        assert model.config.vocab_size == 256
        model.resize_token_embeddings(255, pad_to_multiple_of=64)  # which makes 256
        assert model.shared.num_embeddings == 256

    def test_a_resized_model_comes_back(self, tmp_path):
        model = tiny_model()
        model.resize_token_embeddings(320)
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForSeq2SeqLM.from_pretrained(tmp_path).shared.weight, model.shared.weight)


class TestInitialisation:
    def test_matrices_are_drawn_and_norms_are_one(self):
        model = tiny_model(initializer_range=0.05, hidden_size=64, intermediate_size=128)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                assert (parameter == 1).all(), name
            else:
                assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
                assert abs(parameter.mean().item()) < 0.005, name

    def test_no_two_matrices_are_alike(self):
        matrices = [parameter for parameter in tiny_model().parameters() if parameter.ndim == 2]
        assert len({tuple(matrix.flatten()[:4].tolist()) for matrix in matrices}) == len(matrices)

    def test_it_is_built_without_memory(self):
        with torch.device("meta"):
            model = Qwen3ForSeq2SeqLM(Qwen3EncoderDecoderConfig(**SHAPE))
        assert all(parameter.is_meta for parameter in model.parameters())


class TestForward:
    def test_the_same_every_time(self):
        model, inputs = tiny_model(), batch()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)

    def test_dropout_of_attention_is_for_training_only(self):
        model, inputs = tiny_model(attention_dropout=0.5), batch()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert model(**inputs).loss != model(**inputs).loss

    def test_a_tuple_has_what_the_dictionary_has(self):
        model, inputs = tiny_model(), batch()
        named = model(**inputs, output_hidden_states=True)
        plain = model(**inputs, output_hidden_states=True, return_dict=False)
        assert type(plain) is tuple
        assert torch.equal(plain[0], named.loss) and torch.equal(plain[1], named.logits)
        assert len(plain) == len(named.to_tuple())

    def test_logits_are_left_out_where_training_needs_none(self):
        model, inputs = tiny_model(), batch()
        assert model(**inputs).logits is not None
        assert model(**inputs, return_logits=False).logits is None
        model.train()
        trained = model(**inputs)
        assert trained.logits is None and trained.loss.requires_grad
        whole = model(**inputs, return_logits=True)
        torch.testing.assert_close(trained.loss, whole.loss)
        flat = whole.logits.flatten(0, 1).float()
        torch.testing.assert_close(trained.loss, torch.nn.functional.cross_entropy(flat, inputs["labels"].flatten()))

    def test_logits_to_keep_are_the_last_ones(self):
        model, inputs = tiny_model(), batch()
        whole = model(**inputs)
        last = model(**inputs, logits_to_keep=2)
        torch.testing.assert_close(last.logits, whole.logits[:, -2:])
        assert torch.equal(last.loss, whole.loss)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_a_batch_is_its_examples_one_by_one(self, attention):
        model, rows, labels = tiny_model(), [tokens(9), tokens(3), tokens(6)], tokens(3, 5)
        model.set_attn_implementation(attention)
        ids, mask = padded(rows)
        together = model(ids, mask, decoder_input_ids=labels).logits
        for index, row in enumerate(rows):
            alone = model(row[None], decoder_input_ids=labels[index : index + 1]).logits[0]
            torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=1e-5)

    def test_the_encoder_may_be_padded_on_either_side(self):
        model, rows, labels = tiny_model(), [tokens(9), tokens(3)], tokens(2, 5)
        left, right = (model(*padded(rows, side), decoder_input_ids=labels).logits for side in ("left", "right"))
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)

    def test_the_decoder_may_be_padded_on_the_left(self):
        model, encoder, prompt = tiny_model(), tokens(2, 6), tokens(2, 3)
        plain = model(encoder, decoder_input_ids=prompt).logits
        ids, mask = (torch.nn.functional.pad(tensor, (2, 0), value=PAD) for tensor in (prompt, torch.ones_like(prompt)))
        shifted = model(encoder, decoder_input_ids=ids, decoder_attention_mask=mask).logits[:, 2:]
        torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=1e-4)

    def test_attention_implementations_agree_in_loss_and_gradients(self):
        inputs, found = batch(), {}
        for attention in ("sdpa", "eager"):
            model = tiny_model()
            model.set_attn_implementation(attention)
            loss = model(**inputs).loss
            loss.backward()
            found[attention] = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
        torch.testing.assert_close(found["sdpa"], found["eager"], atol=1e-5, rtol=1e-5)

    def test_encoder_outputs_stand_for_the_encoder(self):
        model, inputs = tiny_model(), batch()
        whole = model(**inputs)
        encoded = model.get_encoder()(inputs["input_ids"], inputs["attention_mask"])
        rest = {name: inputs[name] for name in ("attention_mask", "labels")}
        for given in (encoded, BaseModelOutput(encoded[0]), (encoded[0],)):
            assert torch.equal(model(**rest, encoder_outputs=given).logits, whole.logits)


class TestHiddenStatesAndAttentions:
    def eager(self) -> Qwen3ForSeq2SeqLM:
        model = tiny_model()
        model.set_attn_implementation("eager")
        return model

    def test_shapes_and_last_states(self):
        output = self.eager()(**batch(), output_hidden_states=True, output_attentions=True)
        assert [tuple(state.shape) for state in output.encoder_hidden_states] == [(2, 7, 48)] * (ENCODER_LAYERS + 1)
        assert [tuple(state.shape) for state in output.decoder_hidden_states] == [(2, 5, 48)] * (LAYERS + 1)
        assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
        assert [tuple(weight.shape) for weight in output.encoder_attentions] == [(2, HEADS, 7, 7)] * ENCODER_LAYERS
        assert [tuple(weight.shape) for weight in output.decoder_attentions] == [(2, HEADS, 5, 5)] * LAYERS
        assert [tuple(weight.shape) for weight in output.cross_attentions] == [(2, HEADS, 5, 7)] * LAYERS

    def test_one_softmax_over_both_kinds_of_keys(self):
        output = self.eager()(**batch(), output_attentions=True)
        for own, cross in zip(output.decoder_attentions, output.cross_attentions, strict=True):
            torch.testing.assert_close(own.sum(-1) + cross.sum(-1), torch.ones(2, HEADS, 5))
            assert (own.triu(1) == 0).all()  # no future
            assert (cross[1, :, :, 4:] == 0).all()  # no padding
            assert (cross[0] > 0).all()

    def test_nothing_is_kept_that_nobody_asked_for(self):
        output = tiny_model()(**batch())
        names = ("encoder_hidden_states", "decoder_hidden_states", "encoder_attentions", "decoder_attentions")
        assert [output.get(name) for name in names] == [None] * 4

    def test_gradients_of_hidden_states_and_attentions_can_be_retained(self):
        output = self.eager()(**batch(), output_hidden_states=True, output_attentions=True)
        watched = [output.encoder_hidden_states[0], output.decoder_hidden_states[0]]
        watched += [output.encoder_attentions[0]]
        for tensor in watched:
            tensor.retain_grad()
        output.loss.backward()
        assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in watched)

    def test_each_stack_alone(self):
        model, ids = self.eager(), tokens(2, 6)
        encoded = model.encoder(ids, output_hidden_states=True)
        assert len(encoded.hidden_states) == ENCODER_LAYERS + 1 and encoded.attentions is None
        decoded = model.decoder(ids, encoded[0], output_attentions=True)
        assert len(decoded.attentions) == len(decoded.cross_attentions) == LAYERS


class TestGeneration:
    ARGUMENTS = {"max_new_tokens": 8, "eos_token_id": NO_END}
    MODES = {
        "greedy": {"do_sample": False},
        "beam": {"do_sample": False, "num_beams": 3},
        "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7},
        "beam sampling": {"do_sample": True, "num_beams": 2},
    }

    @pytest.mark.parametrize("mode", list(MODES))
    def test_with_a_cache_as_without(self, mode):
        model = tiny_model()
        ids, mask = padded([tokens(7), tokens(3)])
        made = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            made.append(
                model.generate(ids, attention_mask=mask, use_cache=use_cache, **self.ARGUMENTS, **self.MODES[mode])
            )
        assert made[0].shape == (2, 9)
        assert len(set(made[0].flatten().tolist())) > 3  # a constant output would prove nothing
        assert made[0].tolist() == made[1].tolist()

    @pytest.mark.parametrize("mode", ["greedy", "beam"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_batch_as_its_examples(self, side, mode):
        model, rows = tiny_model(), [tokens(7), tokens(3), tokens(5)]
        ids, mask = padded(rows, side)
        together = model.generate(ids, attention_mask=mask, **self.ARGUMENTS, **self.MODES[mode])
        for index, row in enumerate(rows):
            alone = model.generate(row[None], **self.ARGUMENTS, **self.MODES[mode])
            assert together[index].tolist() == alone[0].tolist()

    def test_a_mask_is_made_of_the_padding_where_none_is_given(self):
        model = tiny_model()
        ids, mask = padded([tokens(7), tokens(3)])
        arguments = self.ARGUMENTS | {"do_sample": False}
        assert (
            model.generate(ids, **arguments).tolist() == model.generate(ids, attention_mask=mask, **arguments).tolist()
        )

    def test_it_goes_on_from_a_prompt(self):
        model, ids = tiny_model(), tokens(2, 6)
        whole = model.generate(ids, do_sample=False, **self.ARGUMENTS)
        prompt = whole[:, :4]
        rest = model.generate(ids, decoder_input_ids=prompt, do_sample=False, max_new_tokens=5, eos_token_id=NO_END)
        assert rest.tolist() == whole.tolist()

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_prompts_padded_on_the_left_as_prompts_alone(self, use_cache):
        model, encoder = tiny_model(), tokens(2, 6)
        start = torch.tensor([model.config.decoder_start_token_id])  # else generate puts it before rows without padding
        prompts = [torch.cat([start, tokens(length)]) for length in (4, 2)]
        ids, mask = padded(prompts, "left")
        arguments = self.ARGUMENTS | {"do_sample": False, "use_cache": use_cache}
        together = model.generate(encoder, decoder_input_ids=ids, decoder_attention_mask=mask, **arguments)
        for index, prompt in enumerate(prompts):
            alone = model.generate(encoder[index : index + 1], decoder_input_ids=prompt[None], **arguments)
            assert together[index, -8:].tolist() == alone[0, -8:].tolist()

    def test_scores_and_states_are_told(self):
        model, ids = tiny_model(), tokens(2, 6)
        told = model.generate(
            ids, do_sample=False, return_dict_in_generate=True, output_logits=True, output_hidden_states=True,
            **self.ARGUMENTS,
        )  # fmt: skip
        assert len(told.logits) == len(told.decoder_hidden_states) == 8
        assert torch.equal(torch.stack(told.logits, 1).argmax(-1), told.sequences[:, 1:])
        assert len(told.encoder_hidden_states) == ENCODER_LAYERS + 1

    def test_several_answers_to_one_question(self):
        made = tiny_model().generate(tokens(2, 6), do_sample=True, num_return_sequences=3, **self.ARGUMENTS)
        assert made.shape == (6, 9)

    def test_it_stops_at_the_end_token(self):
        model, ids = tiny_model(), tokens(1, 6)
        third = model.generate(ids, do_sample=False, **self.ARGUMENTS)[0, 3].item()
        made = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=third)
        assert made[0, -1] == third and made.shape[1] <= 4

    def test_in_bfloat16(self):
        made = tiny_model().bfloat16().generate(tokens(2, 6), do_sample=False, **self.ARGUMENTS)
        assert made.shape == (2, 9) and (made < 256).all()

    def test_the_defaults_are_the_models_own(self):
        assert isinstance(tiny_model().generation_config, GenerationConfig)
        config = tiny_model().generation_config
        assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 0)

    def test_logits_of_prompts_are_not_computed(self):
        """152 k numbers for each token of a long prompt, of which the last row alone is read."""
        model, widths = tiny_model(), []
        inner = model.forward
        model.forward = lambda *args, **kwargs: widths.append(kwargs["logits_to_keep"]) or inner(*args, **kwargs)
        model._supports_logits_to_keep = lambda: True  # the signature is the lambda's
        model.generate(tokens(1, 5), decoder_input_ids=tokens(1, 4), **self.ARGUMENTS)
        assert widths == [1] * 8


class TestTraining:
    def test_gradient_checkpointing_changes_nothing(self):
        inputs, found = batch(), []
        for checkpointing in (False, True):
            model = tiny_model().train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                assert model.is_gradient_checkpointing
            loss = model(**inputs).loss
            loss.backward()
            found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        torch.testing.assert_close(*found)

    def test_every_parameter_learns(self):
        model = tiny_model().train()
        model(**batch()).loss.backward()
        assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []

    def test_no_label_leaves_every_gradient_zero(self):
        model, inputs = tiny_model().train(), batch()
        loss = model(**inputs | {"labels": torch.full_like(inputs["labels"], -100)}).loss
        loss.backward()
        assert loss.item() == 0
        assert all((parameter.grad == 0).all() for parameter in model.parameters())

    @pytest.mark.filterwarnings("ignore")
    def test_compiled_it_is_one_graph_and_computes_the_same(self):
        """The loss in pieces among it, three of them."""
        model, inputs = tiny_model(num_encoder_layers=1, num_hidden_layers=1).train(), batch()
        expected = model(**inputs).loss
        expected.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model.max_logits_bytes = 4 * model.config.vocab_size * 4
        loss = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], gradients)


def test_sentinels_begin_where_the_lab_says():
    assert FIRST_SENTINEL == SHAPE["sentinel_start_id"] == tiny_model().config.sentinel_ids[0]
