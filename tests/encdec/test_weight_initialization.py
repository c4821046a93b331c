"""First weights: from a tiny Qwen3 saved here, and from a seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError, MissingPrerequisite
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.weight_initialization import (
    build_from_pretrained,
    build_from_scratch,
    initialize_from_qwen3,
    target_names,
)

SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}  # fmt: skip
IDS = {"decoder_start_token_id": 0, "sentinel_start_id": 300, "num_sentinel_tokens": 20}


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def saved_qwen3(directory: Path, max_shard_size: str = "1GB", **changes) -> Qwen3ForCausalLM:
    source = Qwen3ForCausalLM(Qwen3Config(**(SHAPE | changes))).eval()
    for parameter in source.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # so that no two norms are alike
    source.save_pretrained(directory, max_shard_size=max_shard_size)
    return source


class TestFromQwen3:
    def test_both_stacks_start_as_the_source(self, tmp_path):
        source = saved_qwen3(tmp_path)
        model = initialize_from_qwen3(tmp_path)
        expected = source.model.state_dict()
        rows = expected.pop("embed_tokens.weight")
        for stack in (model.encoder, model.decoder):
            torch.testing.assert_close(dict(stack.state_dict()), dict(expected), atol=0, rtol=0)
        assert torch.equal(model.shared.weight[: len(rows)], rows)
        assert model.encoder.layers[0].mlp.up_proj.weight is not model.decoder.layers[0].mlp.up_proj.weight

    def test_it_speaks_as_the_source_where_there_is_no_input(self, tmp_path):
        source, tokens = saved_qwen3(tmp_path), torch.randint(2, 320, (2, 7))
        model = initialize_from_qwen3(tmp_path).eval()
        logits = model(encoder_outputs=(torch.zeros(2, 0, 32),), decoder_input_ids=tokens).logits
        torch.testing.assert_close(logits[..., :320], source(tokens).logits, atol=1e-5, rtol=1e-5)

    def test_shards_and_an_untied_head(self, tmp_path):
        source = saved_qwen3(tmp_path, max_shard_size="40KB", tie_word_embeddings=False)
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        model = initialize_from_qwen3(tmp_path)
        assert torch.equal(model.shared.weight[:320], source.model.embed_tokens.weight)

    def test_sentinel_rows_resemble_the_others_and_are_the_same_each_time(self, tmp_path):
        saved_qwen3(tmp_path)
        first, again = initialize_from_qwen3(tmp_path).shared.weight, initialize_from_qwen3(tmp_path).shared.weight
        assert torch.equal(first, again)
        sentinels = first[320:]
        assert len(sentinels) == 128  # 100 sentinels, up to the next multiple of 64
        assert len(sentinels.unique(dim=0)) == len(sentinels)
        torch.testing.assert_close(sentinels.norm(dim=1).mean(), first[:320].norm(dim=1).mean(), rtol=0.1, atol=0)

    def test_the_global_generator_is_left_alone(self, tmp_path):
        saved_qwen3(tmp_path)
        before = torch.get_rng_state()
        initialize_from_qwen3(tmp_path)
        assert torch.equal(torch.get_rng_state(), before)

    def test_dtype_is_of_parameters_not_of_rotary_frequencies(self, tmp_path):
        saved_qwen3(tmp_path)
        model = initialize_from_qwen3(tmp_path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.encoder.rotary_emb.inv_freq.dtype == torch.float32

    def test_a_tokenizer_settles_the_ids(self, tmp_path):
        source = saved_qwen3(tmp_path)
        texts = [Path(json.__file__).read_text()]
        tokenizer = Qwen3EncoderDecoderTokenizer.train_from_texts(texts, 310, num_sentinel_tokens=10)
        model = initialize_from_qwen3(tmp_path, 10, tokenizer=tokenizer)
        assert model.config.vocab_size == 320  # the unused rows were enough
        assert model.config.sentinel_ids == range(300, 310)
        assert torch.equal(model.shared.weight[:300], source.model.embed_tokens.weight[:300])
        assert not torch.equal(model.shared.weight[300:310], source.model.embed_tokens.weight[300:310])
        with pytest.raises(ConfigError, match="10 in the tokenizer and 11 in the model"):
            initialize_from_qwen3(tmp_path, 11, tokenizer=tokenizer)


class TestStrictKeys:
    @staticmethod
    def edit(directory: Path, change) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    def test_an_unknown_key_is_refused(self, tmp_path):
        saved_qwen3(tmp_path)
        self.edit(tmp_path, lambda tensors: tensors.update({"model.layers_extra.weight": torch.ones(1)}))
        with pytest.raises(ConfigError, match="layers_extra"):
            initialize_from_qwen3(tmp_path)

    def test_a_missing_key_is_refused(self, tmp_path):
        saved_qwen3(tmp_path)
        self.edit(tmp_path, lambda tensors: tensors.pop("model.layers.1.self_attn.q_norm.weight"))
        with pytest.raises(ConfigError, match=r"decoder\.layers\.1\.self_attn\.q_norm\.weight"):
            initialize_from_qwen3(tmp_path)

    @pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
    def test_a_wrong_shape_is_refused(self, tmp_path, name):
        saved_qwen3(tmp_path)
        self.edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(33, 7)}))
        with pytest.raises(ConfigError, match=r"\(33, 7\)"):
            initialize_from_qwen3(tmp_path)

    def test_keys_left_out_are_named_in_the_map(self):
        assert target_names("lm_head.weight") == ()
        assert target_names("model.layers.0.self_attn.rotary_emb.inv_freq") == ()
        assert target_names("model.layers.12.mlp.up_proj.weight") == (
            "encoder.layers.12.mlp.up_proj.weight",
            "decoder.layers.12.mlp.up_proj.weight",
        )


class TestMissing:
    def test_no_such_place(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for name in (str(tmp_path / "absent"), "nobody/no-such-model"):
            with pytest.raises(MissingPrerequisite, match="without a network"):
                initialize_from_qwen3(name)

    def test_an_empty_directory(self, tmp_path):
        with pytest.raises(MissingPrerequisite, match=r"config\.json"):
            initialize_from_qwen3(tmp_path)

    def test_a_lost_shard(self, tmp_path):
        saved_qwen3(tmp_path, max_shard_size="40KB")
        lost = min(tmp_path.glob("*.safetensors"))
        lost.unlink()
        with pytest.raises(MissingPrerequisite, match=lost.name):
            initialize_from_qwen3(tmp_path)

    @pytest.mark.parametrize("ours", [True, False])
    def test_a_damaged_file(self, ours: bool, tmp_path):
        if ours:
            build_from_scratch(Qwen3EncoderDecoderConfig(**SHAPE, **IDS), 3).save_pretrained(tmp_path)
        else:
            saved_qwen3(tmp_path)
        file = min(tmp_path.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(MissingPrerequisite, match="can be read"):
            build_from_pretrained(tmp_path, tokenizer=None, num_sentinel_tokens=16)

    def test_another_architecture(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(ConfigError, match="llama"):
            initialize_from_qwen3(tmp_path)


class TestFromScratch:
    def weights(self, seed: int) -> torch.Tensor:
        model = build_from_scratch(Qwen3EncoderDecoderConfig(**SHAPE, **IDS), seed)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def test_the_seed_alone_decides(self):
        first = self.weights(3)
        torch.manual_seed(99)
        torch.randn(5)
        assert torch.equal(self.weights(3), first)
        assert not torch.equal(self.weights(4), first)

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        self.weights(3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_weights_are_as_the_config_says(self):
        model = build_from_scratch(Qwen3EncoderDecoderConfig(**SHAPE, **IDS, initializer_range=0.05), 0)
        assert model.shared.weight.std().item() == pytest.approx(0.05, rel=0.05)
        assert model.decoder.layers[1].mlp.down_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
        assert (model.encoder.norm.weight == 1).all()
        assert model(torch.ones(1, 2, dtype=torch.long), labels=torch.ones(1, 2, dtype=torch.long)).loss.isfinite()
