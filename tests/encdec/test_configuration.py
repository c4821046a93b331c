"""The configuration: where the sentinels go, and the rules it keeps."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, Qwen3Config

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError

SHAPE = {
    "vocab_size": 256, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}  # fmt: skip
IDS = {"decoder_start_token_id": 0, "sentinel_start_id": 246, "num_sentinel_tokens": 10}


def test_sentinels_take_the_rows_qwen3_leaves_unused():
    config = Qwen3EncoderDecoderConfig.from_qwen3_config(Qwen3Config(), num_sentinel_tokens=267)
    assert (config.vocab_size, config.sentinel_ids) == (151_936, range(151_669, 151_936))
    assert (config.pad_token_id, config.eos_token_id) == (151_643, 151_645)


def test_the_embedding_grows_to_a_multiple_of_64_where_rows_are_short():
    grown = Qwen3EncoderDecoderConfig.from_qwen3_config(Qwen3Config(), num_sentinel_tokens=268)
    assert (grown.vocab_size, grown.sentinel_start_id) == (152_000, 151_669)
    other = Qwen3EncoderDecoderConfig.from_qwen3_config(Qwen3Config(**SHAPE), num_sentinel_tokens=100)
    assert other.rope_parameters == SHAPE["rope_parameters"]
    assert (other.vocab_size, other.sentinel_start_id, other.decoder_start_token_id) == (384, 256, 0)


def test_overrides_win():
    config = Qwen3EncoderDecoderConfig.from_qwen3_config(Qwen3Config(), num_hidden_layers=3, num_encoder_layers=5)
    assert (config.num_hidden_layers, config.num_encoder_layers, len(config.layer_types)) == (3, 5, 3)


def test_round_trip(tmp_path):
    config = Qwen3EncoderDecoderConfig(**SHAPE, **IDS, num_encoder_layers=3)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is Qwen3EncoderDecoderConfig
    assert loaded.to_json_string() == config.to_json_string()


@pytest.mark.parametrize(
    ("changes", "rule", "values"),
    [
        ({"num_sentinel_tokens": 11}, "sentinels must fit", ["246", "256"]),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads", ["4 and 3"]),
        ({"eos_token_id": 0}, "must differ", ["0 and 0"]),
        ({"eos_token_id": [1, 2]}, "eos_token_id must be one id", ["[1, 2]"]),
        ({"pad_token_id": 250}, "no sentinel", ["250", "246"]),
        ({"decoder_start_token_id": 999}, "below vocab_size", ["999", "256"]),
        ({"head_dim": 15}, "even", ["15"]),
        ({"num_encoder_layers": 0}, "num_encoder_layers must be positive", ["0"]),
        ({"tie_word_embeddings": False}, "share one matrix", ["False"]),
        ({"use_sliding_window": True, "max_window_layers": 1}, "full attention", ["sliding_attention"]),
    ],
)
def test_broken_rules_are_named_with_their_values(changes, rule, values):
    with pytest.raises(ConfigError, match=rule) as caught:
        Qwen3EncoderDecoderConfig(**(SHAPE | IDS | changes))
    assert all(value in str(caught.value) for value in values)


def test_a_source_without_padding_is_refused():
    with pytest.raises(ConfigError, match="one pad_token_id"):
        Qwen3EncoderDecoderConfig.from_qwen3_config(Qwen3Config(**(SHAPE | {"pad_token_id": None})))
