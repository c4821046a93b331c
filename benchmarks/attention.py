"""One training step (forward and backward) on UL2 batches: what padding costs, and what each attention takes.

    python -m benchmarks.attention --rounds 5
    python -m benchmarks.attention --device cuda --size 1B --dtype bfloat16

In turns, in one process, on the same batches: sdpa with padding computed, as before, and then every implementation that
this device and dtype allow, without. Prints tokens computed per real token, and times as ratios to the first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch

from encdec.attention.plan import IMPLEMENTATIONS, SDPA, legal
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.data.collator import UL2DataCollator
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.config import DataConfig
from encdec.weight_initialization import build_from_scratch

SIZES = {
    "tiny": {
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    },
    "small": {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    },
    "1B": {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
SENTINELS = range(1900, 2000)
PADDED = "sdpa, padding computed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model (default: tiny)")
    parser.add_argument("--raw-tokens", type=int, default=96, help="of a sample before corruption (default: 96)")
    parser.add_argument("--batch", type=int, default=8, help="samples (default: 8)")
    parser.add_argument("--batches", type=int, default=8, help="different batches (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="over all batches, for each peer (default: 5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default: float32)")
    given = parser.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    torch.set_num_threads(1)
    model = make_model(given.size).to(device, dtype).train()
    batches = [
        {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "labels")}
        for batch in make_batches(given.raw_tokens, given.batch, given.batches)
    ]
    names = [PADDED, *(name for name in IMPLEMENTATIONS if legal(name, device, dtype, model.config.head_dim))]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(given.rounds + 1):  # the first warms up
        for name in names:
            times[name].append(milliseconds(model, name, batches, device))
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    print(json.dumps({
        "tokens computed per real token": {"padded": round(padded_tokens(batches), 3), "packed": 1.0},
        "ms a step": {name: round(median, 2) for name, median in medians.items()},
        f"ratio to {PADDED}": {name: round(median / medians[PADDED], 3) for name, median in medians.items()},
    }, indent=2))  # fmt: skip


def make_model(size: str) -> Qwen3ForSeq2SeqLM:
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "sentinel_start_id": SENTINELS[0]}
    return build_from_scratch(
        Qwen3EncoderDecoderConfig(num_sentinel_tokens=len(SENTINELS), **ids, **SIZES[size]), seed=0
    )


def make_batches(raw_tokens: int, samples: int, number: int) -> list[dict[str, torch.Tensor]]:
    """UL2 batches of random tokens, in the configuration's own mix of tasks."""
    tokenizer = SimpleNamespace(sentinel_ids=list(SENTINELS), eos_token_id=1, pad_token_id=0)
    weights = DataConfig().ul2_task_weights
    collator = UL2DataCollator(tokenizer, 2 * raw_tokens, 2 * raw_tokens, task_weights=weights)
    generator = np.random.default_rng(0)
    return [
        collator([
            {"key": (0, index * samples + one), "tokens": generator.integers(2, SENTINELS[0], raw_tokens)}
            for one in range(samples)
        ])
        for index in range(number)
    ]  # fmt: skip


def padded_tokens(batches: list[dict[str, torch.Tensor]]) -> float:
    """Tokens of the padded batches for each real one."""
    real = sum(int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum()) for batch in batches)
    return sum(batch["input_ids"].numel() + batch["labels"].numel() for batch in batches) / real


def milliseconds(
    model: Qwen3ForSeq2SeqLM, name: str, batches: list[dict[str, torch.Tensor]], device: torch.device
) -> float:
    """Mean of one step."""
    model.set_attn_implementation(SDPA if name == PADDED else name)
    with padding_computed() if name == PADDED else contextlib.nullcontext():
        wait_for(device)
        began = time.perf_counter()
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()
        wait_for(device)
        return 1e3 * (time.perf_counter() - began) / len(batches)


@contextlib.contextmanager
def padding_computed() -> Iterator[None]:
    """Inside, hidden states stay padded, as they do where torch.compile takes in the whole model."""
    real = torch.compiler.is_compiling
    torch.compiler.is_compiling = lambda: True
    try:
        yield
    finally:
        torch.compiler.is_compiling = real


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
