"""What can be known before a run is made is refused then, with the key's name, its value and what would do."""

from __future__ import annotations

import pytest

from encdec.errors import ConfigError
from encdec.training.execution import TrainingPhase
from encdec.training.rules import count_parameters, require_memory
from encdec.training.run_config import RunConfig, resolve_run
from encdec.vocabulary import smallest_vocabulary
from tests.conftest import MICRO

SENTINELS = 16
LEAST = smallest_vocabulary(SENTINELS)


def resolved(*settings: str) -> RunConfig:
    return resolve_run(TrainingPhase.SANITY_CHECK, config_file=MICRO, settings=settings)


# settings -> words of the message
REFUSED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("model.train_tokenizer_vocab_size=1",): ("model.train_tokenizer_vocab_size", "found 1.", f"Use {LEAST} or more"),
    (f"model.train_tokenizer_vocab_size={LEAST - 1}",): ("256 bytes", "num_sentinel_tokens=16", f"found {LEAST - 1}"),
    ("model.num_sentinel_tokens=300",): ("num_sentinel_tokens=300", "found 512", "Use 558 or more"),
    (f"model.train_tokenizer_vocab_size={2**31}",): ("model.train_tokenizer_vocab_size", "less than 2147483648"),
    ("model.num_sentinel_tokens=1_000_000_000",): ("model.num_sentinel_tokens", "less than or equal to 65536"),
    ("model.from_scratch.max_position_embeddings=63",): (
        "model.from_scratch.max_position_embeddings", "data.max_encoder_length=64", "data.max_decoder_length=64",
        "found 63", "Use 64 or more",
    ),
    ("data.max_decoder_length=129",): ("data.max_decoder_length=129", "found 128", "Use 129 or more"),
    (f"model.from_scratch.hidden_size={2**31}",): ("model.from_scratch.hidden_size", "less than"),
    ("model.from_scratch.head_dim=15",): ("head_dim must be even", "15"),
    ("training.seed=-1",): ("training.seed", "greater than or equal to 0", "-1"),
    (f"training.seed={2**64}",): ("training.seed", "less than 18446744073709551616"),
    (f"training.eval_samples={2**63}",): ("training.eval_samples", "less than 9223372036854775808"),
    (f"data.max_examples={2**63}",): ("data.max_examples", "less than 9223372036854775808"),
    ("data.preprocessing_num_workers=1_000_000",): ("data.preprocessing_num_workers", "less than or equal to 1024"),
    ("data.dataloader_num_workers=1_000_000",): ("data.dataloader_num_workers", "less than or equal to 1024"),
    ("data.validation_fraction=1.0",): ("data.validation_fraction", "less than 1"),
    ("data.ul2_task_weights=[1e308, 1e308, 0, 0, 0]",): ("data.ul2_task_weights", "1e+308"),
    ("model.tokenizer_name_or_path=./nowhere", "model.train_tokenizer_vocab_size=null"): (
        "model.tokenizer_name_or_path", "./nowhere", "no folder at /", "absolute",
    ),
    ("model.model_name_or_path=/nowhere", "model.from_scratch=null"): ("model.model_name_or_path", "found /nowhere"),
    ("infra.checkpoint_mirror=s3://me:secret@host/runs",): ("infra.checkpoint_mirror must hold no password", "me:***@"),
    ("infra.wandb_project=2020-13-45",): ("--set must be YAML", "2020-13-45"),
}  # fmt: skip


@pytest.mark.parametrize("settings", REFUSED, ids=lambda settings: settings[0])
def test_refused_before_anything_is_written(settings: tuple[str, ...]):
    with pytest.raises(ConfigError) as caught:
        resolved(*settings)
    for word in REFUSED[settings]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        (f"model.train_tokenizer_vocab_size={LEAST}",),
        ("model.from_scratch.max_position_embeddings=64",),  # encoder and decoder positions do not add up
        (f"training.seed={2**64 - 1}",),
        ("training.warmup_steps=1_000_000", "training.save_total_limit=1_000_000", "training.save_steps=1_000_000"),
    ],
    ids=lambda settings: settings[0],
)
def test_the_last_value_that_will_do(settings: tuple[str, ...]):
    resolved(*settings)


def test_model_too_large_for_the_node_is_refused():
    shape = resolved().config.model.from_scratch
    assert shape is not None
    assert count_parameters(shape, 512) == 35_072  # as counted at every start of the tests' runs
    largest = 512 * shape.hidden_size  # the embedding: each rank holds one whole parameter while it fills its shards
    share, node = 35_072 // 2, {"ranks": 2, "world_size": 2}
    require_memory(shape, 512, **node, on_host=True, memory=2 * 4 * (share + largest))
    require_memory(shape, 512, **node, on_host=False, memory=2 * 4 * largest)
    with pytest.raises(ConfigError, match="35,072 parameters over 2 ranks, 2 of them here"):
        require_memory(shape, 512, **node, on_host=True, memory=2 * 4 * (share + largest) - 1)
    with pytest.raises(ConfigError, match="must fit this node"):
        require_memory(shape, 512, **node, on_host=False, memory=2 * 4 * largest - 1)


def test_smallest_vocabulary_is_what_the_tokenizer_takes():
    """The plan's bound, which knows no tokenizer, and the tokenizer's own."""
    from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer

    tokenizer = Qwen3EncoderDecoderTokenizer.train_from_texts(["some text"], LEAST, SENTINELS)
    assert len(tokenizer) == LEAST
    with pytest.raises(ConfigError, match=f"Set vocab_size to {LEAST} or more"):
        Qwen3EncoderDecoderTokenizer.train_from_texts(["some text"], LEAST - 1, SENTINELS)
