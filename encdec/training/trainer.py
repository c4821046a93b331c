"""The training loop: one reduction a step, in which loss, gradient norm and the decision to stop travel together.

Shapes: B micro-batch, S_e encoder tokens, S_d decoder tokens, W ranks, A accumulation steps.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from encdec import distributed
from encdec.checkpoints import TRAINER_STATE, CheckpointManager, reading
from encdec.checkpoints.payload import payload_named
from encdec.errors import TrainingDiverged
from encdec.records import StepRecord
from encdec.training.alerts import tell_not_finite
from encdec.training.config import FullConfig
from encdec.training.early_stopping import EarlyStopping
from encdec.training.engines import Engine, TorchEngine
from encdec.training.observers import Observer
from encdec.training.optimizer import make_optimizer, require_own_state
from encdec.training.rules import settled_micro_batch
from encdec.training.saving import Saving, Standing
from encdec.training.schedule import Schedule
from encdec.training.signals import Requests, Wishes
from encdec.training.state import MOVING_WINDOW, LossHistory, TrainingState, TrainResult

log = logging.getLogger("encdec.train")


class Qwen3EncoderDecoderTrainer:
    """Trains a model that an engine has spread over the ranks (or a plain one, in one process).

    Args:
        model: returns an object with ``.loss`` for (input_ids [B, S_e], attention_mask [B, S_e], labels [B, S_d],
            num_items_in_batch), the loss being the sum over target tokens divided by ``num_items_in_batch``.
        tokenizer: kept for those who export; not used in the loop.
        config: the whole tree; its intervals and limits are obeyed as they stand.
        train_dataloader: endless, with a batch sampler that has ``set_position`` (``encdec.data.sampler``).
        eval_dataloader: batches of one evaluation, the same number on every rank; None: no evaluation.
        engine: what the model and its optimizer are sharded by; the plain model and a new optimizer unless given.
        checkpoints: where to save; a manager of ``infra.output_dir`` unless given.
        sample_length: raw tokens per sample.
        global_batch_size: samples per optimizer step over all ranks.
        total_steps: step at which training is complete.
        warmup_steps: steps of linear warm-up.
        requests: signals and control files.
        observers: told every step on rank 0 (records, progress, trackers).
        attempt, restart: stamped on each step record.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: FullConfig,
        train_dataloader: DataLoader[Any],
        eval_dataloader: Iterable[dict[str, Tensor]] | None = None,
        *,
        engine: Engine | None = None,
        checkpoints: CheckpointManager | None = None,
        sample_length: int | None = None,
        global_batch_size: int | None = None,
        total_steps: int | None = None,
        warmup_steps: int | None = None,
        requests: Requests | None = None,
        observers: Iterable[Observer] = (),
        attempt: int = 0,
        restart: int = 0,
    ) -> None:
        training = config.training
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.train_dataloader, self.eval_dataloader = train_dataloader, eval_dataloader
        self.total_steps = total_steps or training.num_train_steps
        sampler = train_dataloader.batch_sampler
        micro_batch = settled_micro_batch(training)
        self.accumulation_steps: int = getattr(sampler, "accumulation_steps", training.gradient_accumulation_steps)
        self.global_batch_size: int = (
            global_batch_size
            or getattr(sampler, "global_batch_size", 0)
            or (micro_batch * self.accumulation_steps * distributed.world_size())
        )
        self.sample_length = sample_length or config.data.max_seq_length
        self._device = next(model.parameters()).device
        self.engine: Engine = engine or TorchEngine(model, make_optimizer(model, config))
        self.optimizer = self.engine.optimizer
        warmup = min(training.warmup_steps, self.total_steps // 10) if warmup_steps is None else warmup_steps
        self.schedule = Schedule.from_config(training, warmup_steps=warmup, total_steps=self.total_steps)
        self.early_stopping = EarlyStopping(training)
        self.checkpoints = checkpoints or CheckpointManager(
            config.infra.output_dir, training.save_total_limit, payload=payload_named(self.engine.payload)
        )
        self.requests = requests or Requests(None)
        self.observers = list(observers)
        self.attempt, self.restart = attempt, restart
        self.state = TrainingState()
        self.losses = LossHistory(self.total_steps)
        # a constant near a micro-batch's token count: dividing by it keeps gradients ordinary in any precision
        self._unit = float(micro_batch * config.data.max_decoder_length)
        self._process = psutil.Process()
        self.saving = Saving(self.checkpoints, config, self.total_steps, self.observers)
        self._batches: Iterator[dict[str, Tensor]] | None = None

    # ---- the loop

    def train(self) -> TrainResult:
        """Run from the present state to the end, or to the step boundary at which a stop is asked for.

        Raises:
            TrainingDiverged: the loss is not a finite number.
            OSError: a checkpoint could not be written, or there is no room for one from the beginning.
        """
        self.engine.module.train()
        self._make_up_evaluation()
        message = self._completion()
        cause = "complete" if message else ""
        if not cause:
            distributed.on_rank_zero(lambda: self.checkpoints.require_room(self.model))
        while not cause:
            record, wishes, standing = self._step()
            cause, message = self._decide(record, wishes)
            self._close_step(record, wishes, standing, cause)
        return TrainResult(
            cause, self.state.global_step, self.saving.last, self.losses.first_mean, self.losses.last_mean(), message
        )

    def _step(self) -> tuple[StepRecord, Wishes, Standing]:
        """One optimizer step: its record, what any rank was asked to do and how its saving stands, for all ranks."""
        began = time.perf_counter()
        torch.manual_seed(self._step_seed())
        own_loss_sum, own_tokens, waited = self._forward_backward()
        flags = [*self.requests.look(), *self.saving.look()]
        loss_sum, tokens, squares, *counts = self._reduce(own_loss_sum, own_tokens, flags)
        loss = loss_sum / max(tokens, 1.0)
        if not math.isfinite(loss) or not math.isfinite(squares):
            tell_not_finite(self.observers, self.state.global_step + 1, loss, squares)
            raise TrainingDiverged(
                f"The loss and the gradients must be finite numbers at step {self.state.global_step + 1}",
                found=f"loss {loss}, squared gradient norm {squares}",
                remedy="Lower training.learning_rate, or resume from an earlier checkpoint",
            )
        # the engine averaged over ranks what each divided by ``unit``: this factor makes it the mean over target tokens
        scale = self.engine.averaged_over * self._unit / max(tokens, 1.0)
        grad_norm = scale * math.sqrt(squares)
        rate = self._update(scale, grad_norm)
        self._advance(loss)
        seconds = time.perf_counter() - began
        step_tokens = self.global_batch_size * self.sample_length
        record = StepRecord(
            step=self.state.global_step, loss=loss, grad_norm=grad_norm, learning_rate=rate,
            tokens_seen=self.state.total_tokens_seen, tokens_per_second=step_tokens / seconds, step_seconds=seconds,
            data_seconds=waited, samples_consumed=self.state.samples_consumed, memory_gb=self._memory_gb(),
            attempt=self.attempt, restart=self.restart,
        )  # fmt: skip
        seen = [count > 0 for count in counts]
        return record, Wishes(*seen[: len(Wishes._fields)]), Standing(*seen[len(Wishes._fields) :])

    def _forward_backward(self) -> tuple[Tensor, int, float]:
        """(summed loss [], target tokens, seconds waited for data) of this rank's A micro-batches."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        tokens, waited = 0, 0.0
        for index in range(self.accumulation_steps):
            asked = time.perf_counter()
            batch = self._next_batch()
            waited += time.perf_counter() - asked
            tokens += int((batch["labels"] != -100).sum())  # on the host: no device synchronisation
            self.engine.set_sync(index == self.accumulation_steps - 1)
            loss = self._loss(batch, self._unit)
            self.engine.backward(loss)
            loss_sum += loss.detach().double() * self._unit
        return loss_sum, tokens, waited

    def _loss(self, batch: dict[str, Tensor], unit: float) -> Tensor:
        inputs = {
            key: batch[key].to(self._device, non_blocking=True) for key in ("input_ids", "attention_mask", "labels")
        }
        return self.engine.module(**inputs, use_cache=False, num_items_in_batch=unit).loss

    def _next_batch(self) -> dict[str, Tensor]:
        if self._batches is None:
            self._batches = iter(self.train_dataloader)
        return next(self._batches)

    def _reduce(self, loss_sum: Tensor, tokens: int, flags: list[bool]) -> list[float]:
        """The step's one collective: sums of loss, tokens, squared gradients and each flag over all ranks."""
        norms = torch._foreach_norm(self.engine.local_gradients())
        squares = torch.stack(norms).double().square().sum()
        counts = torch.tensor([tokens, *flags], dtype=torch.float64, device=self._device)
        values = torch.cat([torch.stack([loss_sum, counts[0], squares.to(self._device)]), counts[1:]])
        if distributed.is_distributed():
            dist.all_reduce(values)
        return values.tolist()

    def _update(self, scale: float, grad_norm: float) -> float:
        """Scale to the token mean, clip, step; returns the learning rate used."""
        clip = min(1.0, self.config.training.max_grad_norm / (grad_norm + 1e-6))
        torch._foreach_mul_(self.engine.local_gradients(), scale * clip)
        rate = self.schedule.apply(self.optimizer)
        self.engine.update()
        return rate

    def _advance(self, loss: float) -> None:
        state = self.state
        state.global_step += 1
        state.samples_consumed += self.global_batch_size
        state.total_tokens_seen += self.global_batch_size * self.sample_length
        state.epoch = self.train_dataloader.batch_sampler.epoch_at(state.samples_consumed)  # type: ignore[union-attr]
        self.losses.add(loss)

    def _decide(self, record: StepRecord, wishes: Wishes) -> tuple[str, str]:
        """(cause, message) if training ends at this boundary, else empty strings; the same cause on all ranks.

        What is complete is complete whatever is asked for: a continued run must end where an undisturbed one does.
        """
        self.early_stopping.judge(record.step, record.grad_norm, self.losses.last_mean(MOVING_WINDOW))
        if message := self._completion():
            return "complete", message
        if wishes.signalled:
            return "signalled", f"stopped by {self.requests.signal_name or 'a signal to another rank'}"
        return ("stop_requested", "stopped by the control file STOP") if wishes.stop else ("", "")

    def _completion(self) -> str:
        """Why training is complete; empty while it is not."""
        if self.early_stopping.reason:
            return f"stopped early: {self.early_stopping.reason}"
        return f"all {self.total_steps} steps done" if self.state.global_step >= self.total_steps else ""

    def _close_step(self, record: StepRecord, wishes: Wishes, standing: Standing, cause: str) -> None:
        for observer in self.observers:
            observer.on_step(record, self.losses.last_mean(MOVING_WINDOW))
        if not standing.writing:
            self.saving.land()
        hurried = wishes.signalled or wishes.stop  # a cluster kills soon after its signal: save before all else
        if not hurried and self._evaluation_is_owed():
            self._evaluate_and_tell()
        if cause or wishes.save or standing.due or self.saving.is_scheduled(record.step):
            self.save(goes_on=not cause)
        if cause == "complete":
            self._make_up_evaluation()

    # ---- evaluation and checkpoints

    def evaluate(self) -> dict[str, float]:
        """Mean loss per target token over the evaluation batches of all ranks, nats, and its perplexity."""
        assert self.eval_dataloader is not None, "a trainer without eval_dataloader cannot evaluate"
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        self.engine.module.eval()
        with torch.no_grad():
            for batch in self.eval_dataloader:
                tokens = int((batch["labels"] != -100).sum())
                totals[0] += self._loss(batch, 1.0).double()  # a filler batch has no targets and adds 0
                totals[1] += tokens
        self.engine.module.train()
        if distributed.is_distributed():
            dist.all_reduce(totals)
        loss = (totals[0] / totals[1].clamp(min=1)).item()
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def _evaluate_and_tell(self) -> None:
        state, metrics = self.state, self.evaluate()
        state.evaluation = {**metrics, "step": state.global_step}
        state.best_eval_loss = min(state.best_eval_loss, metrics["loss"])
        for observer in self.observers:
            observer.on_evaluation(state.global_step, metrics)

    def _evaluation_is_owed(self) -> bool:
        """Whether the present step is one to evaluate at, and has not been: who is told to stop leaves without."""
        step = self.state.global_step
        due = self.saving.is_scheduled(step) or step % self.config.training.eval_steps == 0
        return self.eval_dataloader is not None and step > 0 and due and not self.state.metrics

    def _make_up_evaluation(self) -> None:
        """Make the evaluation that the saved step still lacks, and commit its checkpoint again."""
        if self._evaluation_is_owed():
            self._evaluate_and_tell()
            self.save()

    def save(self, *, goes_on: bool = False) -> None:
        """Commit a checkpoint of the present step; where training ``goes_on``, as ``training.async_save`` says.

        Raises:
            OSError: it could not be written, and ``training.on_save_failure`` does not let training go on without.
        """
        step, state = self.state.global_step, self._extra_state()
        scheduled = self.saving.is_scheduled(step) or bool(self._completion())
        # one that was only asked for has no metrics: it must not become the best, which an undisturbed run lacks
        metrics = self.state.metrics if scheduled else {}
        self.saving.save(*self._parts, step, metrics, state, scheduled=scheduled, goes_on=goes_on)

    def load_checkpoint(self, path: Path) -> None:
        """Continue from a verified checkpoint folder, at any world size.

        Raises:
            CheckpointError: it does not verify or is of another model.
        """
        self._restore(self.checkpoints.load(path, *self._parts), path)

    def resume(self) -> int | None:
        """Continue from the newest valid checkpoint, if there is one; returns its step."""
        loaded = self.checkpoints.load_latest(*self._parts)
        if loaded is None:
            return None
        self._restore(loaded[2], self.checkpoints.output_dir / f"step-{loaded[0]}")
        return loaded[0]

    def start_from(self, resume_from: Path | None) -> None:
        """Continue from ``resume_from``, or else from the newest valid checkpoint; tell what was found."""
        if resume_from is not None:
            self.load_checkpoint(resume_from.absolute())
            log.info("continuing from %s at step %d", resume_from, self.state.global_step)
            return
        distributed.on_rank_zero(self.checkpoints.discard_unfinished)
        step = self.resume()
        for reason in self.checkpoints.rejected:
            log.warning("passed over and %s", reason)
        log.info("starting from the initial weights" if step is None else f"continuing from step {step}")

    def _restore(self, state: dict[str, Any], folder: Path) -> None:
        require_own_state(self.optimizer)
        with reading(folder / TRAINER_STATE, "all that training continues from"):
            self.state = TrainingState.from_state_dict(state)
            self.losses.load_state_dict(state["losses"])
            self.early_stopping.load_state_dict(state["early_stopping"])
        self.train_dataloader.batch_sampler.set_position(self.state.samples_consumed)  # type: ignore[union-attr]
        self._batches = None
        self.saving.last = folder.name

    def _extra_state(self) -> dict[str, Any]:
        return {
            **self.state.state_dict(),
            "seed": self.config.training.seed,
            "losses": self.losses.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
        }

    # ---- small facts

    @property
    def _parts(self) -> tuple[nn.Module, Optimizer, Schedule]:
        """What checkpoints are made of and fill."""
        return self.engine.module, self.optimizer, self.schedule

    def _step_seed(self) -> int:
        """Generators of this step and rank: nothing random needs saving."""
        return hash((self.config.training.seed, self.state.global_step, distributed.rank())) & (2**63 - 1)

    def _memory_gb(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / 1e9
        return self._process.memory_info().rss / 1e9
