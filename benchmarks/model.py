"""Forward and backward of the model over its peers: time, memory, MFU; same shape, same batches, in turns.

    python -m benchmarks.model                  the small shape, on a CPU
    python -m benchmarks.model --size 1B        Qwen3-0.6B's shape, on a GPU

Peers: transformers' T5Gemma 2 of the same shape; separate cross-attention on our blocks; our own model with
cross-entropy over whole logits, and with padding computed; and our attention implementations among each other. Batches
are corrupted and padded as in training. MFU counts the FLOPs of real tokens in our model, whatever a peer computes,
over the peak of the GPU's data sheet, or, where there is none, over the fastest matrix product measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.model_peers import (
    SHAPES,
    Batch,
    Peer,
    batches,
    flops_of,
    ours,
    separate_cross_attention,
    t5gemma2,
    with_padding_computed,
    with_plain_loss,
)
from benchmarks.peers import emit
from encdec.attention.plan import IMPLEMENTATIONS, legal
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.flops import ACCELERATORS, accelerator_in

DEFAULTS = {"small": (256, 4, "float32"), "1B": (2048, 8, "bfloat16")}
"""Encoder tokens, samples of a batch, parameters' dtype."""


def peers_of(
    config: Qwen3EncoderDecoderConfig, attention: str, device: str, dtype: torch.dtype
) -> dict[str, Callable[[], Peer]]:
    """By name; each is built when its turn comes, for on a GPU they do not all fit."""
    others = [name for name in IMPLEMENTATIONS if legal(name, torch.device(device), dtype, config.head_dim)]
    return {
        "ours": lambda: ours(config, attention),
        **{f"ours, {name}": lambda name=name: ours(config, name) for name in others if name != attention},
        "sdpa, padding computed": lambda: with_padding_computed(ours(config, "sdpa")),
        "plain cross-entropy": lambda: with_plain_loss(ours(config, attention)),
        "separate cross-attention": lambda: separate_cross_attention(config),
        "T5Gemma 2": lambda: t5gemma2(config),
    }


def measure(
    build: Callable[[], Peer], given: list[Batch], device: str, dtype: torch.dtype, *, compiled: bool = False
) -> dict[str, Any]:
    """Median seconds of a step, peak bytes above the parameters and gradients, parameters, and the losses.

    Args:
        given: batches; the first is not timed.
    """
    torch.manual_seed(0)
    with torch.device(device):
        peer = build()
    peer.model.to(dtype)
    if compiled:
        peer.model.compile(dynamic=True)
    seconds, losses, peak = [], [], 0
    for number, batch in enumerate(given):
        with Peak(device) as memory:
            began = now(device)
            loss = peer.loss(batch)
            loss.backward()
            ended = now(device)
        losses.append(loss.item())
        if number:  # whose gradients were there before it began
            seconds.append(ended - began)
            peak = max(peak, memory.bytes)
    parameters = sum(parameter.numel() for parameter in peer.model.parameters() if parameter.grad is not None)
    return {"step_s": statistics.median(seconds), "peak_gb": peak / 1e9, "parameters": parameters, "losses": losses}


class Peak:
    """Bytes at the highest point within, above what was in use before."""

    def __init__(self, device: str) -> None:
        self._gpu = device != "cpu"
        self.bytes = 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
            self._before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        peak = torch.cuda.max_memory_allocated() if self._gpu else resident("VmHWM")
        self.bytes = max(0, peak - self._before)


def resident(field: str) -> int:
    """Bytes of this process, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def now(device: str) -> float:
    """Seconds, after all that the GPU has been given is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the data sheet, or of the fastest product of two matrices of 2,048 x 2,048 of a few."""
    known = accelerator_in(torch.cuda.get_device_name()) if device != "cpu" else None
    if known:
        return ACCELERATORS[known].bf16_flops
    a, best = torch.randn(2048, 2048, dtype=dtype, device=device), float("inf")
    for _ in range(5):
        began = now(device)
        _ = a @ a
        best = min(best, now(device) - began)
    return 2 * 2048**3 / best


def compare(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Figures of every peer, and ratios of ours over them."""
    config, dtype = SHAPES[arguments.size], getattr(torch, arguments.dtype)
    given = list(
        batches(
            config, encoder_tokens=arguments.encoder_tokens, size=arguments.batch, count=arguments.steps + 1,
            device=device,
        )
    )  # fmt: skip
    real = sum(int(b["attention_mask"].sum() + (b["labels"] != -100).sum()) for b in given[1:]) / arguments.steps
    flops, peak = flops_of(config, arguments.encoder_tokens) * arguments.batch, peak_flops(device, dtype)
    found: dict[str, list[dict[str, Any]]] = {}
    names = peers_of(config, arguments.attention, device, dtype)
    for number in range(arguments.rounds):
        turns = [*names][number % len(names) :] + [*names][: number % len(names)]  # nobody always follows the same one
        for name in turns:
            found.setdefault(name, []).append(measure(names[name], given, device, dtype))
            gc.collect()
    table = {}
    for name, rounds in found.items():
        step = statistics.median(each["step_s"] for each in rounds)
        table[name] = {
            "step_s": round(step, 5), "tokens_per_s": round(real / step), "mfu": round(flops / step / peak, 4),
            "peak_gb": round(max(each["peak_gb"] for each in rounds), 4), "parameters": rounds[0]["parameters"],
            "loss": round(rounds[0]["losses"][0], 5),
        }  # fmt: skip
    ratios = {
        name: {
            "step_time": round(table["ours"]["step_s"] / each["step_s"], 3),
            "peak_memory": round(table["ours"]["peak_gb"] / each["peak_gb"], 3) if each["peak_gb"] else None,
        }
        for name, each in table.items()
        if name != "ours"
    }
    return {
        "size": arguments.size, "device": device_name(device), "dtype": arguments.dtype, "batch": arguments.batch,
        "encoder_tokens": arguments.encoder_tokens, "real_tokens_a_step": round(real),
        "padded_tokens_per_real_token": round(padded(given[1:]) / real, 3), "peak_flops": peak,
        "peers": table, "ours_over": ratios,
    }  # fmt: skip


def padded(given: list[Batch]) -> float:
    """Tokens of a batch with its padding, the mean."""
    return statistics.mean(batch["input_ids"].numel() + batch["labels"].numel() for batch in given)


def device_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="small", help="shape (default: small)")
    parser.add_argument("--encoder-tokens", type=int, help="limit of the encoder's side; the decoder's is half of it "
                        "(default: 256 for small, 2048 for 1B)")  # fmt: skip
    parser.add_argument("--batch", type=int, help="samples of a step (default: 4 for small, 8 for 1B)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters (default: float32 for "
                        "small, bfloat16 for 1B)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a peer's turn (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every peer (default: 3)")
    parser.add_argument(
        "--attention", choices=IMPLEMENTATIONS, default="split", help="implementation in ours (default: split)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.rounds) < 1:
        parser.error("--steps and --rounds must be 1 or more")
    tokens, batch, dtype = DEFAULTS[arguments.size]
    arguments.encoder_tokens = arguments.encoder_tokens or tokens
    arguments.batch, arguments.dtype = arguments.batch or batch, arguments.dtype or dtype
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    with contextlib.suppress(KeyboardInterrupt):
        emit(compare(arguments, "cuda" if torch.cuda.is_available() else "cpu"), arguments.json)


if __name__ == "__main__":
    main()
