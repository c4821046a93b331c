"""How fast a run could be at most, for its model FLOPs utilization."""

from __future__ import annotations

from encdec.flops import ACCELERATORS, accelerator_in, training_flops_per_sample
from encdec.training.model_sizes import model_size
from encdec.training.run_config import RunConfig


def step_seconds_at_peak(run: RunConfig, ranks: int, device_name: str) -> float | None:
    """Seconds of a step whose matrix products ran at the GPUs' bfloat16 peak; None where that is not known.

    Args:
        device_name: as its driver calls it: "NVIDIA H100 80GB HBM3".
    """
    size, accelerator = model_size(run.config.model), accelerator_in(device_name)
    if size is None or accelerator is None:
        return None
    sample = training_flops_per_sample(
        size, run.sample_length, run.config.model.num_sentinel_tokens, run.config.data.ul2_task_weights
    )
    return run.global_batch_size * sample / (ranks * ACCELERATORS[accelerator].bf16_flops)
