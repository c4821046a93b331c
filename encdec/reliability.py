"""How much of a run's time trains it, on machines that fail: arithmetic, without torch.

The effective training time ratio (ETTR) is productive time over the wall time of a job, what is computed twice counted
once (Kokolis et al. 2024, arXiv:2410.21680, section II-D). Interrupts come at random (Poisson) with a mean time between
them; all times are seconds.
"""

from __future__ import annotations

import math

from encdec.errors import ConfigError

DAY_SECONDS = 86_400.0


def mean_time_to_interrupt(nodes: int, failures_per_thousand_node_days: float) -> float:
    """Seconds between interrupts of a job that any of its nodes interrupts; infinite where nothing fails.

    Args:
        nodes: of the job.
        failures_per_thousand_node_days: of one node; Kokolis et al. count 6.50 and 2.34 on two clusters of A100s of 8
            GPUs a node, the 419 unexpected interrupts of Llama 3's 54 days (arXiv:2407.21783, table 5) make 3.79.

    Raises:
        ConfigError: fewer than one node, or a negative rate.
    """
    if nodes < 1 or not failures_per_thousand_node_days >= 0:
        raise ConfigError(
            "A failure rate must not be negative, and a job has at least one node",
            found=f"{failures_per_thousand_node_days} failures per 1,000 node-days, {nodes} nodes",
            remedy="Correct one of the two",
        )
    if failures_per_thousand_node_days == 0:
        return math.inf
    return 1000 * DAY_SECONDS / (failures_per_thousand_node_days * nodes)


def expected_ettr(
    interval_seconds: float,
    mean_time_to_interrupt_seconds: float,
    *,
    blocking_seconds: float = 0.0,
    recovery_seconds: float = 0.0,
    commit_seconds: float = 0.0,
) -> float:
    """ETTR of a long run, 0 to 1: exact where interrupts are Poisson and may also meet a recovery.

    t / (M e^(R/M) (e^((t + d)/M) - 1)) of J. T. Daly, Future Generation Computer Systems 22 (2006), equation 13, with
    t, M, d and R the four arguments in their order. 0 where there is hardly any progress.

    Args:
        interval_seconds: of training between two checkpoints.
        mean_time_to_interrupt_seconds: of the whole job; ``math.inf`` where nothing interrupts it.
        blocking_seconds: for which training stands still at a checkpoint.
        recovery_seconds: from an interrupt to the next training step: noticed, queued, started, loaded.
        commit_seconds: from the end of that stand-still until the checkpoint is one: what interrupts the job meanwhile
            loses the interval before, too. Counted as a longer recovery, which is right to first order.

    Raises:
        ConfigError: an interval or a mean time that is not positive, or another time that is negative.
    """
    interval, mean, cost = interval_seconds, mean_time_to_interrupt_seconds, blocking_seconds
    recovery = recovery_seconds + commit_seconds
    if not (interval > 0 and mean > 0 and min(cost, recovery_seconds, commit_seconds) >= 0):
        raise ConfigError(
            "An interval and a mean time to interrupt must be positive, and costs not negative",
            found=f"{interval} s, {mean} s; {cost}, {recovery_seconds} and {commit_seconds} s",
            remedy="Correct what is out of its range",
        )
    if math.isinf(mean):
        return interval / (interval + cost)
    exponents = recovery / mean, (interval + cost) / mean
    if sum(exponents) > 700:  # beyond what a float holds: no interval is ever finished
        return 0.0
    return interval / (mean * math.exp(exponents[0]) * math.expm1(exponents[1]))


def first_order_ettr(
    interval_seconds: float,
    mean_time_to_interrupt_seconds: float,
    *,
    blocking_seconds: float = 0.0,
    recovery_seconds: float = 0.0,
) -> float:
    """As ``expected_ettr``, as Kokolis et al. print it: (1 - (R + t/2)/M) / (1 + d/t), for small losses; at least 0."""
    lost = (recovery_seconds + interval_seconds / 2) / mean_time_to_interrupt_seconds
    return max(0.0, 1 - lost) / (1 + blocking_seconds / interval_seconds)


def share_of_jobs(
    limit_seconds: float, *, startup_seconds: float = 0.0, stop_seconds: float = 0.0, queue_seconds: float = 0.0
) -> float:
    """What time limits leave of a run that is cut into jobs, 0 to 1: ``expected_ettr`` is multiplied by it.

    Args:
        limit_seconds: of one job; ``math.inf`` where there is none.
        startup_seconds: of a job until its first step.
        stop_seconds: of a job's last save, training not counted.
        queue_seconds: for which a job waits.
    """
    if math.isinf(limit_seconds):
        return 1.0
    return max(0.0, limit_seconds - startup_seconds - stop_seconds) / (limit_seconds + queue_seconds)
