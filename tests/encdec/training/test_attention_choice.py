"""The attention of a run: by rule on CPU, by measurement elsewhere, recorded, and taken from the record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from encdec import distributed
from encdec.attention.plan import SPLIT
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError
from encdec.files import RunPaths
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.records import JsonLinesWriter, event, read_json_lines
from encdec.training import attention_choice
from encdec.training.attention_choice import Shape, attention_by_rule, disagreement, measure, settle_attention
from encdec.training.config import FullConfig
from encdec.training.run_config import resolve_run
from tests.conftest import MICRO
from tests.encdec.training.engine_lab import Made, Scene, farthest
from tests.many_ranks import in_ranks

CPU, SHAPE = torch.device("cpu"), Shape(40, 24, heads=4, kv_heads=2, head_dim=16)


def micro(*settings: str) -> FullConfig:
    return resolve_run(None, config_file=MICRO, settings=list(settings)).config


def model_of(config: FullConfig) -> Qwen3ForSeq2SeqLM:
    assert config.model.from_scratch is not None
    return Qwen3ForSeq2SeqLM(
        Qwen3EncoderDecoderConfig(
            vocab_size=512, num_sentinel_tokens=16, sentinel_start_id=496, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0, **config.model.from_scratch.model_dump(),
        )
    )  # fmt: skip


def settle(config: FullConfig, paths: RunPaths, attempt: int) -> str:
    model = model_of(config)
    name = settle_attention(model, config, paths, attempt, device=CPU, dtype=torch.float32)
    assert {name} == {stack.config._attn_implementation for stack in (model, model.encoder, model.decoder)}
    return name


def written(paths: RunPaths, attempt: int) -> list[dict]:
    lines = read_json_lines(paths.attempt(attempt).events("rank-0"))
    return [line for line in lines if line["event"] == attention_choice.EVENT]


class TestByRule:
    LONG = (
        "data.max_encoder_length=256",
        "data.max_decoder_length=128",
        "model.from_scratch.max_position_embeddings=256",
    )

    def test_on_cpu_long_sequences_are_split(self):
        assert attention_by_rule(micro()) == "sdpa"
        assert attention_by_rule(micro(*self.LONG)) == "split"

    def test_a_name_is_taken_at_its_word(self):
        assert attention_by_rule(micro("model.attn_implementation=flex_attention")) == "flex_attention"
        assert attention_by_rule(micro("model.use_flash_attention=false")) == "eager"

    def test_contradictions_are_refused(self):
        with pytest.raises(ConfigError, match="remove one of the two"):
            micro("model.use_flash_attention=false", "model.attn_implementation=split")
        with pytest.raises(ConfigError, match="attn_implementation"):
            micro("model.attn_implementation=flash")


class TestSettled:
    def test_the_choice_is_written_down_and_taken_up(self, tmp_path):
        paths = RunPaths(tmp_path)
        first = paths.claim_attempt()
        assert settle(micro(*TestByRule.LONG), paths, first) == "split"
        (line,) = written(paths, first)
        assert (line["implementation"], line["device"], line["dtype"]) == ("split", "cpu", "float32")
        second = paths.claim_attempt()
        assert settle(micro(), paths, second) == "split"  # by itself it would be sdpa
        assert written(paths, second) == []

    def test_what_another_device_chose_does_not_count(self, tmp_path):
        paths = RunPaths(tmp_path)
        attempt = paths.claim_attempt()
        with JsonLinesWriter(paths.attempt(attempt).events("rank-0")) as ledger:
            ledger.write(event(attention_choice.EVENT, implementation=SPLIT, device="cuda", dtype="float32"))
        assert settle(micro(), paths, attempt) == "sdpa"

    def test_what_cannot_train_here_is_refused(self, tmp_path):
        paths = RunPaths(tmp_path)
        with pytest.raises(ConfigError, match=r"flex_attention must be able.*\n?.*cpu"):
            settle(micro("model.attn_implementation=flex_attention"), paths, paths.claim_attempt())

    def test_a_measurement_decides_where_there_is_one(self, tmp_path, monkeypatch):
        monkeypatch.setattr(attention_choice, "measured_on", lambda device: True)
        found = {"milliseconds": {"sdpa": 2.0, "split": 1.0}, "passed_over": {"flex_attention": "no"}}
        monkeypatch.setattr(attention_choice, "measure", lambda *_: found)
        paths = RunPaths(tmp_path)
        attempt = paths.claim_attempt()
        assert settle(micro(), paths, attempt) == "split"
        assert written(paths, attempt)[0]["milliseconds"] == found["milliseconds"]
        assert written(paths, attempt)[0]["passed_over"] == found["passed_over"]


class TestMeasured:
    def test_candidates_are_timed_and_others_named(self):
        found = measure(SHAPE, CPU, torch.float32)
        assert set(found["milliseconds"]) == {"split", "sdpa"}
        assert all(time > 0 for time in found["milliseconds"].values())
        assert set(found["passed_over"]) == {"flex_attention"}

    def test_dropout_leaves_what_has_it(self):
        found = measure(Shape(40, 24, 4, 2, 16, dropout=0.1), CPU, torch.float32)
        assert set(found["milliseconds"]) == {"sdpa"}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_all_candidates_agree_with_plain_attention(self, dtype):
        for name in ("split", "sdpa"):
            error, bound = disagreement(name, SHAPE, CPU, dtype)
            assert error <= bound

    def test_a_wrong_result_is_passed_over(self, monkeypatch):
        real = attention_choice.attend_merged

        def attend(module, plan, *given):
            attended, weights = real(module, plan, *given)
            return attended * (1.01 if plan.implementation == "split" else 1), weights

        monkeypatch.setattr(attention_choice, "attend_merged", attend)
        found = measure(SHAPE, CPU, torch.float32)
        assert set(found["milliseconds"]) == {"sdpa"}
        assert found["passed_over"]["split"].startswith("off by")

    def test_a_kernel_that_fails_is_passed_over(self, monkeypatch):
        def attend(module, plan, *given):
            raise RuntimeError("no kernel image is available")

        monkeypatch.setattr(attention_choice, "attend", attend)
        found = measure(SHAPE, CPU, torch.float32)
        assert found["milliseconds"] == {}
        assert found["passed_over"]["sdpa"] == "RuntimeError: no kernel image is available"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made.make(tmp_path_factory.mktemp("made"))


class SettlesAlike:
    """Call it in every rank: rank 0's choice is everybody's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        attention_choice.attention_by_rule = lambda config: ["split", "eager"][distributed.rank()]
        paths = RunPaths(self.folder)
        attempt = distributed.on_rank_zero(paths.claim_attempt)
        assert settle(micro(), paths, attempt) == "split"


def test_all_ranks_take_rank_0s(tmp_path):
    in_ranks(2, SettlesAlike(tmp_path))


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_sharded_training_by_split_is_training_by_sdpa(made, tmp_path, engine):
    """Packed tokens of uneven number on two ranks, with activation checkpointing under FSDP2 and ZeRO-3."""
    scenes = []
    for name in ("sdpa", "split"):
        (root := tmp_path / name).mkdir()
        settings = [f"model.attn_implementation={name}", "infra.fsdp_activation_checkpointing=true"]
        scenes.append(Scene(made, engine, root, steps=4, settings=settings))
        in_ranks(2, scenes[-1])
    assert farthest(*scenes) < 1e-5
