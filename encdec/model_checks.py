"""Does a model do all that training and generation will ask of it? Checks of a model in memory, a verdict each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from encdec.errors import EncdecError

SAMPLE_TEXT = "def greet(name):\n    return 'Hello, ' + name\n\nprint(greet('world'))\n"
MAX_LOSS = 100.0
MAX_GRAD_NORM = 1000.0
GENERATED_TOKENS = 8
LOADING = ("model_loads", "tokenizer_loads")
CHECKS = (
    "forward", "loss_in_range", "backward", "encoder_gradients", "decoder_gradients", "gradient_norm",
    "tied_embeddings", "generation",
)  # fmt: skip
"""Of a model in memory, in this order."""


@dataclass(frozen=True)
class Check:
    """One verdict."""

    name: str
    passed: bool
    message: str


@dataclass
class SanityReport:
    """All verdicts of one model."""

    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def add(self, name: str, passed: bool, message: str) -> bool:
        self.checks.append(Check(name, bool(passed), message))
        return bool(passed)

    def complete(self, names: Iterable[str]) -> None:
        """Give each of ``names`` that has no verdict one: what was not reached has not passed."""
        there = {check.name for check in self.checks}
        for name in names:
            if name not in there:
                self.add(name, False, "not reached")

    def lines(self) -> list[str]:
        return [f"{'pass' if c.passed else 'FAIL'}  {c.name:<20} {c.message}" for c in self.checks]

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def check_model(model: nn.Module, tokenizer: Any, report: SanityReport | None = None) -> SanityReport:
    """Run the checks on an unsharded model; its weights and gradients are left as they were found (gradients: none).

    Args:
        model: a ``Qwen3ForSeq2SeqLM``.
        tokenizer: the ``Qwen3EncoderDecoderTokenizer`` that belongs to it.
        report: verdicts so far.
    """
    report = report or SanityReport()
    device = next(model.parameters()).device
    inputs, labels = _one_example(tokenizer, device)
    was_training = model.training
    model.train()
    loss = _guarded(report, "forward", lambda: model(input_ids=inputs, labels=labels).loss)
    if loss is not None:
        report.add("forward", True, f"encoder input {list(inputs.shape)}, target {list(labels.shape)}")
        report.add(
            "loss_in_range", 0 < loss.item() < MAX_LOSS, f"loss {loss.item():.4f}, must lie in (0, {MAX_LOSS:g})"
        )
        _check_gradients(model, loss, report)
    _check_tied(model, report)
    model.eval()
    _check_generation(model, tokenizer, inputs, report)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    report.complete(CHECKS)
    return report


def _one_example(tokenizer: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """(encoder input [1, S_e], target [1, S_d]): one span of the sample text cut out."""
    tokens = tokenizer.encode_documents([SAMPLE_TEXT])[0]
    first, last = len(tokens) // 3, 2 * len(tokens) // 3
    sentinel, end = tokenizer.sentinel_ids[0], tokenizer.eos_token_id
    inputs = [*tokens[:first], sentinel, *tokens[last:], end]
    targets = [sentinel, *tokens[first:last], end]
    return torch.tensor([inputs], device=device), torch.tensor([targets], device=device)


def _guarded(report: SanityReport, name: str, work: Callable[[], Any]) -> Any:
    """``work()``, or None with a failed check that shows the error."""
    try:
        return work()
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, EncdecError) as error:
        report.add(name, False, f"{type(error).__name__}: {error}")
        return None


def _check_gradients(model: nn.Module, loss: Tensor, report: SanityReport) -> None:
    if _guarded(report, "backward", lambda: loss.backward() or True) is None:
        return
    report.add("backward", True, "done")
    for side in ("encoder", "decoder"):
        # each stack's own layers: the embedding gets gradients from both
        silent = [n for n, p in _learning(model) if n.startswith(f"{side}.layers.") and not _has_gradient(p)]
        report.add(
            f"{side}_gradients", not silent, f"none in {silent[:3]}" if silent else "every layer parameter has one"
        )
    norm = _norm(p.grad for p in model.parameters() if p.grad is not None)
    report.add("gradient_norm", 0 < norm < MAX_GRAD_NORM, f"{norm:.4f}, must lie in (0, {MAX_GRAD_NORM:g})")


def _learning(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters that must have a gradient: all, or with low-rank adapters those that they leave; an adapter's A has
    none before its B, zero at first, has moved.
    """
    if not hasattr(model, "peft_config"):
        return model.named_parameters()
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name)


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)


def _norm(gradients: Iterable[Tensor]) -> float:
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    return norm if math.isfinite(norm) else math.inf


def _check_tied(model: Any, report: SanityReport) -> None:
    places = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)
    storages = {module.weight.untyped_storage().data_ptr() for module in places}
    report.add("tied_embeddings", len(storages) == 1, f"{len(storages)} storage(s) for shared, encoder and decoder")


def _check_generation(model: Any, tokenizer: Any, inputs: Tensor, report: SanityReport) -> None:
    with torch.no_grad():
        made = _guarded(
            report,
            "generation",
            lambda: model.generate(input_ids=inputs, max_new_tokens=GENERATED_TOKENS, do_sample=False),
        )
    if made is not None:
        in_vocabulary = bool(((made >= 0) & (made < model.config.vocab_size)).all())
        report.add(
            "generation", in_vocabulary and made.shape[1] > 1, f"{made.shape[1] - 1} token(s) generated greedily"
        )
