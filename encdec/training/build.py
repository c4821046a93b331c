"""Resolved run -> model, trainer: what one rank assembles before it trains."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from encdec import distributed
from encdec.adapters import AdaptedWeights, add_adapters
from encdec.checkpoints import CheckpointManager, DriveCheckpointManager
from encdec.checkpoints.payload import payload_named
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.data.collator import UL2DataCollator
from encdec.data.packing import open_packed
from encdec.data.sampler import GlobalBatchSampler
from encdec.data.ul2_dataset import EvaluationBatches, UL2Dataset, build_dataloader
from encdec.errors import FencedError
from encdec.files import RunPaths
from encdec.initialization.source import model_type_of
from encdec.initialization.streams import Stream, fill, give_memory, is_empty
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.records import JsonLinesWriter, event
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training import sharding
from encdec.training.alerts import Notifier, Watch
from encdec.training.attention_choice import attention_by_rule, settle_attention
from encdec.training.auto_batch import settle_micro_batch
from encdec.training.config import FullConfig
from encdec.training.engines import start_engine
from encdec.training.execution import LoopGates
from encdec.training.notifications import Sender, open_addresses, wants_notifications
from encdec.training.observers import Observer, Records, TextLog
from encdec.training.rules import require_memory
from encdec.training.run_config import RunConfig
from encdec.training.saving import averaged, averaged_from, kept_for_roll_back
from encdec.training.signals import Requests
from encdec.training.tracking.observer import TrackerObserver
from encdec.training.tracking.speed import step_seconds_at_peak
from encdec.training.trainer import Qwen3EncoderDecoderTrainer
from encdec.upcycling import expert_fields, experts_model, plan_experts
from encdec.weight_initialization import (
    UnfilledModel,
    allocate,
    describe_pretrained,
    plan_from_pretrained,
    plan_from_scratch,
)

log = logging.getLogger("encdec.train")
SECONDS_BETWEEN_LOOKS = 0.05


def plan_model(config: FullConfig, tokenizer: Qwen3EncoderDecoderTokenizer) -> UnfilledModel:
    """The model that the configuration describes, its parameters on the meta device, and the stream of the values that
    they start from; both the same on every rank.

    Raises:
        ConfigError: the model and the tokenizer do not fit each other, or the weights do not fit this node's memory.
        MissingPrerequisite: its files are not there.
    """
    settings = config.model
    if settings.from_scratch is None:
        plan = plan_from_pretrained(settings.model_name_or_path, settings.num_sentinel_tokens, tokenizer=tokenizer)
        if settings.n_experts is not None:
            plan = plan_experts(plan, settings, config.training.seed)
    else:
        plan = plan_from_scratch(_described(config, tokenizer), config.training.seed)
    adapters = _add_adapters(plan.model, config)
    model = _checked(plan.model, config, tokenizer)
    if not adapters:
        return UnfilledModel(model, plan.weights)
    return UnfilledModel(model, AdaptedWeights(plan.weights, dict(model.named_parameters()), adapters))


def empty_model(config: FullConfig, tokenizer: Qwen3EncoderDecoderTokenizer) -> Qwen3ForSeq2SeqLM:
    """As ``plan_model``, but the model alone: its weights come from elsewhere, and the configured ones are not read."""
    settings = config.model
    if settings.from_scratch is None:
        model = describe_pretrained(settings.model_name_or_path, settings.num_sentinel_tokens, tokenizer=tokenizer)
        if settings.n_experts is not None:
            model = experts_model(model, settings)
    else:
        model = allocate(_described(config, tokenizer), torch.float32, meta=True)
    _add_adapters(model, config)
    return _checked(model, config, tokenizer)


def build_model(config: FullConfig, tokenizer: Qwen3EncoderDecoderTokenizer) -> Qwen3ForSeq2SeqLM:
    """The whole model on the host, fp32, with the weights that the configuration names; the same on every rank."""
    return plan_model(config, tokenizer).filled()


def _described(config: FullConfig, tokenizer: Qwen3EncoderDecoderTokenizer) -> Qwen3EncoderDecoderConfig:
    """The model of model.from_scratch."""
    settings = config.model
    assert settings.from_scratch is not None
    place = os.environ
    require_memory(
        settings.from_scratch, len(tokenizer), ranks=int(place.get("LOCAL_WORLD_SIZE", 1)),
        world_size=int(place.get("WORLD_SIZE", 1)), on_host=config.infra.device == "cpu",
        memory=psutil.virtual_memory().total, n_experts=settings.n_experts,
    )  # fmt: skip
    return Qwen3EncoderDecoderConfig(
        vocab_size=len(tokenizer),
        num_sentinel_tokens=settings.num_sentinel_tokens,
        sentinel_start_id=tokenizer.sentinel_ids[0],
        mode_token_ids=tokenizer.mode_token_ids or None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.decoder_start_token_id,
        **settings.from_scratch.model_dump(),
        **expert_fields(settings),
    )


def _checked(
    model: Qwen3ForSeq2SeqLM, config: FullConfig, tokenizer: Qwen3EncoderDecoderTokenizer
) -> Qwen3ForSeq2SeqLM:
    tokenizer.assert_matches(model.config)
    model.set_attn_implementation(attention_by_rule(config))
    return _as_configured(model, config)


def _as_configured(model: Qwen3ForSeq2SeqLM, config: FullConfig) -> Qwen3ForSeq2SeqLM:
    """How a model computes, whatever its weights and its attention."""
    model.max_logits_bytes = config.model.max_logits_mb * 10**6
    if config.infra.fsdp_activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _add_adapters(model: Qwen3ForSeq2SeqLM, config: FullConfig) -> dict[str, Tensor]:
    """Put in those that are configured; their first values by name."""
    if config.model.lora is None:
        return {}
    name = config.model.model_name_or_path
    is_base = not config.model.from_scratch and Path(name).is_dir() and model_type_of(Path(name)) == "qwen3_encdec"
    return add_adapters(model, config.model.lora, config.training.seed, name if is_base else None)


def empty_twin(model: Qwen3ForSeq2SeqLM, config: FullConfig) -> Qwen3ForSeq2SeqLM:
    """A model that computes as ``model`` does, without memory for its weights yet (on the meta device)."""
    with torch.device("meta"):
        twin = type(model)(model.config)
    _add_adapters(twin, config)
    return _as_configured(twin, config)


def whole_copy(model: Qwen3ForSeq2SeqLM, config: FullConfig, read: Callable[[], Stream] | None) -> Qwen3ForSeq2SeqLM:
    """The model itself where it is whole already; else one like it on the host, fp32, with the values that ``read``
    gives."""
    if not is_empty(model) or read is None:
        return model
    copy = allocate(model.config, torch.float32, meta=True)
    _add_adapters(copy, config)
    _as_configured(copy, config)
    give_memory(copy, torch.device("cpu"))
    fill(copy, read())
    return copy


def build_trainer(
    run: RunConfig,
    paths: RunPaths,
    *,
    attempt: int,
    restart: int,
    tokenizer: Qwen3EncoderDecoderTokenizer,
    packed: Path,
    model: Qwen3ForSeq2SeqLM,
    read: Callable[[], Stream] | None = None,
    device: torch.device,
    requests: Requests,
    gates: LoopGates | None = None,
) -> Qwen3EncoderDecoderTrainer:
    """Shard, prove the sharding, and put the trainer together; collective.

    Args:
        model: whole on the host, or with its parameters on the meta device.
        read: opens the stream of the latter's values; None where a checkpoint brings them.
        gates: judged while training goes on; None: those of the phase, QUICK where there is none.
    """
    judged = gates or (run.phase.gates_in_loop if run.phase else LoopGates())
    config = run.config.model_copy(deep=True)
    dtype = sharding.compute_dtype(config.training, device)
    rank, world = distributed.rank(), distributed.world_size()
    if isinstance(model, Qwen3ForSeq2SeqLM):  # a factory's model has whatever attention it has
        settle_attention(model, config, paths, attempt, device=device, dtype=dtype)
    micro, accumulation = settle_micro_batch(
        run, paths, attempt, device=device, dtype=dtype, make_twin=lambda: empty_twin(model, config)
    )
    if config.training.per_device_train_batch_size == "auto":
        config.training.per_device_train_batch_size = micro
    if not is_empty(model):
        model.to(device)
    engine = start_engine(
        model, config, device=device, dtype=dtype, micro_batch_size=micro, accumulation_steps=accumulation,
        stream=read() if read and is_empty(model) else None,
    )  # fmt: skip
    log.info("%s, computing in %s", engine.prove_sharding(world), dtype)
    dataset = UL2Dataset(open_packed(packed, "train"))
    collator = make_collator(config, tokenizer, run.data_seed)
    sampler = GlobalBatchSampler(len(dataset), run.global_batch_size, micro, rank, world, run.data_seed)
    loader = build_dataloader(
        dataset, collator, sampler, num_workers=config.data.dataloader_num_workers, pin_memory=device.type == "cuda"
    )
    trainer = Qwen3EncoderDecoderTrainer(
        model,
        tokenizer,
        config,
        loader,
        # corrupted alike in all phases, so that their losses on it compare
        evaluation_batches(config, packed, make_collator(config, tokenizer, config.training.seed)),
        engine=engine,
        checkpoints=checkpoint_manager(run, paths, attempt, engine.payload),
        sample_length=run.sample_length,
        total_steps=run.num_train_steps,
        warmup_steps=run.warmup_steps,
        gates=judged.levels,
        custom_gates=judged.custom,
        requests=requests,
        observers=observers(run, paths, attempt, len(dataset), device) if rank == 0 else (),
        attempt=attempt,
        restart=restart,
    )
    if rank == 0:
        trainer.observers.append(Watch.from_config(config.training, trainer.schedule, trainer.observers))
    return trainer


def make_collator(config: FullConfig, tokenizer: Qwen3EncoderDecoderTokenizer, seed: int) -> UL2DataCollator:
    """Corrupts and pads as the configuration says."""
    return UL2DataCollator(
        tokenizer,
        config.data.max_encoder_length,
        config.data.max_decoder_length,
        task_weights=tuple(config.data.ul2_task_weights),
        seed=seed,
        mode_token_ids=tokenizer.mode_token_ids,
    )


def checkpoint_manager(run: RunConfig, paths: RunPaths, attempt: int, payload: str) -> CheckpointManager:
    """Of the run's ``checkpoints/``, with the mirror that the configuration asks for.

    Args:
        payload: name of what the engine is saved as.
    """
    training, mirror = run.config.training, run.config.infra.checkpoint_mirror
    options: dict[str, Any] = {
        "payload": payload_named(payload),
        "averaged": max(averaged(training), kept_for_roll_back(training)),
        "averaged_from": 0 if training.max_rollbacks else averaged_from(training, run.num_train_steps),
        "attempt": attempt,
        "run_identity": run.identity,
        "fence": fence(paths, attempt),
    }
    if mirror is None:
        return CheckpointManager(paths.checkpoints, training.save_total_limit, **options)
    ledger = paths.attempt(attempt).events("mirror")

    def report(kind: str, **facts: Any) -> None:
        with JsonLinesWriter(ledger) as writer:
            writer.write(event(kind, **facts))

    folder = f"{mirror.rstrip('/')}/{run.mirror_folder}"
    log.info("checkpoints are copied to %s", folder)
    return DriveCheckpointManager(folder, paths.checkpoints, training.save_total_limit, report=report, **options)


def evaluation_batches(
    config: FullConfig, packed: Path, collator: UL2DataCollator, *, alone: bool = False
) -> EvaluationBatches | None:
    """The same held-out batches at every evaluation, as many on each rank; None where evaluation is switched off.

    Args:
        alone: all of them for this rank, whatever the others do.
    """
    if not config.training.eval_samples or not config.data.validation_fraction:
        return None
    held_out = open_packed(packed, "validation")
    if not len(held_out):
        log.warning("no evaluation: the held-out documents are shorter than one sample")
        return None
    return EvaluationBatches(
        held_out,
        collator,
        max_samples=config.training.eval_samples,
        batch_size=config.training.per_device_eval_batch_size,
        rank=0 if alone else distributed.rank(),
        world_size=1 if alone else distributed.world_size(),
    )


def observers(
    run: RunConfig, paths: RunPaths, attempt: int, samples_per_epoch: int, device: torch.device | None = None
) -> list[Observer]:
    """Who is told about the steps: the records always, trackers and people as configured.

    Args:
        samples_per_epoch: in the training split.
        device: rank 0's.
    """
    files = paths.attempt(attempt)
    infra, training = run.config.infra, run.config.training
    told: list[Observer] = [
        Records(files.steps, files.events("rank-0")),
        TextLog(run.num_train_steps, training.logging_steps),
    ]
    device_name = torch.cuda.get_device_name(device) if device and device.type == "cuda" else ""
    for tracker in dict.fromkeys(training.report_to):
        told.append(
            TrackerObserver.of_run(
                tracker, paths, logging_steps=training.logging_steps, total_steps=run.num_train_steps,
                samples_per_epoch=samples_per_epoch,
                step_seconds_at_peak=step_seconds_at_peak(run, distributed.world_size(), device_name),
            )
        )  # fmt: skip
    if wants_notifications(infra.notify_env, infra.notify_file):
        sender = Sender(open_addresses(infra.notify_env, infra.notify_file))
        told.append(Notifier(run.name, attempt, sender))
    return told


def fence(paths: RunPaths, attempt: int) -> Callable[[], None]:
    """Raises, just before a commit, if a newer attempt has begun: ranks cut off from their cluster may still live."""

    def check() -> None:
        newest = paths.newest_attempt()
        if newest is not None and newest > attempt:
            raise FencedError(
                "Only the newest attempt of a run may write",
                found=f"attempt {attempt}, while attempt {newest} has begun",
                remedy="Nothing to do: the newer attempt goes on",
            )

    return check
