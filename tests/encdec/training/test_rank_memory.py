"""The estimate of a rank's memory against what FSDP2 really allocates on one rank of eight, counted by torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from encdec.adapters import add_adapters
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.estimates import LayerWidths, ModelSize, estimate_rank_memory
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.config import FullConfig
from encdec.training.engines.fsdp2 import shard
from encdec.training.model_options import LoraConfig
from encdec.training.optimizer import make_optimizer
from tests.many_ranks import use_one_server

RANKS, LAYERS, HIDDEN, HEADS, KEY_VALUE_HEADS, WIDTH = 8, 3, 128, 4, 2, 64
FEED_FORWARD, VOCABULARY, BATCH, ENCODER, DECODER = 384, 1024, 4, 64, 32


@dataclass(frozen=True)
class Case:
    """Call it in a process of its own."""

    checkpointing: bool = True
    accumulates: bool = True
    batch: int = BATCH
    optimizer: str = "adamw"
    strategy: str = "FULL_SHARD"
    dtype: torch.dtype = torch.bfloat16
    experts: int | None = None
    adapters: bool = False

    def __call__(self, index: int) -> None:
        from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.set_num_threads(1)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)  # one rank, the others pretended
        model, config = self.model(), FullConfig()
        config.infra.device, config.training.optimizer = "cpu", self.optimizer  # type: ignore[assignment]
        config.infra.fsdp_sharding_strategy = self.strategy  # type: ignore[assignment]
        size = size_of(model)
        shard(model, model.transformer_layers(), config.infra, self.dtype)
        optimizer = make_optimizer(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs(())
        inputs = torch.zeros(self.batch, ENCODER, dtype=torch.int64)
        batch = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": inputs[:, :DECODER]}
        with tracker:
            for last in [False, True] if self.accumulates else [True]:
                model.set_requires_gradient_sync(last)  # type: ignore[operator]
                model(**batch).loss.backward()
                tracker.reset_mod_stats()
            optimizer.step()
        measured = sum(row["Total"] for row in tracker.get_tracker_snapshot("peak").values()) / 1e9
        estimate = self.estimate(size)
        assert sum(estimate.values()) == pytest.approx(2 * estimate["total_gb"])
        most = 1.25 if self.adapters else 1.2  # counted is also what only gradients of frozen weights would be kept for
        assert 0.95 * measured < estimate["total_gb"] < most * measured, (measured, estimate)
        dist.destroy_process_group()

    def model(self) -> Qwen3ForSeq2SeqLM:
        shape = Qwen3EncoderDecoderConfig(
            vocab_size=VOCABULARY, num_sentinel_tokens=16, sentinel_start_id=VOCABULARY - 16, pad_token_id=0,
            eos_token_id=1, decoder_start_token_id=0, hidden_size=HIDDEN, intermediate_size=FEED_FORWARD,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEY_VALUE_HEADS, head_dim=WIDTH,
            num_experts=self.experts,
        )  # fmt: skip
        model = Qwen3ForSeq2SeqLM(shape)
        if self.adapters:
            add_adapters(model, LoraConfig(rank=4), 0)
        model.train()
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def estimate(self, size: ModelSize) -> dict[str, float]:
        return estimate_rank_memory(
            size, ranks=RANKS, micro_batch_size=self.batch, encoder_length=ENCODER, decoder_length=DECODER,
            bytes_per_value=self.dtype.itemsize, optimizer=self.optimizer, gradient_checkpointing=self.checkpointing,
            accumulates=self.accumulates, gathered_whole=self.strategy == "SHARD_GRAD_OP",
        )  # fmt: skip


def size_of(model: Any) -> ModelSize:
    layers = [parameter for layer in model.transformer_layers() for parameter in layer.parameters()]
    parameters, k = list(model.parameters()), model.config.num_experts_per_tok if model.config.num_experts else 0
    return ModelSize(
        parameters=sum(p.numel() for p in parameters),
        matrices=sum(p.numel() for p in layers if p.ndim >= 2 and p.requires_grad),
        embedding=VOCABULARY * HIDDEN, vocabulary=VOCABULARY, layers=LAYERS,
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        widths=LayerWidths(HIDDEN, HEADS * WIDTH, KEY_VALUE_HEADS * WIDTH, (k or 1) * FEED_FORWARD, k),
    )  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(accumulates=False),
        Case(checkpointing=False),
        Case(batch=32, accumulates=False),
        Case(optimizer="muon"),
        Case(strategy="SHARD_GRAD_OP", accumulates=False),
        Case(dtype=torch.float32),
        Case(experts=4),
        Case(experts=4, checkpointing=False),
        Case(experts=3, optimizer="muon"),
        Case(adapters=True),
        Case(adapters=True, checkpointing=False),
    ],
    ids=str,
)
def test_estimate_is_at_most_twenty_percent_above_what_a_rank_allocates(case: Case):
    use_one_server()
    torch.multiprocessing.start_processes(case, nprocs=1, start_method="forkserver")


def test_offloaded_state_is_not_the_devices():
    kept = Case().estimate(size_of(Case().model()))
    size = size_of(Case().model())
    offloaded = estimate_rank_memory(
        size, ranks=RANKS, micro_batch_size=BATCH, encoder_length=ENCODER, decoder_length=DECODER, bytes_per_value=2,
        optimizer="adamw", gradient_checkpointing=True, accumulates=True, offloaded=True,
    )  # fmt: skip
    assert offloaded["parameters_gb"] == offloaded["optimizer_gb"] == 0
    assert kept["parameters_gb"] == pytest.approx(4 * size.parameters / RANKS / 1e9)
    assert kept["total_gb"] - offloaded["total_gb"] == pytest.approx(12 * size.parameters / RANKS / 1e9)
