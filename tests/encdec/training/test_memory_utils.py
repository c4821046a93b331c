"""Estimates against what a model really allocates, and the search for a batch that fits against a real allocator."""

from __future__ import annotations

import ctypes
import gc
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError, EncdecError
from encdec.estimates import FP32_BYTES, OPTIMIZER_BYTES, LayerWidths, activation_bytes, estimate_memory
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.config import FullConfig
from encdec.training.memory_utils import (
    auto_find_batch_size,
    clear_memory,
    estimate_model_memory,
    fits,
    get_memory_stats,
    halves,
    is_out_of_memory,
    log_memory_stats,
)
from encdec.training.optimizer import make_optimizer
from tests.many_ranks import in_ranks

VOCABULARY, BATCH, LENGTH, HIDDEN = 256, 2, 128, 128


def small_model(layers: int, dtype: torch.dtype, *, checkpointing: bool) -> Qwen3ForSeq2SeqLM:
    shape = Qwen3EncoderDecoderConfig(
        vocab_size=VOCABULARY, num_sentinel_tokens=16, sentinel_start_id=VOCABULARY - 16, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
    )  # fmt: skip
    model = Qwen3ForSeq2SeqLM(shape).to(dtype)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def batch_of(size: int) -> dict[str, Tensor]:
    ids = torch.randint(16, VOCABULARY - 20, (size, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def measured_peak(model: Qwen3ForSeq2SeqLM) -> int:
    """Bytes of all tensors alive at the worst moment of a step's second micro-batch, its optimizer's state among them.

    torch counts storages as they come and go: the same number every time.
    """
    optimizer = torch.optim.AdamW(model.parameters())
    model(**batch_of(BATCH)).loss.backward()
    optimizer.step()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        model(**batch_of(BATCH)).loss.backward()
    return sum(row["Total"] for row in tracker.get_tracker_snapshot("peak").values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [2, 4])
def test_estimate_is_within_ten_percent_of_the_peak(layers: int, checkpointing: bool, dtype: torch.dtype):
    model = small_model(layers, dtype, checkpointing=checkpointing)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    estimate = estimate_model_memory(
        parameters, BATCH, LENGTH, HIDDEN, 2 * layers, dtype, gradient_checkpointing=checkpointing
    )
    # this model's moments are in its own precision, without a copy of the weights in fp32
    estimate["optimizer_gb"] = 2 * dtype.itemsize * parameters / 1e9
    del estimate["total_gb"]
    # one piece of the loss: the head's product and its log-softmax in fp32; the head's gradient and its sum in fp32
    loss = VOCABULARY * (BATCH * LENGTH + HIDDEN) * (dtype.itemsize + FP32_BYTES)
    expected = 1e9 * sum(estimate.values()) + loss
    assert measured_peak(model) == pytest.approx(expected, rel=0.1)


def train_and_measure(optimizer: str, checkpointing: bool) -> None:
    """In a process of its own: the growth of its peak resident memory over two steps, as the kernel counts it."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: blocks that are freed go back at once
    train(optimizer, checkpointing, hidden=64)  # libraries take what they take at their first use
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here
    before = psutil.Process().memory_info().rss
    parameters = train(optimizer, checkpointing, hidden=384)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    measured = int(peak.split()[1]) * 1024 - before
    estimate = estimate_model_memory(parameters, 2, 256, 384, 4, torch.float32, optimizer, checkpointing)["total_gb"]
    assert 0.85 * measured < 1e9 * estimate < 1.2 * measured, (measured, estimate)


def train(optimizer: str, checkpointing: bool, hidden: int) -> int:
    """Two steps, gradients let go of after each; how many parameters it had."""
    config = FullConfig()
    config.training.optimizer = optimizer  # type: ignore[assignment]
    shape = Qwen3EncoderDecoderConfig(
        vocab_size=512, num_sentinel_tokens=16, sentinel_start_id=490, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=hidden // 4, max_position_embeddings=1024,
    )  # fmt: skip
    model = Qwen3ForSeq2SeqLM(shape)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stepper = make_optimizer(model, config)
    ids = torch.randint(16, 480, (2, 256))
    for _ in range(2):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        stepper.step()
        stepper.zero_grad()
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_is_near_the_memory_that_a_process_really_takes(optimizer: str, checkpointing: bool):
    in_ranks(1, train_and_measure, optimizer, checkpointing)


def test_estimate_has_its_parts_and_their_sum():
    estimate = estimate_model_memory(10**9, 4, 2048, 1024, 56)
    assert list(estimate) == ["model_gb", "optimizer_gb", "gradient_gb", "activation_gb", "total_gb"]
    assert estimate["model_gb"] == 2.0
    assert estimate["gradient_gb"] == 2.0
    assert estimate["optimizer_gb"] == 12.0  # ZeRO's paper: 2 + 2 + 12 bytes a parameter
    assert estimate["total_gb"] == pytest.approx(sum(list(estimate.values())[:4]))
    without = estimate_model_memory(10**9, 4, 2048, 1024, 56, gradient_checkpointing=False)
    assert without["activation_gb"] > 10 * estimate["activation_gb"]
    assert estimate_model_memory(10**9, 4, 2048, 1024, 56, optimizer="muon")["optimizer_gb"] == 8.0
    assert estimate_model_memory(10**9, 4, 2048, 1024, 56, torch.float32)["optimizer_gb"] == 8.0
    double = estimate_model_memory(10**9, 8, 2048, 1024, 56)
    assert double["activation_gb"] == pytest.approx(2 * estimate["activation_gb"])


def test_qwen3s_layer_is_counted_as_its_document_says():
    assert LayerWidths.like_qwen3(1).saved_bytes(1, 2) == 82
    assert activation_bytes(3, 0, LayerWidths.like_qwen3(8), 2, gradient_checkpointing=True) == 0


@pytest.mark.parametrize("change", [{"optimizer": "lion"}, {"bytes_per_value": 8}])
def test_estimate_knows_what_it_does_not_know(change: dict[str, object]):
    with pytest.raises(ConfigError, match=f"must be one of .*{'adamw' if 'optimizer' in change else '2, 4'}"):
        estimate_memory(1, 1, 1, 1, 1, **change)  # type: ignore[arg-type]
    assert set(OPTIMIZER_BYTES) >= {"adamw", "muon"}


def test_stats_are_those_of_this_machine(caplog: pytest.LogCaptureFixture):
    stats = get_memory_stats()
    if torch.cuda.is_available():
        assert stats.keys() == {"gpu_available", "allocated_gb", "reserved_gb", "max_allocated_gb"}
    else:
        assert stats == {"gpu_available": False}
    with caplog.at_level("INFO", "encdec.train"):
        log_memory_stats("after the first step")
    assert "after the first step: " in caplog.text
    clear_memory()


# ---- the search


class Hungry(nn.Module):
    """Asks for ``bytes_a_sample`` at each sample, forward or backward."""

    def __init__(self, bytes_a_sample: int, *, backward: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout()
        self.bytes_a_sample, self.backward_too = bytes_a_sample, backward
        self.seen: list[int] = []

    def forward(self, samples: Tensor) -> dict[str, Tensor]:
        self.seen.append(len(samples))
        assert self.training
        out = self.dropout(samples) * self.weight + torch.rand(())
        if self.backward_too:
            out.register_hook(lambda grad: self.ask(len(samples)) or grad)
        else:
            self.ask(len(samples))
        return {"loss": out}

    def ask(self, samples: int) -> None:
        torch.empty(samples * self.bytes_a_sample, dtype=torch.uint8)


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """Inside, this process may allocate ``more`` bytes: the allocator's refusal is a real one."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


GIB = 2**30


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("start", "found", "tried"),
    [(32, 4, [32, 16, 8, 4]), (4, 4, [4]), (20, 5, [20, 10, 5]), (7, 3, [7, 3])],
)
def test_halves_until_it_fits(start: int, found: int, tried: list[int], backward: bool):
    model = Hungry(GIB, backward=backward)
    with at_most(6 * GIB):
        assert auto_find_batch_size(model, lambda size: torch.ones(size), start) == found
    assert model.seen == tried


def test_leaves_no_trace():
    model = Hungry(GIB, backward=True)
    model.dropout.eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def sample(size: int) -> Tensor:
        return torch.rand(size) + random.random() + np.random.rand()

    with at_most(3 * GIB):
        assert auto_find_batch_size(model, sample, 8) == 2
    assert model.weight.grad is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_says_so_where_nothing_fits():
    model = Hungry(GIB, backward=False)
    with at_most(GIB), pytest.raises(EncdecError, match=r"smallest batch must fit.* with 3 samples"):
        auto_find_batch_size(model, lambda size: torch.ones(size), 8, 3)
    assert model.seen == [8, 4, 3]
    assert model.weight.grad is None


def test_real_model_takes_a_batch():
    model = small_model(1, torch.float32, checkpointing=True)
    assert auto_find_batch_size(model, batch_of, 2) == 2
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("start", "least"), [(0, 0), (4, 8), (4, 0)])
def test_impossible_sizes_are_refused(start: int, least: int):
    with pytest.raises(ConfigError, match="min_batch_size"):
        auto_find_batch_size(nn.Linear(1, 1), lambda size: torch.ones(size, 1), start, least)


@pytest.mark.parametrize(("start", "least", "sizes"), [(8, 1, [8, 4, 2, 1]), (9, 2, [9, 4, 2]), (9, 3, [9, 4, 3])])
def test_sizes_tried(start: int, least: int, sizes: list[int]):
    assert list(halves(start, least)) == sizes


def cpu_refuses() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def python_refuses() -> None:
    bytearray(2**50)


def gpu_refuses() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")  # no GPU here to refuse by itself


def dtensor_refuses() -> None:
    try:
        python_refuses()
    except MemoryError as error:
        raise RuntimeError("Sharding propagation failed") from error


@pytest.mark.parametrize("work", [cpu_refuses, python_refuses, gpu_refuses, dtensor_refuses])
def test_full_memory_is_known(work: Callable[[], None]):
    assert not fits(work)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("can't allocate memory")])
def test_other_errors_are_not_full_memory(error: Exception):
    def work() -> None:
        raise error

    assert not is_out_of_memory(error)
    with pytest.raises(type(error)):
        fits(work)
