"""How much of its GPUs a run uses: model FLOPs utilization, from what its plan says of the work and the GPUs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from encdec.flops import ACCELERATORS


@dataclass(frozen=True)
class Work:
    """What one step takes, and what the GPUs could do."""

    flops_per_step: float
    """Of all ranks, padding and layers that are computed again not counted."""
    peak_flops: float
    """Of all GPUs together, FLOP/s in bfloat16."""

    def mfu(self, step_seconds: float | None) -> float | None:
        """Model FLOPs utilization at that time a step, 0 to 1 (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        return self.flops_per_step / (step_seconds * self.peak_flops) if step_seconds else None


def read_work(plan: Path) -> Work | None:
    """What ``plan.json`` says; None on a CPU, and where it does not know the model's sizes or the kind of GPU."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
        values = json.loads(plan.read_text(encoding="utf-8"))
        forecast, ranks = values["forecast"], values["nodes"] * values["ranks_per_node"]
        peak = float(ranks * ACCELERATORS[forecast["gpu"]].bf16_flops)
        return Work(float(forecast["flops_per_step"]), peak) if peak > 0 else None
    return None
