"""How fast the 1 B model trains on one GPU: whole steps with FSDP2's mixed precision, clipping and AdamW."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.correctness import compile_layers, implementations
from benchmarks.model import now, peak_flops
from benchmarks.model_peers import SHAPES, Batch, batches, flops_of, ours
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.config import InfraConfig
from encdec.training.engines.fsdp2 import shard


@dataclass(frozen=True)
class Case:
    """One way to train."""

    attention: str
    checkpointing: bool
    compiled: bool

    def __str__(self) -> str:
        parts = [self.attention, "checkpointed" if self.checkpointing else "", "compiled" if self.compiled else ""]
        return ", ".join(filter(None, parts))


def cases(device: str, dtype: torch.dtype, *, compiled: bool) -> Iterator[Case]:
    """All implementations that never build the merged mask, each four ways, and the plain ones once."""
    for name in implementations(device, dtype):
        plain = name in ("eager", "sdpa")
        ways = [(True, False)] if plain else itertools.product((True, False), (False, True) if compiled else (False,))
        yield from (Case(name, checkpointing, compiled) for checkpointing, compiled in ways)


def time_steps(case: Case, size: str, given: list[Batch], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Median seconds of a whole step, and GB at the highest point. The first two steps are not timed.

    Needs a process group of one rank.
    """
    torch.manual_seed(0)
    peer = ours(SHAPES[size], case.attention, checkpointing=case.checkpointing)
    model = peer.model
    assert isinstance(model, Qwen3ForSeq2SeqLM)
    model.to(device)
    if case.compiled:
        compile_layers(model)
    shard(model, model.transformer_layers(), InfraConfig(device=device), dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for batch in given:
        began = now(device)
        loss = peer.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(now(device) - began)
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else None
    return {"step_s": statistics.median(seconds[2:]), "peak_gb": peak, "first_loss": losses[0], "last_loss": losses[-1]}


def measure(
    size: str, encoder_tokens: int, batch: int, steps: int, device: str, *, compiled: bool = True
) -> dict[str, Any]:
    """Every case, with tokens/s of real tokens and MFU; a case that does not fit says so."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    config = SHAPES[size]
    given = list(batches(config, encoder_tokens=encoder_tokens, size=batch, count=steps + 2, device=device))
    timed = given[2:]
    real = statistics.mean(int(b["attention_mask"].sum() + (b["labels"] != -100).sum()) for b in timed)
    flops, peak = flops_of(config, encoder_tokens) * batch, peak_flops(device, dtype)
    found: dict[str, Any] = {"encoder_tokens": encoder_tokens, "batch": batch, "real_tokens_a_step": round(real)}
    for case in cases(device, dtype, compiled=compiled):
        try:
            figures = time_steps(case, size, given, device, dtype)
        except torch.OutOfMemoryError:
            found[str(case)] = "does not fit"
        except Exception as error:  # a kernel's or a compiler's own: the other cases are still to be measured
            found[str(case)] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        else:
            step = figures["step_s"]
            rates = {"tokens_per_s": round(real / step), "mfu": round(flops / step / peak, 4)}
            found[str(case)] = rates | figures
        gc.collect()
        torch._dynamo.reset()
        if device != "cpu":
            torch.cuda.empty_cache()
    return found
