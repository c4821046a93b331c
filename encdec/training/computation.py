"""What one optimizer step computes: micro-batches forward and backward, the one reduction, the update.

Shapes: B micro-batch, S_e encoder tokens, S_d decoder tokens, W ranks, A accumulation steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from encdec import distributed
from encdec.training.engines import Engine
from encdec.training.schedule import Schedule


class Computation:
    """The arithmetic of one rank's steps; collective wherever the ranks' numbers meet.

    Args:
        engine: what the model and its optimizer are sharded by.
        loader: endless, with a batch sampler that has ``set_position``.
        schedule: the learning rate.
        accumulation_steps: A.
        max_grad_norm: global L2 norm to which gradients are clipped.
        unit: target tokens by which a micro-batch's loss is divided: near their number, so that gradients are ordinary
            in any precision.
        device: where batches go.
    """

    def __init__(
        self, engine: Engine, loader: DataLoader[Any], schedule: Schedule, *, accumulation_steps: int,
        max_grad_norm: float, unit: float, device: torch.device,
    ) -> None:  # fmt: skip
        self._engine, self._loader, self._schedule = engine, loader, schedule
        self._accumulation_steps, self._max_grad_norm = accumulation_steps, max_grad_norm
        self._unit, self._device = unit, device
        self._batches: Iterator[dict[str, Tensor]] | None = None

    def go_to(self, samples_consumed: int) -> int:
        """Have the next batch be the one after so many global samples; returns the epoch that it is of."""
        self._loader.batch_sampler.set_position(samples_consumed)  # type: ignore[union-attr]
        self._batches = None
        return self.epoch_at(samples_consumed)

    def epoch_at(self, samples_consumed: int) -> int:
        return self._loader.batch_sampler.epoch_at(samples_consumed)  # type: ignore[union-attr]

    def forward_backward(self) -> tuple[Tensor, int, float]:
        """(sums of the cross-entropy and of the experts' load-balancing loss [2], target tokens, seconds waited for
        data) of this rank's A micro-batches; what a model without experts lacks is 0.
        """
        loss_sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        tokens, waited = 0, 0.0
        for index in range(self._accumulation_steps):
            asked = time.perf_counter()
            batch = self._next_batch()
            waited += time.perf_counter() - asked
            tokens += int((batch["labels"] != -100).sum())  # on the host: no device synchronisation
            self._engine.set_sync(index == self._accumulation_steps - 1)
            output = self._output(batch, self._unit)
            self._engine.backward(output.loss)
            loss_sums += _parts_of_loss(output) * self._unit
        return loss_sums, tokens, waited

    def _output(self, batch: dict[str, Tensor], unit: float) -> Any:
        inputs = {
            key: batch[key].to(self._device, non_blocking=True) for key in ("input_ids", "attention_mask", "labels")
        }
        return self._engine.module(**inputs, use_cache=False, num_items_in_batch=unit, return_logits=False)

    def _next_batch(self) -> dict[str, Tensor]:
        if self._batches is None:
            with torch.random.fork_rng(devices=[]):  # an iterator draws its workers' seed, anew at each start
                self._batches = iter(self._loader)
        return next(self._batches)

    def reduce(self, loss_sums: Tensor, tokens: int, flags: list[bool]) -> list[float]:
        """The step's one collective: sums of both losses, tokens, squared gradients and each flag over all ranks."""
        norms = torch._foreach_norm(self._engine.local_gradients())
        squares = torch.stack(norms).double().square().sum()
        counts = torch.tensor([tokens, *flags], dtype=torch.float64, device=self._device)
        values = torch.cat([loss_sums, torch.stack([counts[0], squares.to(self._device)]), counts[1:]])
        if distributed.is_distributed():
            dist.all_reduce(values)
        return values.tolist()

    def update(self, tokens: float, squares: float) -> tuple[float, float]:
        """Scale the gradients to the mean over all target tokens, clip, step.

        Args:
            tokens, squares: of the reduction.

        Returns:
            (global L2 norm of the gradients before clipping, learning rate used).
        """
        # the engine averaged over ranks what each divided by ``unit``: this factor makes it the mean over target tokens
        scale = self._engine.averaged_over * self._unit / max(tokens, 1.0)
        grad_norm = scale * math.sqrt(squares)
        clip = min(1.0, self._max_grad_norm / (grad_norm + 1e-6))
        torch._foreach_mul_(self._engine.local_gradients(), scale * clip)
        rate = self._schedule.apply(self._engine.optimizer)
        self._engine.update()
        return grad_norm, rate

    def is_finite(self) -> bool:
        """Whether all ranks' weights and optimizer state are finite numbers."""
        finite = [tensor.isfinite().all().to(self._device) for tensor in self._engine.local_state()]
        verdict = (~torch.stack(finite).all()).double()
        if distributed.is_distributed():
            dist.all_reduce(verdict)
        return verdict.item() == 0

    def evaluate(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss per target token over the batches of all ranks, nats, and its perplexity."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._engine.module.eval()
        with torch.no_grad():
            for batch in batches:
                tokens = int((batch["labels"] != -100).sum())
                totals[0] += _parts_of_loss(self._output(batch, 1.0))[0]  # a filler batch has no targets and adds 0
                totals[1] += tokens
        self._engine.module.train()
        self._engine.end_evaluation()
        if distributed.is_distributed():
            dist.all_reduce(totals)
        loss = (totals[0] / totals[1].clamp(min=1)).item()
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _parts_of_loss(output: Any) -> Tensor:
    """[2], float64: cross-entropy and load-balancing loss; a user's own model may know of one loss alone."""
    whole, aux = output.loss, getattr(output, "aux_loss", None)
    if aux is None:
        return torch.stack([whole.detach().double(), torch.zeros_like(whole, dtype=torch.float64)])
    return torch.stack([output.lm_loss.detach().double(), aux.detach().double()])


def memory_gb(device: torch.device) -> float:
    """Resident memory of this process, or what it has allocated on its GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9
