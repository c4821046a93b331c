"""Arithmetic about runs, without torch: steps, tokens, hours. The plan and the trainer share it."""

from __future__ import annotations

import math


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


def daly_interval_seconds(cost_seconds: float, mean_time_to_interrupt_seconds: float) -> float:
    """Seconds of work between two checkpoints that lose the least, for interrupts at random (Poisson).

    The higher-order optimum of J. T. Daly, Future Generation Computer Systems 22 (2006), equation 37.

    Args:
        cost_seconds: for which work stands still at a checkpoint.
        mean_time_to_interrupt_seconds: of the whole job.
    """
    cost, mean = cost_seconds, mean_time_to_interrupt_seconds
    if cost >= 2 * mean:
        return mean
    share = cost / (2 * mean)
    return math.sqrt(2 * cost * mean) * (1 + math.sqrt(share) / 3 + share / 9) - cost


def checkpoint_interval_seconds(
    blocking_seconds: float, total_seconds: float, mean_time_to_interrupt_seconds: float
) -> float:
    """As ``daly_interval_seconds``, for checkpoints that are written beside the work.

    At least twice ``total_seconds``, what one takes to its commit: only one is written at a time, and storage and
    processors are left to the work for half of the time or more.
    """
    return max(daly_interval_seconds(blocking_seconds, mean_time_to_interrupt_seconds), 2 * total_seconds)
