"""Rules that the configuration must keep beyond each key's own: between keys, and what this version can honour."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from encdec.errors import ConfigError, MissingPrerequisite
from encdec.gates import END_METRICS
from encdec.training.config import ArchitectureConfig, FullConfig, TrainingConfig
from encdec.training.deepspeed_config import embed_file
from encdec.vocabulary import BYTE_ALPHABET_SIZE, smallest_vocabulary

INSTALL_PEFT = 'python -m pip install "peft>=0.21"'
INSTALL_DEEPSPEED = 'python -m pip install --no-build-isolation "deepspeed>=0.19.8"'


def check_rules(config: FullConfig) -> None:
    """All of them.

    Raises:
        ConfigError: one is broken; names the keys.
    """
    refuse_what_is_not_built(config)
    _require_room_in_vocabulary(config)
    _require_positions(config)
    _require_local_models(config)
    require_no_password("infra.checkpoint_mirror", config.infra.checkpoint_mirror or "")
    _require_one_engine(config)
    _require_global_batch(config)
    _require_suites(config)


def _require_suites(config: FullConfig) -> None:
    """Files that are read at the end of a phase must be there before its beginning."""
    for metric, name in config.data.eval_benchmarks.items():
        if metric not in END_METRICS:
            raise ConfigError(
                f"data.eval_benchmarks names metrics: {', '.join(END_METRICS)}", found=metric, remedy="Correct the name"
            )
        if not Path(name).is_file():
            raise ConfigError(
                f"data.eval_benchmarks.{metric} must be a file",
                found=f"{name}, and no file at {Path(name).absolute()}",
                remedy="Correct the path; python -m encdec.pipeline suite makes a small one of some metrics",
            )


def require_memory(
    shape: ArchitectureConfig, vocab_size: int, *, ranks: int, world_size: int, on_host: bool, memory: int,
    n_experts: int | None = None,
) -> None:  # fmt: skip
    """Each rank of a node holds its shards, on the host where that computes, and while they are filled one whole
    parameter, in fp32.

    Args:
        ranks: ranks on this node.
        world_size: ranks in all.
        on_host: whether the ranks compute on the host; else the shards are in the memory of GPUs.
        memory: the node's, bytes.
        n_experts: feed-forwards of each layer, where there are several.

    Raises:
        ConfigError: that alone does not fit.
    """
    parameters = count_parameters(shape, vocab_size, n_experts)
    stacked = 2 * shape.intermediate_size * (n_experts or 1)
    largest = max(vocab_size, stacked, shape.head_dim * shape.num_attention_heads) * shape.hidden_size
    needed = 4 * ranks * (largest + (parameters // world_size if on_host else 0))
    if needed > memory:
        raise ConfigError(
            f"The weights of model.from_scratch in fp32, sharded, must fit this node's {memory / 1e9:,.0f} GB",
            found=f"{parameters:,} parameters over {world_size} ranks, {ranks} of them here: {needed / 1e9:,.0f} GB",
            remedy="Lower the sizes of model.from_scratch, or use more nodes",
        )


def count_parameters(shape: ArchitectureConfig, vocab_size: int, n_experts: int | None = None) -> int:
    """Parameters of the encoder-decoder: two stacks alike and one embedding, which is the head as well."""
    return 2 * count_stack_parameters(shape, n_experts) + vocab_size * shape.hidden_size


def count_stack_parameters(shape: ArchitectureConfig, n_experts: int | None = None) -> int:
    """Parameters of the encoder, and of the decoder: Qwen3 layers and a last norm, without the embedding.

    Args:
        n_experts: feed-forwards of each layer, and a row of its router for each; None: one, and no router.
    """
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    attention = 2 * shape.hidden_size * shape.head_dim * (heads + kv_heads) + 2 * shape.head_dim
    router = (n_experts or 0) * shape.hidden_size
    layer = attention + (n_experts or 1) * count_feed_forward_parameters(shape) + router + 2 * shape.hidden_size
    return shape.num_hidden_layers * layer + shape.hidden_size


def count_feed_forward_parameters(shape: ArchitectureConfig) -> int:
    """Parameters of one gated feed-forward: a layer's, or one expert."""
    return 3 * shape.hidden_size * shape.intermediate_size


def _require_room_in_vocabulary(config: FullConfig) -> None:
    """A trained tokenizer has at least its bytes, padding, end and sentinels."""
    size, sentinels = config.model.train_tokenizer_vocab_size, config.model.num_sentinel_tokens
    least = smallest_vocabulary(sentinels, mode_tokens=config.model.use_mode_tokens)
    if size is not None and size < least:
        raise ConfigError(
            f"model.train_tokenizer_vocab_size must hold {BYTE_ALPHABET_SIZE} bytes, padding, end and "
            f"model.num_sentinel_tokens={sentinels} sentinels",
            found=size,
            remedy=f"Use {least} or more",
        )


def _require_positions(config: FullConfig) -> None:
    """Either side counts its positions from 0: encoder keys get none of the decoder's in merged attention."""
    if config.model.from_scratch is None:
        return
    positions = config.model.from_scratch.max_position_embeddings
    lengths = {key: getattr(config.data, key) for key in ("max_encoder_length", "max_decoder_length")}
    if positions < max(lengths.values()):
        shown = " and ".join(f"data.{key}={length}" for key, length in lengths.items())
        raise ConfigError(
            f"model.from_scratch.max_position_embeddings must cover {shown}",
            found=positions,
            remedy=f"Use {max(lengths.values())} or more, or lower the lengths",
        )


def _require_local_models(config: FullConfig) -> None:
    """A name that can only be a path must be a folder; any other may be on the hub, which is not asked from here."""
    model = config.model
    used = {
        "model.model_name_or_path": None if model.from_scratch else model.model_name_or_path,
        "model.tokenizer_name_or_path": None if model.train_tokenizer_vocab_size else model.tokenizer_name_or_path,
    }
    for key, name in used.items():
        if name is not None and name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
            raise ConfigError(
                f"{key} must be a folder or a name on the hub",
                found=f"{name}, and no folder at {Path(name).absolute()}",
                remedy="Correct the path; an absolute one means the same everywhere",
            )


def require_no_password(what: str, url: str) -> None:
    """Configurations and command lines end up in run.yaml, trackers, logs and process lists.

    Raises:
        ConfigError: ``url`` has a password.
    """
    password = urlsplit(url).password if "://" in url else None
    if password:
        raise ConfigError(
            f"{what} must hold no password",
            found=url.replace(password, "***"),
            remedy="Give it to the file system's own configuration (environment variables, ~/.config/fsspec)",
        )


def _require_one_engine(config: FullConfig) -> None:
    """Keys of one engine are not given to the other, which would not heed them."""
    infra = config.infra
    if infra.distributed_type == "deepspeed":
        if infra.fsdp_sharding_strategy != "FULL_SHARD":
            raise ConfigError(
                "infra.distributed_type=deepspeed is ZeRO-3, so infra.fsdp_sharding_strategy must be FULL_SHARD",
                found=infra.fsdp_sharding_strategy,
                remedy="Leave it out, or use fsdp",
            )
        _require_fsdp("training.optimizer", config.training.optimizer, "muon", "adamw")
        if config.model.lora is not None:  # its partitions are of trained parameters alone
            _require_fsdp("model.lora", "given", "given", "null")
        _require_fsdp("training.per_device_train_batch_size", config.training.per_device_train_batch_size, "auto", "4")
        embed_file(config)
    elif infra.deepspeed_config is not None:
        raise ConfigError(
            "infra.deepspeed_config goes with infra.distributed_type=deepspeed",
            found=f"{infra.deepspeed_config} with {infra.distributed_type}",
            remedy="Leave it out, or give --sharding zero3",
        )


def _require_global_batch(config: FullConfig) -> None:
    """What is computed must not depend on how much memory there is."""
    training = config.training
    if training.per_device_train_batch_size == "auto" and training.global_batch_size is None:
        raise ConfigError(
            "training.per_device_train_batch_size=auto needs training.global_batch_size, which it leaves as it is",
            found="none",
            remedy="Give the samples of one optimizer step over all ranks: --set training.global_batch_size=256",
        )


def settled_micro_batch(training: TrainingConfig) -> int:
    """``training.per_device_train_batch_size`` as a number of samples.

    Raises:
        ConfigError: it is still to be found.
    """
    size = training.per_device_train_batch_size
    if size == "auto":
        raise ConfigError(
            "A trainer takes training.per_device_train_batch_size as a number",
            found=size,
            remedy="Train through encdec.train or launchers.submit, which find it, or use auto_find_batch_size",
        )
    return size


def _require_fsdp(key: str, value: object, refused: str, instead: str) -> None:
    """What needs matrices, or a model, that ZeRO-3's flat partitions are not."""
    if value == refused:
        raise ConfigError(
            f"{key}={refused} goes with FSDP2, infra.distributed_type=fsdp",
            found="deepspeed",
            remedy=f"Use --sharding fsdp2, or {key}={instead}",
        )


def require_deepspeed() -> None:
    """Look for DeepSpeed without importing it.

    Raises:
        MissingPrerequisite: it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingPrerequisite(
            "infra.distributed_type=deepspeed (--sharding zero3) needs DeepSpeed",
            found=f"none in {sys.prefix}",
            remedy=f"Install it, after torch: {INSTALL_DEEPSPEED}; or use --sharding fsdp2",
        )


def require_peft() -> None:
    """Look for peft without importing it.

    Raises:
        MissingPrerequisite: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPrerequisite(
            "model.lora needs peft", found=f"none in {sys.prefix}", remedy=f"Install it: {INSTALL_PEFT}"
        )


def refuse_what_is_not_built(config: FullConfig) -> None:
    """Refuse, by name, options that are part of the tree but that this version cannot honour.

    Raises:
        ConfigError: such an option is set.
    """
    unbuilt: Mapping[str, tuple[bool, object, str]] = {
        "training.fp16": (config.training.fp16, True, "Use training.bf16=true"),
        "infra.distributed_type": (config.infra.distributed_type == "ddp", "ddp", "Use fsdp or deepspeed"),
        "data.tokenize_on_fly": (config.data.tokenize_on_fly, True, "Use false: text is packed once, then read"),
        "data.sources": (bool(config.data.sources), config.data.sources, "Give one data.dataset_name"),
        "data.mix_ratios": (bool(config.data.mix_ratios), config.data.mix_ratios, "Give one data.dataset_name"),
    }  # fmt: skip
    for path, (is_set, value, remedy) in unbuilt.items():
        if is_set:
            raise ConfigError(f"{path} must be one that this version can honour", found=value, remedy=remedy)
