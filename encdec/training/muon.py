"""Muon for matrices that may be sharded: torch's own arithmetic, each matrix whole on one rank while it is needed.

torch.optim.Muon takes sharded matrices (DTensors), too, but then multiplies their parts in bfloat16 and adds those up
over the ranks: on two ranks its step differs from that on one by some percent of its largest element. So here a matrix
travels to one rank, is orthogonalised there by torch.optim.Muon, and its parts travel back. Ranks take turns. Experts
are stacked matrices: each rank takes whole ones of them, which is how they mostly lie already.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of a step after J. Liu et
al., "Muon is Scalable for LLM Training" (arXiv:2502.16982), with which one learning rate serves AdamW, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW, Optimizer

MOMENTUM = "momentum_buffer"
"""torch.optim.Muon's name for its state."""


class Muon(Optimizer):
    """Steps matrices [m, n] by their orthogonalised Nesterov momentum, times 0.2 sqrt(max(m, n)).

    That factor ("match_rms_adamw") gives a step the root mean square of AdamW's, whatever the matrix's shape.

    Args:
        params: matrices, or stacks of them [E, m, n], plain ones or DTensors sharded over one mesh: matrices by rows,
            stacks by their first dimension or their second; fp32. A group's ``blocks`` says of how many matrices, one
            above the other, each is made up (gate and up of an expert are one tensor): each block is stepped alone.
        lr: learning rate, as AdamW would have it.
        weight_decay: decoupled, times the learning rate.
        momentum: decay of the running mean of gradients.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "blocks": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; collective where parameters are sharded."""
        assert closure is None, "a step takes gradients that are there already"
        for group in self.param_groups:
            for stack in (p for p in group["params"] if p.grad is not None and p.ndim == 3):
                direction = orthogonalized_stack(self._momentum(stack, group["momentum"]), stack, group["blocks"])
                _apply(group, stack, direction)
            parameters = [p for p in group["params"] if p.grad is not None and p.ndim == 2]
            # matrices of one size are worked on at the same time, one a rank
            parameters.sort(key=lambda p: p.numel(), reverse=True)
            ranks = parameters[0].device_mesh.size() if parameters and isinstance(parameters[0], DTensor) else 1
            for first in range(0, len(parameters), ranks):
                self._step_together(group, parameters[first : first + ranks])

    def _step_together(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        parts = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
        for parameter, direction in zip(parameters, orthogonalized(parts, parameters), strict=True):
            _apply(group, parameter, direction)

    def _momentum(self, parameter: nn.Parameter, decay: float) -> Tensor:
        """This rank's part of where Nesterov's momentum points; the running mean takes the gradient in."""
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(parameter).detach()
        mean, gradient = _local(state[MOMENTUM]), _local(parameter.grad)  # type: ignore[arg-type]
        mean.lerp_(gradient, 1 - decay)
        return gradient.lerp(mean, decay)


class MuonWithAdamW(Optimizer):
    """One optimizer to the schedule and to checkpoints: its groups and its state are those of both.

    Args:
        muon: steps the matrices of the layers.
        adamw: steps all else; None where all that is trained are such matrices, as those of adapters.
    """

    def __init__(self, muon: Muon, adamw: AdamW | None) -> None:
        self._both: tuple[Optimizer, ...] = (muon,) if adamw is None else (muon, adamw)
        super().__init__([group for one in self._both for group in one.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of both; collective where parameters are sharded."""
        assert closure is None, "a step takes gradients that are there already"
        groups = iter(self.param_groups)
        for one in self._both:  # looked up anew, since load_state_dict replaces groups and state
            one.param_groups = list(islice(groups, len(one.param_groups)))
            one.state = self.state
            one.step()


def orthogonalized(parts: Sequence[Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
    """What Muon adds to ``matrices`` at a learning rate of 1: this rank's parts of it; collective if they are sharded.

    Args:
        parts: this rank's parts of their momentum.
        matrices: for shape and sharding: as many as there are ranks, or fewer, all sharded by rows over the same
            ranks, or plain ones.
    """
    first = matrices[0]
    if not isinstance(first, DTensor):
        return [torch_step(part) for part in parts]
    mesh = first.device_mesh
    ranks, own, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
    # parts that are kept in host memory are worked on where the computation is
    values = torch.cat([part.reshape(-1) for part in parts]).to(mesh.device_type)
    sizes = [part.numel() for part in parts]
    sent = sizes + [0] * (ranks - len(sizes))  # a rank that has no matrix of its own gets nothing
    shape = matrices[own].shape if own < len(matrices) else torch.Size((0, 0))
    taken = [rows * shape[1] for rows in _rows_by_rank(shape[0], ranks)]
    whole = _exchange(values, sent, taken, group)
    if shape.numel():
        whole = torch_step(whole.view(shape)).reshape(-1)
    steps = _exchange(whole, taken, sent, group).split(sizes)
    return [step.view(part.shape).to(part.device) for step, part in zip(steps, parts, strict=True)]


def orthogonalized_stack(part: Tensor, stack: Tensor, blocks: int) -> Tensor:
    """The same for one stack of matrices [E, m, n]: this rank's part of it; collective if it is cut through them.

    Args:
        part: this rank's part of its momentum.
        blocks: into which the m rows of each matrix are divided.
    """
    if not isinstance(stack, DTensor):
        return _each_stepped(part, blocks)
    mesh, by_experts = stack.device_mesh, (Shard(0),)
    momentum = DTensor.from_local(
        part.to(mesh.device_type), mesh, stack.placements, run_check=False, shape=stack.shape, stride=stack.stride()
    )
    own = _each_stepped(momentum.redistribute(placements=by_experts).to_local(), blocks)
    steps = DTensor.from_local(own, mesh, by_experts, run_check=False, shape=stack.shape, stride=stack.stride())
    return steps.redistribute(placements=stack.placements).to_local().to(part.device)


def _each_stepped(stack: Tensor, blocks: int) -> Tensor:
    """[e, blocks * m, n] -> the same, each [m, n] by ``torch_step``."""
    matrices = stack.unflatten(1, (blocks, -1)).flatten(0, 1)
    return torch.stack([torch_step(matrix) for matrix in matrices]).view_as(stack) if len(stack) else stack


def torch_step(momentum: Tensor) -> Tensor:
    """What torch.optim.Muon adds to a parameter at a learning rate of 1; a plain tensor [m, n], as ``momentum``."""
    parameter = nn.Parameter(torch.zeros_like(momentum))
    parameter.grad = momentum
    torch.optim.Muon(
        [parameter], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    ).step()
    return parameter.detach()


def _exchange(values: Tensor, sent: list[int], taken: list[int], group: dist.ProcessGroup) -> Tensor:
    """Of the flat ``values``, the next ``sent[r]`` go to rank r; returns ``taken[r]`` of each rank r's, in order."""
    result = values.new_empty(sum(taken))
    dist.all_to_all_single(result, values, taken, sent, group=group)
    return result


def _rows_by_rank(rows: int, ranks: int) -> list[int]:
    """Rows of each rank's part, as torch.chunk and so FSDP2 cut them: the last ones may have fewer, or none."""
    most = -(-rows // ranks)
    return [min(max(rows - rank * most, 0), most) for rank in range(ranks)]


def _apply(group: dict[str, Any], parameter: nn.Parameter, direction: Tensor) -> None:
    own = _local(parameter)
    own.mul_(1 - group["lr"] * group["weight_decay"])
    own.add_(direction, alpha=group["lr"])


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
