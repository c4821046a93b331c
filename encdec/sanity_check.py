"""Does a model do all that training and generation will ask of it? Ten checks, a verdict each.

python -m encdec.sanity_check --model-path DIR [--device cpu]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from encdec.command_line import Parser, exit_code_of
from encdec.errors import EncdecError, MissingPrerequisite

SAMPLE_TEXT = "def greet(name):\n    return 'Hello, ' + name\n\nprint(greet('world'))\n"
MAX_LOSS = 100.0
MAX_GRAD_NORM = 1000.0
GENERATED_TOKENS = 8


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
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
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


def check_saved_model(path: str, device: str) -> SanityReport:
    """Load a saved model and its tokenizer, then run the checks."""
    from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
    from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer

    report = SanityReport()
    try:
        model = Qwen3ForSeq2SeqLM.from_pretrained(path).to(device)
        report.add("model_loads", True, f"{sum(p.numel() for p in model.parameters()):,} parameters")
    except (OSError, ValueError, RuntimeError, EncdecError) as error:
        report.add("model_loads", False, f"{path}: {' '.join(str(error).split())[:300]}")
        return report
    try:
        tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(path)
        tokenizer.assert_matches(model.config)
        report.add("tokenizer_loads", True, f"{len(tokenizer):,} tokens")
    except (OSError, ValueError, RuntimeError, EncdecError) as error:
        report.add("tokenizer_loads", False, f"{path}: {' '.join(str(error).split())[:300]}")
        return report
    return check_model(model, tokenizer, report)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if all checks pass, 1 if one fails, 78 for a command line that is not understood."""
    return exit_code_of(lambda: check_and_show(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m encdec.sanity_check",
        description="Ten checks of a saved model; exit 1 if one fails.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model-path", required=True, help="folder with model and tokenizer as save_pretrained writes them"
    )
    parser.add_argument("--device", default="cpu", help="torch device, for example cpu or cuda:0 (default: cpu)")
    return parser.parse_args(argv)


def require_device(name: str) -> None:
    """Refuse a device that torch does not know or this machine does not have.

    Raises:
        MissingPrerequisite: nothing can be put there.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise MissingPrerequisite(
            "--device must be a torch device of this machine",
            found=f"{name!r} ({str(error).splitlines()[0].rstrip('.')})",
            remedy="Use --device cpu",
        ) from None


def check_and_show(arguments: argparse.Namespace) -> int:
    require_device(arguments.device)
    report = check_saved_model(arguments.model_path, arguments.device)
    print("\n".join(report.lines()))
    print("all checks passed" if report.passed else "sanity check FAILED")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
