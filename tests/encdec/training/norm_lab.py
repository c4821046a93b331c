"""Gradient norms of sharded parameters against those of whole ones, to be called in ranks (tests.many_ranks)."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from encdec import distributed
from encdec.training.config import InfraConfig
from encdec.training.engines.fsdp2 import shard
from encdec.training.monitor import compute_gradient_norm


def compare() -> None:
    """Under FSDP2 (uneven shards, a rank with none), and where a gradient is held whole, or in parts to be added."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1), nn.Linear(1, 7))
    whole = copy.deepcopy(model)
    shard(model, list(model), InfraConfig(device="cpu"), torch.float32)
    assert compute_gradient_norm(model) == 0.0
    inputs = torch.randn(4, 5)
    for each in (model, whole):
        each(inputs).square().sum().backward()
    expected = compute_gradient_norm(whole)
    assert expected > 0.1
    assert math.isclose(compute_gradient_norm(model), expected, rel_tol=1e-5)
    own = sum(float(p.grad.to_local().square().sum()) for p in model.parameters())
    assert not math.isclose(math.sqrt(own), expected, rel_tol=1e-3)  # a rank's own part is not the norm

    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    for placement, norm in ((Replicate(), 6.0), (Partial(), 6.0 * distributed.world_size())):
        parameter = nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Replicate()]))
        parameter.grad = DTensor.from_local(torch.full((4,), 3.0), mesh, [placement])
        assert math.isclose(compute_gradient_norm(nn.ParameterList([parameter])), norm, rel_tol=1e-6)
