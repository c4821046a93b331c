"""The optimizer, as the configuration asks for it."""

from __future__ import annotations

import torch
from torch import nn

from encdec.training.config import FullConfig


def make_optimizer(model: nn.Module, config: FullConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (none on biases and norms)."""
    training = config.training
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,  # one kernel over all parameters; unfused, DTensor's dispatch costs more than a tiny model's step
    )
