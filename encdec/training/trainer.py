"""The training loop: one reduction a step, in which loss, gradient norm and the decision to stop travel together."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from encdec import distributed
from encdec.checkpoints import TRAINER_STATE, CheckpointManager, reading
from encdec.checkpoints.payload import payload_named
from encdec.errors import CheckpointError
from encdec.gates import GateLevel, ValidationGate
from encdec.records import StepRecord
from encdec.training.alerts import tell_not_finite
from encdec.training.computation import Computation, memory_gb
from encdec.training.config import FullConfig
from encdec.training.engines import Engine, TorchEngine
from encdec.training.gatekeeper import NotFiniteError, not_finite
from encdec.training.judgement import Closed, End, Judgement
from encdec.training.observers import Observer
from encdec.training.optimizer import make_optimizer, require_own_state
from encdec.training.recovery import Divergence
from encdec.training.rules import settled_micro_batch
from encdec.training.saving import Saving, Standing
from encdec.training.schedule import Schedule
from encdec.training.signals import Requests, Wishes
from encdec.training.state import MOVING_WINDOW, TrainingState, TrainResult

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
        gates, custom_gates: judged while training goes on (``Gatekeeper``).
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
        gates: Iterable[GateLevel] = (GateLevel.QUICK,),
        custom_gates: Iterable[ValidationGate] = (),
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
        self._tokens_per_step = self.global_batch_size * (sample_length or config.data.max_seq_length)
        self._device = next(model.parameters()).device
        self.engine: Engine = engine or TorchEngine(model, make_optimizer(model, config))
        self.optimizer = self.engine.optimizer
        warmup = min(training.warmup_steps, self.total_steps // 10) if warmup_steps is None else warmup_steps
        self.schedule = Schedule.from_config(training, warmup_steps=warmup, total_steps=self.total_steps)
        self.checkpoints = checkpoints or CheckpointManager(
            config.infra.output_dir, training.save_total_limit, payload=payload_named(self.engine.payload)
        )
        self.requests = requests or Requests(None)
        self.observers = list(observers)
        self.attempt, self.restart = attempt, restart
        self.state = TrainingState()
        self.judgement = Judgement(
            training, self.checkpoints, gates, custom_gates, warmup_steps=warmup, total_steps=self.total_steps,
            global_batch_size=self.global_batch_size,
        )  # fmt: skip
        self.losses, self.recovery = self.judgement.losses, self.judgement.recovery
        self.computation = Computation(
            self.engine, train_dataloader, self.schedule, accumulation_steps=self.accumulation_steps,
            max_grad_norm=training.max_grad_norm, device=self._device,
            unit=float(micro_batch * config.data.max_decoder_length),
        )  # fmt: skip
        self.saving = Saving(self.checkpoints, config, self.total_steps, self.observers)

    # ---- the loop

    def train(self) -> TrainResult:
        """Run from the present state to the end, or to the step boundary at which a stop is asked for.

        Raises:
            OSError: a checkpoint could not be written, or there is no room for one from the beginning.
            CheckpointError: the run was to be rolled back, and nothing to go back to verifies.
        """
        self.engine.module.train()
        if not (end := self._make_up() or self.judgement.completion(self.state.global_step)):
            distributed.on_rank_zero(lambda: self.checkpoints.require_room(self.model))
        while not end:
            end = self._next_step()
        gates = end.gates or self.judgement.gatekeeper.evidence
        return TrainResult(
            end.cause, self.state.global_step, self.saving.last, self.losses.first_mean, self.losses.last_mean(),
            end.message, gates if gates.evidence else None,
        )  # fmt: skip

    def _next_step(self) -> End | None:
        """One step and what follows from it; None: training goes on, from here or from where it was rolled back to."""
        try:
            record, wishes, standing = self._step()
        except NotFiniteError as found:
            return self._close_gate(self.judgement.not_finite(found.report, self.state, applied=False))
        for observer in self.observers:
            observer.on_step(record, self.losses.last_mean(MOVING_WINDOW))
        divergence = self.judgement.after_step(record)
        if divergence and self._roll_back(divergence):
            return None
        return self._close_step(record, wishes, standing)

    def _step(self) -> tuple[StepRecord, Wishes, Standing]:
        """One optimizer step: its record, what any rank was asked to do and how its saving stands, for all ranks.

        Raises:
            NotFiniteError: the loss or the gradients are no finite numbers.
        """
        began = time.perf_counter()
        torch.manual_seed(self._step_seed())
        own_loss_sums, own_tokens, waited = self.computation.forward_backward()
        flags = [*self.requests.look(), *self.saving.look()]
        loss_sum, aux_sum, tokens, squares, *counts = self.computation.reduce(own_loss_sums, own_tokens, flags)
        loss = loss_sum / max(tokens, 1.0)
        if wrong := [value for value in (loss, squares) if not math.isfinite(value)]:
            tell_not_finite(self.observers, self.state.global_step + 1, loss, squares)
            what = f"loss {loss}, squared gradient norm {squares} at step {self.state.global_step + 1}"
            raise NotFiniteError(not_finite(len(wrong), what))
        grad_norm, rate = self.computation.update(tokens, squares)
        self._advance(loss)
        seconds = time.perf_counter() - began
        record = StepRecord(
            step=self.state.global_step, loss=loss, grad_norm=grad_norm, learning_rate=rate, step_seconds=seconds,
            tokens_seen=self.state.total_tokens_seen, tokens_per_second=self._tokens_per_step / seconds,
            data_seconds=waited, samples_consumed=self.state.samples_consumed, memory_gb=memory_gb(self._device),
            attempt=self.attempt, restart=self.restart, aux_loss=aux_sum / max(tokens, 1.0) if aux_sum else None,
        )  # fmt: skip
        seen = [count > 0 for count in counts]
        return record, Wishes(*seen[: len(Wishes._fields)]), Standing(*seen[len(Wishes._fields) :])

    def _advance(self, loss: float) -> None:
        state = self.state
        state.global_step += 1
        state.total_tokens_seen += self._tokens_per_step
        self._move_to(state.samples_consumed + self.global_batch_size)
        self.losses.add(loss)

    def _move_to(self, samples_consumed: int, *, anew: bool = False) -> None:
        """Go on in the sample stream after so many samples, or after what is skipped there."""
        state, position = self.state, self.recovery.position(samples_consumed)
        if anew or position != samples_consumed:
            self.computation.go_to(position)
        state.samples_consumed, state.epoch = position, self.computation.epoch_at(position)

    def _asked_to_leave(self, wishes: Wishes) -> End | None:
        if wishes.signalled:
            return End("signalled", f"stopped by {self.requests.signal_name or 'a signal to another rank'}")
        return End("stop_requested", "stopped by the control file STOP") if wishes.stop else None

    def _close_step(self, record: StepRecord, wishes: Wishes, standing: Standing) -> End | None:
        # complete goes before what is asked for: a continued run must end where an undisturbed one does
        end = self.judgement.completion(record.step) or self._asked_to_leave(wishes)
        if reason := self.judgement.early_stopping.reason:
            self._tell("stopped_early", step=record.step, reason=reason)
        if not standing.writing:
            self.saving.land()
        hurried = wishes.signalled or wishes.stop  # a cluster kills soon after its signal: save before all else
        if not hurried:
            if self._evaluation_is_owed():
                self._evaluate_and_tell()
            end = self._judge_gates() or end
            if self.state.global_step != record.step:
                return None  # rolled back
        if end or wishes.save or standing.due or self.saving.is_scheduled(record.step):
            if not self.computation.is_finite():
                report = not_finite(1, f"weights or optimizer state, after step {record.step}")
                return self._close_gate(self.judgement.not_finite(report, self.state, applied=True))
            self.save(goes_on=not end)
        if hurried and self.judgement.completion(record.step):  # for good: nobody else makes up for it
            end = self._make_up() or end
        return end if self.state.global_step == record.step else None  # None: rolled back

    # ---- gates and roll-back

    def _judge_gates(self) -> End | None:
        """How training ends if a gate that is owed at this step is not passed, and nothing rolls that back."""
        closed = self.judgement.gates(self.state, checkpoint=self._has_checkpoint())
        return self._close_gate(closed) if closed else None

    def _close_gate(self, closed: Closed) -> End | None:
        if closed.divergence and self._roll_back(closed.divergence):
            return None
        self.saving.land()
        self._tell("gate_not_passed", step=self.state.global_step, **closed.facts())
        return closed.end()

    def _roll_back(self, divergence: Divergence) -> bool:
        """Go back to the last good checkpoint, by the path of a run that was killed now; False: no leave, or none."""
        if not self.recovery.possible:
            return False
        self.saving.land()
        decision = self.recovery.decide(divergence)
        if decision is None:
            return False
        self._tell("rolled_back", **decision.facts)
        self.engine.drop_gradients()
        if self.resume() is None:
            raise CheckpointError(
                "A run that is rolled back needs a checkpoint that verifies",
                found=f"none up to step {decision.to_step}",
                remedy="Give the same command again: it starts over and skips the same data",
            )
        return True

    def _tell(self, kind: str, **facts: Any) -> None:
        for observer in self.observers:
            observer.on_event(kind, facts)

    # ---- evaluation and checkpoints

    def evaluate(self) -> dict[str, float]:
        """Mean loss per target token over the evaluation batches of all ranks, nats, and its perplexity."""
        assert self.eval_dataloader is not None, "a trainer without eval_dataloader cannot evaluate"
        return self.computation.evaluate(self.eval_dataloader)

    def _evaluate_and_tell(self) -> None:
        state, metrics = self.state, self.evaluate()
        state.evaluation = {**metrics, "step": state.global_step}
        state.best_eval_loss = min(state.best_eval_loss, metrics["loss"])
        for observer in self.observers:
            observer.on_evaluation(state.global_step, metrics)

    def _evaluation_is_owed(self) -> bool:
        """Whether the present step is one to evaluate at, and has not been: who is told to stop leaves without."""
        step = self.state.global_step
        due = self._has_checkpoint() or step % self.config.training.eval_steps == 0
        return self.eval_dataloader is not None and step > 0 and due and not self.state.metrics

    def _has_checkpoint(self) -> bool:
        """Whether every run like this one has a checkpoint of this step: by schedule, or because it ends here."""
        step = self.state.global_step
        return self.saving.is_scheduled(step) or bool(self.judgement.completion(step))

    def _make_up(self) -> End | None:
        """Evaluate and judge what the saved step still lacks, and commit its checkpoint again."""
        step, evaluate = self.state.global_step, self._evaluation_is_owed()
        if evaluate:
            self._evaluate_and_tell()
        passed = self.judgement.gatekeeper.last_passed
        end = self._judge_gates()
        if self.state.global_step == step and (evaluate or self.judgement.gatekeeper.last_passed != passed):
            self.save()
        return end

    def save(self, *, goes_on: bool = False) -> None:
        """Commit a checkpoint of the present step; where training ``goes_on``, as ``training.async_save`` says.

        Raises:
            OSError: it could not be written, and ``training.on_save_failure`` does not let training go on without.
        """
        step, state = self.state.global_step, self._extra_state()
        scheduled = self._has_checkpoint()
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
        """Continue from the newest valid checkpoint that no roll-back has withdrawn, if there is one; its step."""
        self.recovery.read()
        loaded = self.checkpoints.load_latest(*self._parts)
        if loaded is None:
            return None
        self._restore(loaded[2], self.checkpoints.output_dir / f"step-{loaded[0]}")
        return loaded[0]

    def start_from(self, resume_from: Path | None) -> None:
        """Continue from ``resume_from``, or else from the newest valid checkpoint; tell what was found."""
        if resume_from is not None:
            self.recovery.read()
            self.load_checkpoint(resume_from.absolute())
            log.info("continuing from %s at step %d", resume_from, self.state.global_step)
            return
        distributed.on_rank_zero(self.checkpoints.discard_unfinished)
        step = self.resume()
        for decision in self.recovery.taken_up:  # the attempt that decided it has ended before its next checkpoint
            self._tell("roll_back_taken_up", **decision.facts)
        for reason in self.checkpoints.rejected:
            log.warning("passed over and %s", reason)
        log.info("starting from the initial weights" if step is None else f"continuing from step {step}")

    def _restore(self, state: dict[str, Any], folder: Path) -> None:
        require_own_state(self.optimizer)
        with reading(folder / TRAINER_STATE, "all that training continues from"):
            self.state = TrainingState.from_state_dict(state)
            self.judgement.load_state_dict(state)
        self.schedule.factor = self.recovery.lr_factor
        self._move_to(self.state.samples_consumed, anew=True)
        self.saving.last = folder.name

    def _extra_state(self) -> dict[str, Any]:
        return {**self.state.state_dict(), "seed": self.config.training.seed, **self.judgement.state_dict()}

    # ---- small facts

    @property
    def _parts(self) -> tuple[nn.Module, Optimizer, Schedule]:
        """What checkpoints are made of and fill."""
        return self.engine.module, self.optimizer, self.schedule

    def _step_seed(self) -> int:
        """Generators of this step and rank: nothing random needs saving."""
        return hash((self.config.training.seed, self.state.global_step, distributed.rank())) & (2**63 - 1)
