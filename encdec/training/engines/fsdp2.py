"""FSDP2: torch's own sharding, applied here and then looked at. A plain model in one process works as well.

Launchers can lose the sharding without a word: ``accelerate launch --cpu`` collapses to one process, and Accelerate's
own FSDP turns into plain data parallelism on CPU. So ``fully_shard`` is called here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from encdec import distributed
from encdec.errors import ShardingError
from encdec.initialization.streams import Stream, fill, give_memory, is_empty
from encdec.training.config import InfraConfig


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module],
    infra: InfraConfig,
    dtype: torch.dtype,
    mesh: DeviceMesh | None = None,
) -> DeviceMesh:
    """FSDP2 over all ranks: each transformer layer is a group, the rest (embedding, final norms) belongs to the root.

    Master weights and reductions are fp32; ``dtype`` is that of the computation. ``mesh`` is one of all ranks, made
    here unless given.
    """
    mesh = mesh or init_device_mesh(infra.device, (dist.get_world_size(),), mesh_dim_names=("data",))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=infra.device == "cuda") if infra.fsdp_cpu_offload else OffloadPolicy()
    free_after_forward = infra.fsdp_sharding_strategy == "FULL_SHARD"
    ranks = mesh.size()
    for layer in layers:
        fully_shard(
            layer, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=free_after_forward,
            shard_placement_fn=lambda parameter: placement(parameter, ranks),
        )  # fmt: skip
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=free_after_forward)
    return mesh


def placement(parameter: nn.Parameter, ranks: int) -> Shard:
    """How a parameter of a layer is cut: by its rows; stacked experts [E, rows, columns] by experts where the ranks
    divide them, else by the rows of each: 8 experts on 64 ranks would else lie on 8 of them.
    """
    if parameter.ndim == 3 and parameter.shape[0] % ranks and parameter.shape[1] % ranks == 0:
        return Shard(1)  # not dimension 1 where the ranks do not divide it: FSDP2 refuses that
    return Shard(0)


def materialise(model: nn.Module, infra: InfraConfig, device: torch.device, stream: Stream | None) -> None:
    """Give a model that was sharded on the meta device memory for this rank's shards, and fill them.

    Args:
        model: sharded; one whose parameters have memory stays as it is.
        stream: the values; None leaves the shards at zero.
    """
    if not is_empty(model):
        return
    give_memory(model, torch.device("cpu") if infra.fsdp_cpu_offload else device, device)
    if stream is not None:
        fill(model, stream)
        return
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        parameter.to_local().detach().zero_()  # not memory as it was found


class TorchEngine:
    """A model that ``shard`` has sharded, or a plain one in one process."""

    payload = "fsdp2"

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.module, self.optimizer = model, optimizer
        self.averaged_over = distributed.world_size() if isinstance(model, FSDPModule) else 1

    def set_sync(self, last: bool) -> None:
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def local_gradients(self) -> list[Tensor]:
        gradients = (parameter.grad for parameter in self.module.parameters() if parameter.grad is not None)
        return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]

    def update(self) -> None:
        self.optimizer.step()
        self.drop_gradients()

    def end_evaluation(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # SHARD_GRAD_OP leaves that to a backward pass; a checkpoint needs the shards

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def local_state(self) -> list[Tensor]:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.module.parameters(), *filter(torch.is_tensor, states)]
        return [t.to_local().detach() if isinstance(t, DTensor) else t.detach() for t in tensors]

    def prove_sharding(self, world_size: int) -> str:
        local = total = 0
        for name, parameter in self.module.named_parameters():
            tensor = parameter.data
            if (
                not isinstance(tensor, DTensor)
                or tensor.placements not in ((Shard(0),), (Shard(1),))
                or tensor.device_mesh.size() != world_size
            ):
                raise ShardingError(
                    f"Every parameter must be split over all {world_size} ranks",
                    found=f"{name}: {getattr(tensor, 'placements', 'a plain tensor')}",
                    remedy="Let encdec.train shard the model itself; start it with torchrun or accelerate launch",
                )
            local += tensor.to_local().numel()
            total += parameter.numel()
        return f"FSDP2 over {world_size} ranks: {total:,} parameters, {local:,} on this rank"
