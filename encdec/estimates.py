"""Arithmetic about runs, without torch: steps, tokens, hours, bytes. The plan and the trainer share it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from encdec.errors import ConfigError

GIGABYTE = 1e9
FP32_BYTES = 4
OPTIMIZER_BYTES: Mapping[str, int] = {"adamw": 8, "adam": 8, "muon": 4, "sgd": 0}
"""fp32 state that an optimizer keeps, bytes a parameter: two moments, one momentum, nothing."""
SAVED_VALUES: Mapping[int, tuple[int, int, int, int]] = {2: (8, 8, 5, 4), 4: (6, 7, 3, 4)}
"""Values that a layer keeps for its backward pass, by bytes a value: how many per token for each unit of the hidden
width, of the query heads' width, of the key (or value) heads' width and of the feed-forward's width. Counted at Qwen3's
layers with fused attention; in half precision the norms keep fp32 copies, two values each. Korthikanti et al. 2022
(arXiv:2205.05198, section 4.1) count 34 bytes per token and hidden unit for GPT's layer of that kind; Qwen3's has a
gated feed-forward and wider heads: 82."""
MAX_LOGITS_BYTES = 512 * 10**6
"""Default bound of the loss's logits in fp32 that are there at the same time: 842 tokens at Qwen3's vocabulary."""
SAVED_COPIES = 2
"""Of its hidden width that a token leaves with each expert: what goes in, and what comes out before it is weighted."""


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


@dataclass(frozen=True)
class LayerWidths:
    """What the activations of one transformer layer are as wide as, values a token."""

    hidden: int
    query: int
    """Query heads together."""
    key_value: int
    """Key heads together; value heads are as many."""
    feed_forward: int
    """All that a token passes."""
    routed: int = 0
    """Experts that each token passes: it is copied for each, and so is what comes back. 0: no experts."""

    @classmethod
    def like_qwen3(cls, hidden: int) -> LayerWidths:
        """Qwen3-0.6B's proportions: query heads 2, key and value heads 1, feed-forward 3 times the hidden width."""
        return cls(hidden, 2 * hidden, hidden, 3 * hidden)

    def saved_bytes(self, tokens: int, bytes_per_value: int) -> int:
        """What one layer keeps of ``tokens`` tokens for its backward pass, bytes."""
        counts = SAVED_VALUES[bytes_per_value]
        widths = (self.hidden, self.query, self.key_value, self.feed_forward)
        copies = SAVED_COPIES * self.routed * self.hidden
        values = copies + sum(count * width for count, width in zip(counts, widths, strict=True))
        return tokens * bytes_per_value * values


def activation_bytes(
    tokens: int, num_layers: int, widths: LayerWidths, bytes_per_value: int, *, gradient_checkpointing: bool
) -> int:
    """What a stack of layers keeps for its backward pass, bytes.

    With checkpointing that is each layer's input, and all of the one layer that is computed again (Korthikanti et al.
    2022, section 5).

    Args:
        tokens: in the micro-batch, padding counted.
        bytes_per_value: 2 or 4, of the computation.
    """
    if not gradient_checkpointing:
        return num_layers * widths.saved_bytes(tokens, bytes_per_value)
    inputs = num_layers * tokens * widths.hidden * bytes_per_value
    return inputs + (widths.saved_bytes(tokens, bytes_per_value) if num_layers else 0)


def estimate_memory(
    num_params: int,
    batch_size: int,
    seq_length: int,
    hidden_size: int,
    num_layers: int,
    *,
    bytes_per_value: int = 2,
    optimizer: str = "adamw",
    gradient_checkpointing: bool = True,
) -> dict[str, float]:
    """Memory of one process that trains a whole model of Qwen3's layers, GB of 10**9 bytes.

    Weights and gradients in the precision of the computation, optimizer state in fp32 with an fp32 copy of weights that
    have less (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1): 16 bytes a parameter for AdamW in either
    precision. Activations as ``activation_bytes``; logits are not in it, since their number is not known here.

    Args:
        num_params: parameters.
        batch_size: samples of a micro-batch.
        seq_length: tokens of a sample.
        hidden_size: width of the residual stream.
        num_layers: transformer layers that each sample passes.
        bytes_per_value: 2 (bfloat16, float16) or 4 (float32).
        optimizer: a key of ``OPTIMIZER_BYTES``.
        gradient_checkpointing: whether layers are computed again in the backward pass.

    Returns:
        model_gb, optimizer_gb, gradient_gb, activation_gb, total_gb.

    Raises:
        ConfigError: an optimizer or a precision that is not in the tables.
    """
    widths, tokens = LayerWidths.like_qwen3(hidden_size), batch_size * seq_length
    _require_row("bytes_per_value", bytes_per_value, SAVED_VALUES)
    master = FP32_BYTES if bytes_per_value < FP32_BYTES else 0
    parts = {
        "model_gb": num_params * bytes_per_value / GIGABYTE,
        "optimizer_gb": num_params * (optimizer_bytes(optimizer) + master) / GIGABYTE,
        "gradient_gb": num_params * bytes_per_value / GIGABYTE,
        "activation_gb": activation_bytes(
            tokens, num_layers, widths, bytes_per_value, gradient_checkpointing=gradient_checkpointing
        )
        / GIGABYTE,
    }
    return parts | {"total_gb": sum(parts.values())}


def optimizer_bytes(optimizer: str) -> int:
    """State of ``optimizer``, bytes a parameter.

    Raises:
        ConfigError: not in the table.
    """
    _require_row("optimizer", optimizer, OPTIMIZER_BYTES)
    return OPTIMIZER_BYTES[optimizer]


def _require_row(what: str, key: object, table: Mapping[str, int] | Mapping[int, object]) -> None:
    if key not in table:
        raise ConfigError(
            f"{what} must be one of {', '.join(map(str, table))}",
            found=repr(key),
            remedy="Name one that is in the table",
        )


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What decides how much memory an encoder-decoder needs."""

    parameters: int
    matrices: int
    """Of the parameters, those of the layers' matrices that are trained, experts among them: what Muon steps."""
    embedding: int
    """Of the parameters, those of the one embedding."""
    vocabulary: int
    """Rows of the embedding."""
    widths: LayerWidths
    layers: int
    """In the encoder, and again in the decoder."""
    inactive: int = 0
    """Of the parameters, those of experts that a token does not pass."""
    frozen: int = 0
    """Of the parameters, those that are not trained (LoRA)."""

    @property
    def active(self) -> int:
        """Parameters that a token meets, in either stack."""
        return self.parameters - self.inactive

    @property
    def trained(self) -> int:
        """Parameters that have gradients and optimizer state."""
        return self.parameters - self.frozen

    @property
    def trained_embedding(self) -> int:
        """Of the embedding's parameters: adapters leave it frozen."""
        return 0 if self.frozen else self.embedding

    def optimizer_bytes(self, optimizer: str) -> int:
        """State of ``optimizer``, bytes; what Muon does not step, AdamW does."""
        others = self.trained - self.matrices if optimizer == "muon" else 0
        return (self.trained - others) * optimizer_bytes(optimizer) + others * optimizer_bytes("adamw")

    def checkpoint_bytes(self, optimizer: str) -> int:
        """One checkpoint: fp32 weights and optimizer state; what else is in it is small."""
        return self.parameters * FP32_BYTES + self.optimizer_bytes(optimizer)


def estimate_rank_memory(
    size: ModelSize,
    *,
    ranks: int,
    micro_batch_size: int,
    encoder_length: int,
    decoder_length: int,
    bytes_per_value: int,
    optimizer: str,
    gradient_checkpointing: bool,
    accumulates: bool,
    gathered_whole: bool = False,
    offloaded: bool = False,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> dict[str, float]:
    """Memory of one rank's device in a run that FSDP2 shards, at its worst moment, GB of 10**9 bytes.

    Three moments are looked at: the loss has just been computed; the first layer's backward pass, the last layer of the
    decoder, runs while all else is still kept; the embedding's gradient, the last one, is on its way to its shards.

    Args:
        ranks: over which the model is sharded.
        micro_batch_size: samples.
        encoder_length, decoder_length: tokens of a sample, padding counted.
        bytes_per_value: of the computation; weights, gradients and optimizer state are kept in fp32.
        accumulates: several micro-batches make a step: FSDP2 then keeps the whole model's gradients, fp32, on each rank
            until the last of them.
        gathered_whole: the gathered weights stay until the backward pass (SHARD_GRAD_OP).
        offloaded: weights, gradients and optimizer state are in host memory.
        max_logits_bytes: of the fp32 logits of one piece of the loss (``encdec.cross_entropy``).

    Returns:
        parameters_gb (the rank's part, fp32), gradients_gb (its part, and whole ones that accumulate or are on their
        way), optimizer_gb (its part), gathered_gb (weights as whole tensors, in the computation's precision),
        activations_gb (kept for the backward pass, and of a layer that is computed again), logits_gb, total_gb.
    """
    per_value, shards = bytes_per_value, 0 if offloaded else 1 / ranks
    layer = (size.parameters - size.embedding) // (2 * size.layers)
    trained_layer = (size.trained - size.trained_embedding) // (2 * size.layers)
    tokens = [micro_batch_size * length for length in (encoder_length, decoder_length)]
    whole = FP32_BYTES * size.trained if accumulates else 0
    sharded = FP32_BYTES * size.parameters * shards
    gradients = FP32_BYTES * size.trained * shards
    on_their_way = per_value + FP32_BYTES
    embedding, fetched = size.embedding * per_value, 2 * layer * per_value  # one is fetched while one is in use
    its_gradient = size.trained_embedding * per_value
    everything = size.parameters * per_value
    kept = sum(
        size.layers * n * size.widths.hidden * per_value
        if gradient_checkpointing
        else activation_bytes(n, size.layers, size.widths, per_value, gradient_checkpointing=False)
        for n in tokens
    )
    again = size.widths.saved_bytes(max(tokens), per_value) if gradient_checkpointing else 0
    moments: tuple[dict[str, float], ...] = (
        {
            "gathered": everything if gathered_whole else embedding + fetched,
            "gradients": whole + size.trained_embedding * on_their_way,  # the head's, summed in fp32
            "activations": kept,
            # the head's product, and its log-softmax in fp32
            "logits": min(tokens[1] * size.vocabulary, max_logits_bytes // FP32_BYTES) * on_their_way,
        },
        {
            "gathered": everything if gathered_whole else embedding + fetched,
            "gradients": whole + its_gradient + trained_layer * on_their_way,
            "activations": kept + again,
            "logits": 0,
        },
        {
            "gathered": embedding,
            "gradients": max(
                whole + its_gradient,
                gradients + size.trained_embedding * (on_their_way + FP32_BYTES * accumulates),
            ),
            "activations": 0,
            "logits": 0,
        },
    )
    worst = max(moments, key=lambda moment: sum(moment.values()))
    amounts = {
        "parameters": sharded,
        "gradients": worst["gradients"],
        "optimizer": size.optimizer_bytes(optimizer) * shards,
        **{name: worst[name] for name in ("gathered", "activations", "logits")},
    }
    parts = {f"{name}_gb": amount / GIGABYTE for name, amount in amounts.items()}
    return parts | {"total_gb": sum(parts.values())}
