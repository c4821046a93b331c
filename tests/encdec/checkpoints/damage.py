"""A small model that is trained and saved, and what may befall its checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from encdec.checkpoints import CheckpointManager
from encdec.training.schedule import Schedule


class Lab:
    """A small model with its optimizer and schedule, trained a few steps."""

    def __init__(self, seed: int = 0, width: int = 6) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(width, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        self.schedule = Schedule(peak=0.1, warmup_steps=2, total_steps=20, min_ratio=0.1, shape="cosine")
        self.width = width

    def step(self) -> float:
        torch.manual_seed(self.schedule.step)
        self.schedule.apply(self.optimizer)
        loss = self.model(torch.randn(4, self.width)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, manager: CheckpointManager, metrics: dict[str, float] | None = None) -> str:
        step = self.schedule.step
        state = {"samples_consumed": 8 * step, "seed": 1, "epoch": 0}
        return manager.save(self.model, self.optimizer, self.schedule, step, metrics, extra_state=state)

    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer, Schedule]:
        return self.model, self.optimizer, self.schedule


def flip(path: Path, position: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(content)


def payload(folder: Path) -> Path:
    return next((folder / "fsdp2").glob("*.distcp"))
