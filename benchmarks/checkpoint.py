"""Saving the same training state (weights and AdamW's moments, fp32): our verified background save over its peers.

    python -m benchmarks.checkpoint --rounds 7

Peers, in turns, in the same processes: DCP's own async_save (its thread, on a group of its own), synchronous DCP,
accelerator.save_state (of the unsharded model: on CPU Accelerate does not shard), and torch.save of the gathered state.
Blocking is the time until training may go on, total the time until the last byte is written; ours is then hashed,
synced and committed, too. Figures are medians over the rounds of the slowest rank. Where there is a GPU, also the 1 B
model, and what a step costs while a checkpoint is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from benchmarks.peers import emit
from encdec import distributed
from encdec.checkpoints import CheckpointManager
from encdec.checkpoints.fsdp2 import training_tensors
from encdec.checkpoints.manifest import verify
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.training import sharding
from encdec.training.config import InfraConfig
from encdec.training.schedule import Schedule
from encdec.weight_initialization import build_from_scratch

SIZES = {
    "280MB": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "1B": {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
"""1B: the merged, tied encoder-decoder of Qwen3-0.6B's shape."""
Seconds = tuple[float, float]
"""(blocking, total) of one save."""


class Lab:
    """One rank's model and optimizer with full state, and a way to save for each peer."""

    def __init__(self, size: str, folder: Path, device: str) -> None:
        ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "sentinel_start_id": 8000}
        shape = Qwen3EncoderDecoderConfig(num_sentinel_tokens=16, **ids, **SIZES[size])
        model = build_from_scratch(shape, seed=0).to(device)
        self.device, self.folder, self.shown = device, folder, 0
        sharding.shard(model, model.transformer_layers(), InfraConfig(device=device), torch.float32)
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        step_without_data(self.model, self.optimizer)
        self.schedule = Schedule(peak=1e-3, warmup_steps=1, total_steps=10, min_ratio=0.1, shape="cosine")
        self.manager = CheckpointManager(folder / "ours", save_total_limit=1)
        self.step = 0
        self.group = distributed.background_group()
        self.unsharded: Any = None

    def next_folder(self, peer: str) -> Path:
        """A fresh folder for one save; the one before it is deleted."""
        if distributed.rank() == 0:
            for old in self.folder.glob(f"{peer}-*"):
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()
        self.step += 1
        return self.folder / f"{peer}-{self.step}"

    def ours(self) -> Seconds:
        self.step += 1
        began = time.perf_counter()
        self.manager.save(self.model, self.optimizer, self.schedule, self.step, blocking=False)
        blocking = time.perf_counter() - began
        self.manager.wait()
        return blocking, time.perf_counter() - began

    def dcp_async(self) -> Seconds:
        folder = self.next_folder("dcp_async")
        began = time.perf_counter()
        future = dcp.async_save(
            dict(training_tensors(self.model, self.optimizer)), checkpoint_id=folder, process_group=self.group
        )
        blocking = time.perf_counter() - began
        future.result()
        return blocking, time.perf_counter() - began

    def dcp_sync(self) -> Seconds:
        folder = self.next_folder("dcp_sync")
        began = time.perf_counter()
        dcp.save(dict(training_tensors(self.model, self.optimizer)), checkpoint_id=folder)
        seconds = time.perf_counter() - began
        return seconds, seconds

    def torch_save(self) -> Seconds:
        folder = self.next_folder("torch_save")
        began = time.perf_counter()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_state_dict(self.model, self.optimizer, options=options)
        if distributed.rank() == 0:
            folder.mkdir()
            torch.save(state, folder / "state.pt")
        dist.barrier()
        seconds = time.perf_counter() - began
        return seconds, seconds

    def accelerate(self) -> Seconds:
        if self.unsharded is None:
            self.unsharded = unsharded_with_accelerate(self.model, self.device)
        folder = self.next_folder("accelerate")
        dist.barrier()
        began = time.perf_counter()
        self.unsharded.save_state(str(folder))
        dist.barrier()
        seconds = time.perf_counter() - began
        return seconds, seconds


PEERS: dict[str, Callable[[Lab], Seconds]] = {
    "ours": Lab.ours,
    "dcp_async": Lab.dcp_async,
    "dcp_sync": Lab.dcp_sync,
    "accelerate": Lab.accelerate,
    "torch_save": Lab.torch_save,
}


def step_without_data(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step on made-up gradients: the optimizer has all its state after it."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def unsharded_with_accelerate(model: nn.Module, device: str) -> Any:
    """An Accelerator that has prepared an unsharded twin of ``model``."""
    from accelerate import Accelerator

    twin = type(model)(model.config).to(device)  # type: ignore[call-arg, arg-type]
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    accelerator = Accelerator(cpu=device == "cpu")
    accelerator.prepare(twin, optimizer)
    step_without_data(twin, optimizer)
    return accelerator


def unique_bytes(lab: Lab) -> int:
    """Bytes of every tensor that has to survive, each counted once."""
    return sum(t.numel() * t.element_size() for t in training_tensors(lab.model, lab.optimizer).values())


def slowest(seconds: Seconds) -> list[float]:
    """Over all ranks."""
    return [max(values) for values in zip(*distributed.gather(seconds), strict=True)]


def best_rate(work: Callable[[], object], nbytes: int, rounds: int = 3) -> float:
    """GB/s of the fastest of a few calls."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return nbytes / best / 1e9


def measure_reading(lab: Lab, nbytes: int) -> dict[str, float]:
    """GB/s of verifying and of loading the newest checkpoint, over ``cat`` of the same files."""
    folder = lab.manager.newest_valid()
    assert folder is not None
    shards = sorted(str(path) for path in folder.rglob("*") if path.is_file())
    load = best_rate(lambda: lab.manager.load(folder, lab.model, lab.optimizer, lab.schedule), nbytes)
    rates = distributed.on_rank_zero(
        lambda: {
            "verify": best_rate(lambda: verify(folder), nbytes),
            "cat": best_rate(lambda: subprocess.run(["cat", *shards], stdout=subprocess.PIPE, check=True), nbytes),
        }
    )
    return {
        "verify_over_cat": rates["verify"] / rates["cat"],
        "load_over_cat": load / rates["cat"],
        "cat_gb_per_s": rates["cat"],
    }


def measure_dip(lab: Lab, steps: int = 20) -> float:
    """Mean step time while a checkpoint is written over the mean of the same steps without."""

    def step() -> None:
        batch = torch.randint(0, 1000, (2, 512), device=lab.device)
        with torch.autocast("cuda", torch.bfloat16):
            lab.model(
                input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch, use_cache=False
            ).loss.backward()
        lab.optimizer.step()
        lab.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    def seconds_of(count: int) -> list[float]:
        found = []
        for _ in range(count):
            began = time.perf_counter()
            step()
            found.append(time.perf_counter() - began)
        return found

    seconds_of(3)
    without = statistics.mean(seconds_of(steps))
    lab.step += 1
    lab.manager.save(lab.model, lab.optimizer, lab.schedule, lab.step, blocking=False)
    beside: list[float] = []
    while lab.manager.flying and lab.manager.flying.writing:
        beside += seconds_of(1)
    lab.manager.wait()
    return statistics.mean(beside) / without if beside else 1.0


def run_rank(rank: int, ranks: int, size: str, device: str, rounds: int, folder: str) -> None:
    """One rank of one measurement; rank 0 leaves the figures in ``folder``/result.json."""
    warnings.filterwarnings("ignore")
    threads = max(1, torch.get_num_threads() // ranks)
    torch.set_num_threads(threads)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    lab = Lab(size, Path(folder), device)
    seconds: dict[str, list[list[float]]] = {name: [] for name in PEERS}
    for number in range(-1, rounds):  # the first round touches all memory and is not counted
        turns = [*PEERS][number % len(PEERS) :] + [*PEERS][: number % len(PEERS)]  # nobody always follows the same one
        for name in turns:
            dist.barrier()
            measured = slowest(PEERS[name](lab))
            if number >= 0:
                seconds[name].append(measured)
    unique = unique_bytes(lab)
    infos = lab.manager.list_checkpoints()
    result = {
        name: {"blocking_s": statistics.median(b for b, _ in each), "total_s": statistics.median(t for _, t in each)}
        for name, each in seconds.items()
    }
    ours = result["ours"]
    ratios = {
        f"{half}_over_{name}": ours[f"{half}_s"] / each[f"{half}_s"]
        for name, each in result.items()
        if name != "ours"
        for half in ("blocking", "total")
    }
    ratios["bytes_over_unique"] = infos[-1].bytes / unique
    ratios |= measure_reading(lab, infos[-1].bytes)
    if device == "cuda":
        ratios["step_time_while_writing_over_without"] = measure_dip(lab)
    if rank == 0:
        emit_to(Path(folder, "result.json"), {"state_mb": unique / 1e6, **result, "ratios": ratios})
    dist.barrier()
    dist.destroy_process_group()


def emit_to(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result))


def measure(ranks: int, size: str, device: str, rounds: int, parent: Path | None) -> dict[str, Any]:
    """Start the ranks and return what they found, rounded."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        multiprocessing.spawn(run_rank, (ranks, size, device, rounds, folder), nprocs=ranks)
        return rounded(json.loads(Path(folder, "result.json").read_text()))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="saves per peer (default: 7)")
    parser.add_argument("--folder", type=Path, help="where to save (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {}
    with contextlib.suppress(KeyboardInterrupt):
        for ranks in (1, 2):
            result[f"280MB, {ranks} ranks, cpu"] = measure(ranks, "280MB", "cpu", arguments.rounds, arguments.folder)
        if torch.cuda.is_available():
            result["1B, 1 rank, cuda"] = measure(1, "1B", "cuda", arguments.rounds, arguments.folder)
    emit(result, arguments.json)


if __name__ == "__main__":
    main()
