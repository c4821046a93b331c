"""Ranks that begin with their shards alone: the same values as a whole model's, and never much more memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from encdec import distributed
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.initialization.streams import Stream
from encdec.training.config import FullConfig
from encdec.training.engines import start_engine
from encdec.weight_initialization import (
    UnfilledModel,
    allocate,
    build_from_pretrained,
    build_from_scratch,
    initialize_from_qwen3,
    plan_from_pretrained,
    plan_from_scratch,
)
from tests.many_ranks import in_ranks

SHAPE = {
    "vocab_size": 321, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
IDS = {"decoder_start_token_id": 0, "sentinel_start_id": 300, "num_sentinel_tokens": 21}
LARGE = SHAPE | {"vocab_size": 4_096, "hidden_size": 512, "intermediate_size": 4_096, "num_hidden_layers": 4}
SEED = 7
MEGABYTE = 1 << 20


def config_of(engine: str) -> FullConfig:
    config = FullConfig()
    config.infra.distributed_type, config.infra.device, config.training.bf16 = engine, "cpu", False
    return config


def plan(kind: str, folder: Path) -> UnfilledModel:
    if kind == "scratch":
        return plan_from_scratch(Qwen3EncoderDecoderConfig(**SHAPE, **IDS), SEED)
    return plan_from_pretrained(folder / kind, 21)


def start(engine: str, planned: UnfilledModel) -> Any:
    return start_engine(
        planned.model, config_of(engine), device=torch.device("cpu"), dtype=torch.float32,
        micro_batch_size=1, accumulation_steps=1, stream=planned.weights.stream(),
    )  # fmt: skip


def whole_parameters(engine: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    if engine == "fsdp":
        return {name: p.full_tensor().detach() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def compare(engine: str, kind: str, folder: Path) -> None:
    planned = plan(kind, folder)
    model, started = planned.model, start(engine, planned)
    started.prove_sharding(distributed.world_size())
    wanted = torch.load(folder / f"{kind}.pt")
    found = whole_parameters(engine, model)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert model.encoder.embed_tokens is model.decoder.embed_tokens is model.shared
    for stack in (model.encoder, model.decoder):  # not persistent: nobody saves them, nothing may lose them
        rotary = type(stack.rotary_emb)(model.config)
        assert torch.equal(stack.rotary_emb.inv_freq, rotary.inv_freq) and rotary.inv_freq.device.type == "cpu"
    tokens = torch.arange(12).reshape(2, 6)
    loss = started.module(input_ids=tokens, labels=tokens + 2).loss
    assert abs(loss.item() - torch.load(folder / f"{kind}-loss.pt").item()) < 1e-5


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole models, made in this process."""
    folder = tmp_path_factory.mktemp("begun")
    torch.manual_seed(0)
    source = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False)).bfloat16()
    source.save_pretrained(folder / "qwen3", max_shard_size="40KB")
    build_from_scratch(Qwen3EncoderDecoderConfig(**SHAPE, **IDS), 1).save_pretrained(folder / "saved")
    models = {
        "scratch": build_from_scratch(Qwen3EncoderDecoderConfig(**SHAPE, **IDS), SEED),
        "qwen3": initialize_from_qwen3(folder / "qwen3", 21),
        "saved": build_from_pretrained(folder / "saved", 21, tokenizer=None),
    }
    for kind, model in models.items():
        torch.save({name: parameter.detach() for name, parameter in model.named_parameters()}, folder / f"{kind}.pt")
        tokens = torch.arange(12).reshape(2, 6)
        torch.save(model(input_ids=tokens, labels=tokens + 2).loss.detach(), folder / f"{kind}-loss.pt")
    return folder


KINDS = ("scratch", "qwen3", "saved")


@pytest.mark.parametrize(
    ("engine", "ranks", "kinds"),
    [
        ("fsdp", 1, KINDS), ("fsdp", 2, KINDS), ("fsdp", 4, KINDS),
        # a process can have one engine of DeepSpeed's
        ("deepspeed", 1, ("qwen3",)), ("deepspeed", 2, ("saved",)), ("deepspeed", 4, ("scratch",)),
    ],
)  # fmt: skip
def test_shards_hold_what_the_whole_model_would(begun: Path, engine: str, ranks: int, kinds: tuple[str, ...]):
    in_ranks(ranks, compare_all, engine, kinds, begun)


def compare_all(engine: str, kinds: tuple[str, ...], folder: Path) -> None:
    for kind in kinds:
        compare(engine, kind, folder)


def test_seeded_values_are_transformers_own():
    config = Qwen3EncoderDecoderConfig(**SHAPE, **IDS, initializer_range=0.05)
    wanted = allocate(config, torch.float32)
    torch.manual_seed(SEED)
    wanted.initialize_weights()
    found = build_from_scratch(config, SEED)
    for (name, one), (_, other) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_no_rank_holds_more_than_its_shards_and_a_parameter(engine: str):
    in_ranks(4, watch_memory, engine)


def watch_memory(engine: str) -> None:
    """The kernel's own count of this process's memory, its high-water mark set back before."""
    config = Qwen3EncoderDecoderConfig(**LARGE, **(IDS | {"sentinel_start_id": 4_000}))
    warm_up = plan_from_scratch(Qwen3EncoderDecoderConfig(**SHAPE, **IDS), SEED)  # imports, first allocations
    if engine == "fsdp":
        start(engine, warm_up)
    else:
        import accelerate
        import deepspeed

        assert accelerate and deepspeed
    planned = plan_from_scratch(config, SEED)
    parameters = dict(planned.model.named_parameters())
    total = sum(4 * parameter.numel() for parameter in parameters.values())
    largest = max(4 * parameter.numel() for parameter in parameters.values())
    used = []

    def watched(stream: Stream) -> Stream:
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        yield from stream
        used.append(memory("VmHWM") - before)  # not what an optimizer takes afterwards

    start(engine, planned._replace(weights=SimpleNamespace(stream=lambda: watched(planned.weights.stream()))))
    allowed = total / distributed.world_size() + 2 * largest + 36 * MEGABYTE  # of the heap, and of gloo's buffers
    assert total > 1.9 * allowed
    found = [f"{count / MEGABYTE:.0f}" for count in (*used, allowed, total)]
    assert used[0] < allowed, f"MB used, allowed, of the whole model: {', '.join(found)}"


def memory(field: str) -> int:
    """Bytes, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
