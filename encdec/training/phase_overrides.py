"""The ``phases:`` section: what a file changes in a row of the phase table, gates of one's own among it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from encdec.gates import END_METRICS, LOOP_METRICS, Comparison
from encdec.training.config_section import PositiveFloat, PositiveInt, Section


class CustomGate(Section):
    """A bound of one's own on what the training loop measures, from the end of warm-up.

    It is judged in the place of the gates of the same name, or else at scheduled checkpoints.
    """

    name: Annotated[str, Field(min_length=1)]
    """What it is called."""
    metric_name: str
    """While training: loss, loss_decrease, grad_norm, perplexity, eval_loss, nan_count or tokens_per_second. At the
    end of the phase, by an evaluator: accuracy, denoising_exact_match, latency_p50, latency_p99, arithmetic_accuracy,
    tool_accuracy, safety_accuracy or gsm8k_accuracy."""
    threshold: float
    """The bound, in the metric's unit (nats, tokens per second)."""
    comparison: Comparison = "<"
    """How the metric must compare with it."""
    required: bool = True
    """Whether training ends if it does not pass; otherwise that is only told."""
    description: str = ""
    """Why it is asked for."""

    @field_validator("metric_name")
    @classmethod
    def _is_measured(cls, value: str) -> str:
        if value not in LOOP_METRICS + END_METRICS:
            raise ValueError(f"it must be measured: {', '.join(LOOP_METRICS + END_METRICS)}")
        return value


class PhaseOverrides(Section):
    """What a YAML file changes in a phase's table row. None leaves the table's value."""

    num_tokens: PositiveInt | None = None
    """Raw tokens of the phase."""
    num_train_steps: PositiveInt | None = None
    """Optimizer steps of the phase."""
    eval_steps: PositiveInt | None = None
    """Steps between evaluations."""
    save_steps: PositiveInt | None = None
    """Steps between checkpoints."""
    logging_steps: PositiveInt | None = None
    """Steps between lines of the text log."""
    max_loss_after_warmup: PositiveFloat | None = None
    """Highest loss allowed after warm-up, nats."""
    min_loss_decrease: float | None = None
    """Least fall of the loss from the first steps to the last, nats."""
    gates: list[Literal["quick", "standard", "full", "production"]] | None = None
    """Gates judged while training, quick every ``training.gate_steps`` and standard at scheduled checkpoints, and at
    the end of the phase, full and production, whose suites ``data.eval_benchmarks`` names."""
    custom_gates: list[CustomGate] | None = None
    """Gates of one's own, beside those or in their place."""

    @field_validator("custom_gates")
    @classmethod
    def _names_differ(cls, value: list[CustomGate] | None) -> list[CustomGate] | None:
        names = [gate.name for gate in value or ()]
        if len(set(names)) < len(names):
            raise ValueError("custom gates must have different names")
        return value
