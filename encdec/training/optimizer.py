"""The optimizer, as the configuration asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from encdec.errors import CheckpointError
from encdec.training.config import FullConfig, TrainingConfig
from encdec.training.muon import MOMENTUM, Muon, MuonWithAdamW

ADAMW_STATE = frozenset({"step", "exp_avg", "exp_avg_sq"})
MUON_STATE = frozenset({MOMENTUM})


def make_optimizer(model: nn.Module, config: FullConfig) -> Optimizer:
    """AdamW with weight decay on matrices only (none on biases and norms); or Muon for the matrices of the layers and
    AdamW for the embedding, biases and norms, all at one learning rate.

    Args:
        model: for Muon it has ``transformer_layers()``.
    """
    training = config.training
    own = _layer_matrices(model) if training.optimizer == "muon" else []
    taken = {id(parameter) for group in own for parameter in group["params"]}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in others if dimensions(p) >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in others if dimensions(p) < 2], "weight_decay": 0.0},
    ]
    rest = [group for group in groups if group["params"]]
    if not own:
        return _adamw(rest, training)
    muon = Muon(own, training.learning_rate, weight_decay=training.weight_decay, momentum=training.muon_momentum)
    return MuonWithAdamW(muon, _adamw(rest, training) if rest else None)


def dimensions(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also where DeepSpeed has left nothing of it but its partition."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _layer_matrices(model: nn.Module) -> list[dict[str, Any]]:
    """What Muon steps, as its groups: matrices inside the transformer layers, and the stacked ones of experts."""
    layers = model.transformer_layers()  # type: ignore[operator]
    named = [pair for layer in layers for pair in layer.named_parameters() if pair[1].requires_grad]
    matrices = [p for _, p in named if dimensions(p) == 2]
    stacked = [(2 if name.endswith(".gate_up_proj") else 1, p) for name, p in named if dimensions(p) == 3]
    groups = [{"params": matrices, "blocks": 1}]
    groups += [{"params": [p for n, p in stacked if n == blocks], "blocks": blocks} for blocks in (1, 2)]
    return [group for group in groups if group["params"]]


def _adamw(groups: list[dict[str, Any]], training: TrainingConfig) -> AdamW:
    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,  # one kernel over all parameters; unfused, DTensor's dispatch costs more than a tiny model's step
    )


def require_own_state(optimizer: Optimizer) -> None:
    """State that was loaded must be of the kind that each parameter's optimizer keeps: AdamW's, or Muon's.

    Raises:
        CheckpointError: it is of another optimizer.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # what DeepSpeed has wrapped
    if not isinstance(optimizer, AdamW | MuonWithAdamW):
        return  # a user's own
    by_muon = {id(p) for group in optimizer.param_groups if "momentum" in group for p in group["params"]}
    for parameter, state in optimizer.state.items():
        wanted = MUON_STATE if id(parameter) in by_muon else ADAMW_STATE
        if state and state.keys() != wanted:
            raise CheckpointError(
                f"A checkpoint must hold the state of the run's optimizer, {', '.join(sorted(wanted))}",
                found=", ".join(sorted(state)),
                remedy="Resume with the training.optimizer it was made with",
            )
