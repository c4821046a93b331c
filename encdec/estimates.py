"""Arithmetic about runs, without torch: steps, tokens, hours. The plan and the trainer share it."""

from __future__ import annotations


def estimate_steps_for_tokens(
    num_tokens: int,
    batch_size: int,
    seq_length: int,
    gradient_accumulation_steps: int = 1,
    num_gpus: int = 1,
) -> int:
    """Whole optimizer steps that ``num_tokens`` tokens feed (floor).

    Args:
        num_tokens: raw tokens, padding not counted.
        batch_size: samples per rank and micro-batch.
        seq_length: raw tokens per sample.
        gradient_accumulation_steps: micro-batches per optimizer step.
        num_gpus: ranks in the whole job (the world size).
    """
    return num_tokens // (batch_size * seq_length * gradient_accumulation_steps * num_gpus)


def estimate_training_time(num_steps: int, step_time_seconds: float) -> dict[str, float]:
    """Wall time of ``num_steps`` steps in seconds, minutes, hours and days."""
    seconds = num_steps * step_time_seconds
    return {"seconds": seconds, "minutes": seconds / 60, "hours": seconds / 3600, "days": seconds / 86400}
