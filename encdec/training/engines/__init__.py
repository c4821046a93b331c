"""What trains a model on many ranks, behind one interface: FSDP2 or ZeRO-3. The trainer knows nothing else of them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from encdec.initialization.streams import Stream
from encdec.training.config import FullConfig
from encdec.training.engines.fsdp2 import TorchEngine, materialise, shard
from encdec.training.optimizer import make_optimizer

__all__ = ["Engine", "TorchEngine", "start_engine"]


class Engine(Protocol):
    """A model and its optimizer, spread over the ranks of the default process group.

    A step is, per micro-batch: ``set_sync``, a call of ``module``, ``backward``; then, once: ``local_gradients``, which
    the caller reads and changes in place, and ``update``.
    """

    payload: str
    """Name of what it is saved as (``encdec.checkpoints.payload``)."""
    module: nn.Module
    """What is called for the forward pass: the model, or what the engine has put around it."""
    optimizer: Optimizer
    """Its ``param_groups`` take the learning rate."""
    averaged_over: int
    """Ranks over which the gradients are averaged, not summed."""

    def set_sync(self, last: bool) -> None:
        """Before each micro-batch: whether it is the step's last one."""

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients; after the last one they are reduced over the ranks, in fp32."""

    def local_gradients(self) -> list[Tensor]:
        """This rank's parts of the reduced gradients; over all ranks each element occurs once (padding is zero)."""

    def update(self) -> None:
        """Apply the optimizer to the gradients as they stand now, and drop them."""

    def end_evaluation(self) -> None:
        """After forward passes without a backward pass: give up the whole parameters that those may have left."""

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that is not to be applied."""

    def local_state(self) -> list[Tensor]:
        """This rank's parts of the master weights and of the optimizer's state."""

    def prove_sharding(self, world_size: int) -> str:
        """Look at every parameter; one line that says what was found.

        Raises:
            ShardingError: a parameter is not split over all ``world_size`` ranks.
        """


def start_engine(
    model: nn.Module,
    config: FullConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch_size: int,
    accumulation_steps: int,
    stream: Stream | None = None,
) -> Engine:
    """Spread ``model`` over the ranks, as ``infra.distributed_type`` says; collective.

    Args:
        model: has ``transformer_layers()``; fp32. Whole on ``device`` and alike on every rank; or with its parameters
            on the meta device: then a rank gets memory for its own parts alone, and fills them.
        dtype: of the computation; master weights and reductions are fp32.
        micro_batch_size: samples.
        stream: values of parameters that are on the meta device; None leaves them without, for those that follow.
    """
    if config.infra.distributed_type == "deepspeed":
        from encdec.training.engines.zero3 import ZeroEngine  # imports deepspeed, which not every machine has

        return ZeroEngine(
            model, config, device=device, dtype=dtype,
            micro_batch_size=micro_batch_size, accumulation_steps=accumulation_steps, stream=stream,
        )  # fmt: skip
    shard(model, model.transformer_layers(), config.infra, dtype)  # type: ignore[operator]
    materialise(model, config.infra, device, stream)
    return TorchEngine(model, make_optimizer(model, config))
