"""Memory of a device: what is used, what a model will need, and the largest batch that fits, found by trying."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from encdec.errors import ConfigError, EncdecError
from encdec.estimates import GIGABYTE, estimate_memory

log = logging.getLogger("encdec.train")
SIGNS_OF_FULL_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In a RuntimeError: of the CPU's allocator, of CUDA's driver, of cuBLAS, which has no memory for its workspace."""


def get_memory_stats() -> dict[str, Any]:
    """Memory of the current GPU, GB of 10**9 bytes: gpu_available, allocated_gb, reserved_gb, max_allocated_gb.

    Without a GPU, ``gpu_available`` alone, False.
    """
    if not torch.cuda.is_available():
        return {"gpu_available": False}
    return {
        "gpu_available": True,
        "allocated_gb": torch.cuda.memory_allocated() / GIGABYTE,
        "reserved_gb": torch.cuda.memory_reserved() / GIGABYTE,
        "max_allocated_gb": torch.cuda.max_memory_allocated() / GIGABYTE,
    }


def log_memory_stats(prefix: str = "") -> None:
    """One line of the text log with ``get_memory_stats``."""
    stats = get_memory_stats()
    before = f"{prefix}: " if prefix else ""
    if not stats["gpu_available"]:
        log.info("%sno GPU", before)
        return
    log.info(
        "%sGPU memory: %.2f GB allocated, %.2f GB reserved, %.2f GB at most",
        before, stats["allocated_gb"], stats["reserved_gb"], stats["max_allocated_gb"],
    )  # fmt: skip


def clear_memory() -> None:
    """Free what nothing refers to any more, and hand the GPU's cached blocks back to its driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def estimate_model_memory(
    num_params: int,
    batch_size: int,
    seq_length: int,
    hidden_size: int,
    num_layers: int,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: str = "adamw",
    gradient_checkpointing: bool = True,
) -> dict[str, float]:
    """Memory to train a model in one process: ``encdec.estimates.estimate_memory``, which explains the terms.

    Within 10 % of what a small model of ours allocates at its peak, logits set aside (tests/encdec/training).

    Returns:
        model_gb, optimizer_gb, gradient_gb, activation_gb, total_gb; GB of 10**9 bytes.

    Raises:
        ConfigError: an optimizer or a precision that the estimate does not know.
    """
    return estimate_memory(
        num_params, batch_size, seq_length, hidden_size, num_layers,
        bytes_per_value=dtype.itemsize, optimizer=optimizer, gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip


def auto_find_batch_size(
    model: nn.Module,
    sample_batch_fn: Callable[[int], Any],
    start_batch_size: int = 32,
    min_batch_size: int = 1,
) -> int:
    """The first of ``start_batch_size``, its half, its quarter, ... with which a forward and a backward pass fit.

    For a model in one process. Its gradients are gone afterwards, its mode and the random generators as before. The
    optimizer's state has to be there already to be counted.

    Args:
        model: called with the batch, as keyword arguments where it is a mapping; returns a loss or something with one.
        sample_batch_fn: batch size -> a batch; tensors are moved to the model's device.
        start_batch_size: samples, tried first.
        min_batch_size: samples, tried last if it comes to that.

    Raises:
        ConfigError: a size below 1, or a minimum above the start.
        EncdecError: not even ``min_batch_size`` fits.
    """
    if not 1 <= min_batch_size <= start_batch_size:
        raise ConfigError(
            "min_batch_size must be 1 or more, and start_batch_size no less",
            found=f"{min_batch_size} and {start_batch_size}",
            remedy="Correct one of the two",
        )

    def attempt(size: int) -> None:
        try:
            _forward_backward(model, sample_batch_fn(size))
        finally:
            model.zero_grad(set_to_none=True)

    modes = {module: module.training for module in model.modules()}
    with kept_randomness():
        model.train()
        try:
            return first_that_fits(halves(start_batch_size, min_batch_size), attempt)
        finally:
            for module, mode in modes.items():
                module.training = mode


def halves(start: int, least: int) -> Iterator[int]:
    """``start``, its half and so on, whole numbers, down to ``least``, which comes last."""
    while start > least:
        yield start
        start //= 2
    yield least


def first_that_fits(sizes: Iterable[int], attempt: Callable[[int], object]) -> int:
    """The first of ``sizes``, largest first, at which ``attempt(size)`` does not run out of memory.

    Raises:
        EncdecError: none does.
    """
    size = 0
    for size in sizes:
        if fits(lambda size=size: attempt(size)):  # type: ignore[misc]
            clear_memory()
            return size
        clear_memory()  # here, where no frame of the failed attempt is alive any more
        log.info("a batch of %d does not fit in memory", size)
    raise EncdecError(
        "The smallest batch must fit in memory",
        found=f"out of memory with {size} sample{'s' * (size != 1)}",
        remedy="Lower data.max_encoder_length and data.max_decoder_length, switch on "
        "infra.fsdp_activation_checkpointing, or shard over more ranks",
    )


def fits(work: Callable[[], object]) -> bool:
    """Whether ``work`` runs to its end; False where it runs out of memory. Any other error is raised."""
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was full: of a GPU (``torch.OutOfMemoryError``) or, where its allocator says so, of the host.

    DTensor raises an error of its own from the one that it met.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_FULL_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards all generators are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _forward_backward(model: nn.Module, batch: Any) -> None:
    device = next(model.parameters()).device
    batch = _moved(batch, device)
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = output if isinstance(output, Tensor) else output["loss"] if isinstance(output, Mapping) else output.loss
    loss.sum().backward()


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return batch
