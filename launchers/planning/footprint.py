"""What a run takes of its devices' memory and of storage, known before it runs. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from encdec.estimates import FP32_BYTES, GIGABYTE, ModelSize, estimate_rank_memory
from encdec.flops import widest_sides
from encdec.training.run_config import RunConfig

PROCESS_GB = 0.43
"""Resident memory of a rank on a CPU before it has a model: Python and the libraries, GB (measured, torch 2.13)."""
HEAP_SLACK = 0.5
"""What the heap of a rank on a CPU keeps of freed blocks and loses between them, over what comes and goes: glibc's
malloc hands little back. Measured 0.4 after 24 steps and 0.74 after 50 with a model of 4 M parameters; nothing where
malloc was told to hand all back (MALLOC_MMAP_THRESHOLD_)."""
COMES_AND_GOES = ("gradients_gb", "gathered_gb", "activations_gb", "logits_gb")
FILES_BESIDE_RANKS = 8
"""Files and folders of a checkpoint that are not one a rank, its temporary names among them."""
FILES_A_RANK = 2
SMALL_VOCABULARY = 2**16
"""Entries up to which a token of packed text takes two bytes instead of four."""


def bytes_per_value(run: RunConfig) -> int:
    """Of the computation: 2 where it is in bfloat16; processors are taken to have none that is fast."""
    return 2 if run.config.training.bf16 and run.config.infra.device == "cuda" else FP32_BYTES


def rank_memory(run: RunConfig, size: ModelSize) -> dict[str, float]:
    """``estimate_rank_memory`` of a run, for its widest batch; with one sample where the ranks find how many fit.

    Returns:
        its parts and total_gb; on a CPU also process_gb (what the process takes without a model), heap_gb (what its
        heap does not hand back) and saving_gb (the copy that is written while training goes on). Packing text, which a
        rank does before it has a model, is not counted.
    """
    training, infra, data = run.config.training, run.config.infra, run.config.data
    auto = training.per_device_train_batch_size == "auto"
    micro, accumulation = (1, run.global_batch_size // run.world_size) if auto else run.micro_batches(run.world_size)
    encoder, decoder = widest_sides(run.sample_length, run.config.model.num_sentinel_tokens, data.ul2_task_weights)
    parts = estimate_rank_memory(
        size, ranks=run.world_size, micro_batch_size=micro, encoder_length=min(encoder, data.max_encoder_length),
        decoder_length=min(decoder, data.max_decoder_length), bytes_per_value=bytes_per_value(run),
        optimizer=training.optimizer, gradient_checkpointing=infra.fsdp_activation_checkpointing,
        accumulates=accumulation > 1 and infra.distributed_type == "fsdp",
        gathered_whole=infra.fsdp_sharding_strategy == "SHARD_GRAD_OP", offloaded=infra.fsdp_cpu_offload,
        max_logits_bytes=run.config.model.max_logits_mb * 10**6,
    )  # fmt: skip
    if infra.device == "cuda":
        return parts
    copied = size.checkpoint_bytes(training.optimizer) / run.world_size if training.async_save else 0.0
    host = {
        "process_gb": PROCESS_GB,
        "heap_gb": HEAP_SLACK * sum(parts[name] for name in COMES_AND_GOES),
        "saving_gb": copied / GIGABYTE,
    }
    return parts | host | {"total_gb": parts["total_gb"] + sum(host.values())}


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What a run directory grows to, at its most."""

    checkpoint_gb: float
    """One checkpoint, GB of 10**9 bytes."""
    checkpoints: int
    """That lie there at the same time."""
    disk_gb: float
    """All of them and the average at the end, GB."""
    inodes: int
    """Files and folders of checkpoints."""
    packed_gb: float
    """Text that the run reads, once packed, GB. Runs of the same text share it."""


def storage_of(run: RunConfig, size: ModelSize) -> Storage:
    """The storage that a run needs."""
    each, count = size.checkpoint_bytes(run.config.training.optimizer), most_checkpoints(run)
    return Storage(
        checkpoint_gb=each / GIGABYTE,
        checkpoints=count,
        disk_gb=(count * each + average_bytes(run, size)) / GIGABYTE,
        inodes=most_files(run),
        packed_gb=packed_bytes(run, size) / GIGABYTE,
    )


def average_bytes(run: RunConfig, size: ModelSize) -> int:
    """Of the average of the last checkpoints, which a run makes at its end."""
    return FP32_BYTES * size.parameters if run.config.training.average_last >= 2 else 0


def packed_bytes(run: RunConfig, size: ModelSize) -> int:
    """Of the tokens that a run reads."""
    return run.num_train_steps * run.tokens_per_step * (2 if size.vocabulary <= SMALL_VOCABULARY else 4)


def most_files(run: RunConfig) -> int:
    """Files and folders of all checkpoints and the average, at the same time."""
    return (most_checkpoints(run) + 1) * (FILES_A_RANK * run.world_size + FILES_BESIDE_RANKS)


def most_checkpoints(run: RunConfig) -> int:
    """Step checkpoints that lie there at the same time: those that are kept and one that is being written.

    Kept are ``save_total_limit``, or the newest, the best and those of the average at the end if they are more.
    """
    training = run.config.training
    averaged = training.average_last if training.average_last >= 2 else 0
    best = 1 if training.eval_samples and run.config.data.validation_fraction else 0
    kept = max(training.save_total_limit, averaged + best + 1)
    if training.save_every == "steps":
        kept = min(kept, -(-run.num_train_steps // training.save_steps) + 1)  # and one that a signal asks for
    return kept + 1
