"""What a metric is measured by: a registry of evaluators, each of which takes a plain model and gives one number.

Everything is deterministic: dropout off, greedy generation, items in the order of their file. Times are the exception.

Shapes: B samples, S_e encoder tokens, S_d target tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encdec.errors import ConfigError
from encdec.gates import Measurement
from encdec.pipeline.suites import SUITES, read_suite

IGNORED_LABEL = -100
LATENCY_TOKENS = 64
"""Tokens of every answer whose time is taken: the same for all models."""
Batches = Iterable[Mapping[str, Tensor]]


class NotMeasured(Exception):
    """An evaluator lacks what it measures on; says what. Its metric then counts as one that nobody measured."""


@dataclass
class Evaluation:
    """One model to be measured, and on what."""

    model: nn.Module
    """Plain, not sharded, on any device."""
    batches: Batches | None = None
    """Held-out: input_ids [B, S_e], attention_mask [B, S_e], labels [B, S_d] (-100 where there is no target)."""
    tokenizer: Any = None
    """Belongs to the model; the task suites need it."""
    benchmarks: Mapping[str, str | Path] = field(default_factory=dict)
    """Metric -> JSON-lines file."""
    step: int | None = None
    """Optimizer step of the weights, for the evidence."""
    generations: int = 64
    """Most held-out samples for which something is generated."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def at_step(self) -> str:
        return "" if self.step is None else f", step {self.step}"

    def held_out(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(input_ids [B, S_e], attention_mask [B, S_e], labels [B, S_d]) of every batch, on the model's device.

        Raises:
            NotMeasured: there are none.
        """
        if self.batches is None:
            raise NotMeasured("no evaluation data given")
        for batch in self.batches:
            ids = batch["input_ids"].to(self.device)
            mask = batch["attention_mask"].to(self.device) if "attention_mask" in batch else torch.ones_like(ids)
            yield ids, mask, batch["labels"].to(self.device)

    @cached_property
    def teacher_forced(self) -> TeacherForced:
        """One pass over the held-out batches, shared by all that needs it."""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = tokens = samples = 0
        rows = ((part.split(1) for part in batch) for batch in self.held_out())  # the logits of a batch never exist
        for ids, mask, labels in (row for batch in rows for row in zip(*batch, strict=True)):
            logits = self.model(input_ids=ids, attention_mask=mask, labels=labels).logits  # [1, S_d, V]
            is_target = labels != IGNORED_LABEL
            flat, targets = logits[is_target].float(), labels[is_target]
            loss += nn.functional.cross_entropy(flat, targets, reduction="sum").double()
            right += int((flat.argmax(-1) == targets).sum())
            tokens += len(targets)
            samples += int(is_target.any(-1).sum())
        if not tokens:
            raise NotMeasured("the evaluation data has no target tokens")
        return TeacherForced(loss.item() / tokens, right / tokens, tokens, samples)

    @cached_property
    def latencies(self) -> list[float]:
        """Seconds of each answer of LATENCY_TOKENS tokens to one held-out input, ascending; the first call is not
        counted.
        """
        prompts = [ids for ids, _ in self._samples()]
        if not prompts:
            raise NotMeasured("the evaluation data has no samples")
        seconds = []
        for index, prompt in enumerate([prompts[0], *prompts]):
            began = time.perf_counter()
            self.generate(prompt[None], max_new_tokens=LATENCY_TOKENS, min_new_tokens=LATENCY_TOKENS).tolist()
            if index:
                seconds.append(time.perf_counter() - began)
        return sorted(seconds)

    def _samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(encoder ids, target ids) of the first ``generations`` held-out samples, without padding."""
        left = self.generations
        for ids, mask, labels in self.held_out():
            for row in range(len(ids)):
                target = labels[row][labels[row] != IGNORED_LABEL]
                if not left:
                    return
                if len(target):  # a filler of EvaluationBatches has none
                    left -= 1
                    yield ids[row][mask[row] > 0], target

    def generate(self, input_ids: Tensor, **limits: Any) -> Tensor:
        """[B, <= limit] ids that the decoder writes behind its start, greedily.

        Raises:
            NotMeasured: the model cannot generate.
        """
        if not hasattr(self.model, "generate"):
            raise NotMeasured(f"{type(self.model).__name__} has no generate")
        begin = limits.get("decoder_input_ids")
        made = self.model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, num_beams=1, **limits
        )  # type: ignore[operator]
        return made[:, 1 if begin is None else begin.shape[1] :]

    def exact_match(self) -> tuple[float, int]:
        """(share, number) of held-out samples whose masked spans are generated token for token, the end included."""
        matches = [
            self.generate(ids[None], max_new_tokens=len(target))[0].tolist() == target.tolist()
            for ids, target in self._samples()
        ]
        if not matches:
            raise NotMeasured("the evaluation data has no samples")
        return sum(matches) / len(matches), len(matches)

    def answer(self, question: str, max_new_tokens: int) -> str:
        """What the model writes behind ``question``: as in S denoising, the rest of a text that a sentinel stands for.

        The encoder reads question, sentinel, end, behind the mode token where there is one; the decoder begins with the
        sentinel and goes on to the end, or as far as its positions go. A question longer than those gets no answer: the
        empty one.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise NotMeasured("no tokenizer given")
        sentinel, end = tokenizer.sentinel_ids[0], tokenizer.eos_token_id
        asked = tokenizer.mode_token_ids[1:2]  # [S], where training has it
        document = tokenizer.encode_documents([question])[0]
        encoder = torch.tensor([[*asked, *document, sentinel, end]], device=self.device)
        begin = torch.tensor([[tokenizer.decoder_start_token_id, sentinel]], device=self.device)
        room = getattr(getattr(self.model, "config", None), "max_position_embeddings", math.inf)
        if encoder.shape[1] > room:
            return ""
        limit = int(min(max_new_tokens, room - begin.shape[1]))
        made = self.generate(encoder, decoder_input_ids=begin, max_new_tokens=limit)[0].tolist()
        stops = {end, tokenizer.pad_token_id, *tokenizer.sentinel_ids}
        length = next((index for index, token in enumerate(made) if token in stops), len(made))
        # rows of the embedding that no token has: only a model that has learnt little writes them
        return tokenizer.decode([token for token in made[:length] if token < len(tokenizer)])


@dataclass(frozen=True)
class TeacherForced:
    """What one pass over held-out batches says."""

    loss: float
    """Mean cross-entropy per target token, nats."""
    accuracy: float
    """Share of target tokens that are the likeliest."""
    tokens: int
    samples: int

    @property
    def source(self) -> str:
        return f"{self.tokens:,} target tokens of {self.samples:,} held-out samples"


Evaluator = Callable[[Evaluation], "float | Measurement"]
"""Measures one metric, or raises NotMeasured. A plain number gets the evaluator's name as its source."""
EVALUATORS: dict[str, Evaluator] = {}
"""By metric name."""


def register_evaluator(name: str, *, replace: bool = False) -> Callable[[Evaluator], Evaluator]:
    """A decorator: from now on the metric ``name`` is measured by the function.

    Raises:
        ConfigError: it is measured by another, and ``replace`` is not set.
    """

    def register(evaluator: Evaluator) -> Evaluator:
        if name in EVALUATORS and not replace:
            raise ConfigError(
                "A metric has one evaluator", found=f"a second one for {name}", remedy="Choose a name, or replace=True"
            )
        EVALUATORS[name] = evaluator
        return evaluator

    return register


@dataclass(frozen=True)
class Measured:
    """What a round of measuring gave."""

    values: Mapping[str, Measurement]
    """By metric."""
    missing: Mapping[str, str]
    """Metric -> why nobody measured it."""


@torch.no_grad()
def measure(
    metrics: Iterable[str],
    evaluation: Evaluation,
    *,
    known: Mapping[str, Measurement] | None = None,
    evaluators: Mapping[str, Evaluator] | None = None,
) -> Measured:
    """Measure each metric that is not known yet.

    Args:
        evaluators: by metric; those of ``EVALUATORS`` unless it has others.

    Raises:
        DataError: a suite's file is not what it must be.
    """
    values, missing = dict(known or {}), {}
    by_name = {**EVALUATORS, **(evaluators or {})}
    was_training = evaluation.model.training
    evaluation.model.eval()
    try:
        for metric in dict.fromkeys(metrics):
            if metric in values:
                continue
            try:
                values[metric] = _measured_by(by_name, metric, evaluation)
            except NotMeasured as reason:
                missing[metric] = str(reason)
    finally:
        evaluation.model.train(was_training)
    return Measured(values, missing)


def _measured_by(evaluators: Mapping[str, Evaluator], metric: str, evaluation: Evaluation) -> Measurement:
    if metric not in evaluators:
        raise NotMeasured("no evaluator is registered for it")
    value = evaluators[metric](evaluation)
    return value if isinstance(value, Measurement) else Measurement(float(value), f"evaluator {metric}")


# ---- the built-in ones


@register_evaluator("loss")
def loss(evaluation: Evaluation) -> Measurement:
    """Nats per held-out target token."""
    done = evaluation.teacher_forced
    return Measurement(done.loss, done.source + evaluation.at_step)


@register_evaluator("perplexity")
def perplexity(evaluation: Evaluation) -> Measurement:
    done = evaluation.teacher_forced
    return Measurement(math.exp(min(done.loss, 700.0)), done.source + evaluation.at_step)


@register_evaluator("accuracy")
def accuracy(evaluation: Evaluation) -> Measurement:
    """Share of held-out target tokens predicted right, the ones before each being given."""
    done = evaluation.teacher_forced
    return Measurement(done.accuracy, done.source + evaluation.at_step)


@register_evaluator("denoising_exact_match")
def denoising_exact_match(evaluation: Evaluation) -> Measurement:
    share, count = evaluation.exact_match()
    return Measurement(share, f"{count} held-out samples, generated greedily{evaluation.at_step}")


def latency(evaluation: Evaluation, percentile: int) -> Measurement:
    """Nearest-rank percentile of the seconds of an answer."""
    seconds = evaluation.latencies
    source = f"{len(seconds)} answers of {LATENCY_TOKENS} tokens, one at a time, on {evaluation.device}"
    return Measurement(seconds[math.ceil(percentile / 100 * len(seconds)) - 1], source + evaluation.at_step)


for _percentile in (50, 99):
    register_evaluator(f"latency_p{_percentile}")(partial(latency, percentile=_percentile))


@register_evaluator("nan_count")
def nan_count(evaluation: Evaluation) -> Measurement:
    """Tensors of the model, weights and gradients, that hold a value that is no finite number."""
    tensors = [t for p in evaluation.model.parameters() for t in (p, p.grad) if t is not None]
    count = sum(not bool(torch.isfinite(tensor).all()) for tensor in tensors)
    return Measurement(count, f"{len(tensors)} weights and gradients{evaluation.at_step}")


@register_evaluator("grad_norm")
def grad_norm(evaluation: Evaluation) -> Measurement:
    """L2 norm of the gradients that the model holds."""
    gradients = [p.grad for p in evaluation.model.parameters() if p.grad is not None]
    if not gradients:
        raise NotMeasured("the model holds no gradients")
    total = sum(float(gradient.double().square().sum()) for gradient in gradients)
    return Measurement(math.sqrt(total), f"gradients of {len(gradients)} parameters{evaluation.at_step}")


def suite_accuracy(evaluation: Evaluation, metric: str) -> Measurement:
    """Share of a suite's questions that are answered right."""
    path = evaluation.benchmarks.get(metric)
    if path is None:
        raise NotMeasured(f"eval_benchmarks.{metric} names no file")
    suite, items = SUITES[metric], read_suite(metric, path)
    right = sum(
        suite.is_right(evaluation.answer(item.question, suite.max_new_tokens), item.reference) for item in items
    )
    return Measurement(right / len(items), f"{suite.what}: {right} of {len(items)} of {path}{evaluation.at_step}")


for _metric in SUITES:
    register_evaluator(_metric)(partial(suite_accuracy, metric=_metric))
