"""The logits that a checkpoint gives under FSDP2: what an export must equal."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from encdec.checkpoints import CheckpointManager
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.files import RunPaths
from encdec.training.config import InfraConfig
from encdec.training.engines.fsdp2 import TorchEngine, shard
from encdec.weight_initialization import build_from_scratch
from tests.encdec.checkpoints.damage import Lab

RUN, LOGITS = "run", "logits.pt"


def example(vocab_size: int) -> dict[str, torch.Tensor]:
    """Encoder and decoder ids, each [3, 20]."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, vocab_size - 20, (3, 20), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def write_logits(folder: Path) -> None:
    """As one rank of ``run_ranks``: load step 60 of the run that ``folder/run`` links to."""
    run = RunPaths(folder / RUN)
    model = build_from_scratch(Qwen3EncoderDecoderConfig.from_pretrained(run.model), seed=11)
    shard(model, model.transformer_layers(), InfraConfig(device="cpu"), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    TorchEngine(model, optimizer).prove_sharding(dist.get_world_size())
    CheckpointManager(run.checkpoints).load(run.checkpoints / "step-60", model, optimizer, Lab().schedule)
    with torch.no_grad():
        logits = model.eval()(**example(model.config.vocab_size)).logits
    if dist.get_rank() == 0:
        torch.save(logits, folder / LOGITS)
