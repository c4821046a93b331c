"""``model.attn_implementation: auto``: the fastest attention that this device, dtype and shape allow, found once.

On a GPU, rank 0 times a forward and backward pass of each candidate on tensors shaped as one layer's, over sequences of
uneven lengths, padding and packing included, after it has compared the result with plain attention in float32. All
ranks take what it found, and so do later attempts of the run: what a run computes must not depend on a clock.

On CPU nothing is timed, for tests and twins there must agree: the rule below, made from one measurement.

Shapes: B sequences, S_e and S_d tokens of encoder and decoder, N_q query heads, N_k key and value heads, D head size.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from encdec import distributed
from encdec.attention.plan import EAGER, FLEX, SDPA, SPLIT, attend, attend_merged, legal, plan_decoder, plan_encoder
from encdec.attention.sequences import Sequences
from encdec.errors import ConfigError
from encdec.files import RunPaths
from encdec.records import JsonLinesWriter, event, read_json_lines
from encdec.training.config import FullConfig
from encdec.training.memory_utils import kept_randomness

log = logging.getLogger("encdec.train")
EVENT = "attention_chosen"
CANDIDATES = (SPLIT, FLEX, SDPA)
SCORES_FOR_SPLIT_ON_CPU = 2**15
"""S_d (S_d + S_e) from which split is the faster one on a CPU, of 4 heads: below, its calls cost more than the mask."""
BATCH, WARM_UP, REPEATS = 2, 3, 10
TOLERANCE = 4.0
"""Times the error that plain attention in the same dtype has against float32."""
CHECKED_TOKENS = 512
"""Most tokens of a sequence in that comparison: plain attention holds all scores."""


def attention_by_rule(config: FullConfig) -> str:
    """What a configuration comes to without a measurement."""
    asked, lengths = config.model.attn_implementation, config.data
    if not config.model.use_flash_attention:
        return EAGER
    if asked != "auto":
        return asked
    scores = lengths.max_decoder_length * (lengths.max_decoder_length + lengths.max_encoder_length)
    return SPLIT if config.infra.device == "cpu" and scores >= SCORES_FOR_SPLIT_ON_CPU else SDPA


def settle_attention(
    model: nn.Module, config: FullConfig, paths: RunPaths, attempt: int, *, device: torch.device, dtype: torch.dtype
) -> str:
    """Give ``model`` its attention implementation, the same on all ranks and in all attempts; collective.

    Args:
        model: a Qwen3ForSeq2SeqLM; ``set_attn_implementation`` is called.
        device, dtype: of the computation.

    Returns:
        Its name. Where it was asked for as ``auto``, it is in the attempt's ledger with what was measured.

    Raises:
        ConfigError: the one that is asked for by name cannot compute with such tensors.
    """
    shape = Shape.of(model, config)
    if not config.model.use_flash_attention or config.model.attn_implementation != "auto":
        name = attention_by_rule(config)
        require_legal(name, device, dtype, shape)
    else:
        name = distributed.on_rank_zero_however_long(
            lambda: _recorded_or_found(shape, config, paths, attempt, device, dtype)
        )
    model.set_attn_implementation(name)  # type: ignore[operator]
    return name


def require_legal(name: str, device: torch.device, dtype: torch.dtype, shape: Shape) -> None:
    """Raises ConfigError where an implementation that is asked for by name is not for such tensors."""
    if not legal(name, device, dtype, shape.head_dim, shape.dropout):
        raise ConfigError(
            f"model.attn_implementation={name} must be able to train on this device",
            found=f"{device.type}, {str(dtype).removeprefix('torch.')}, head_dim {shape.head_dim}, "
            f"attention_dropout {shape.dropout}",
            remedy="Use auto, which takes the fastest that is able to, or sdpa",
        )


@dataclass(frozen=True)
class Shape:
    """Of one layer's attention."""

    encoder_length: int
    decoder_length: int
    heads: int
    kv_heads: int
    head_dim: int
    dropout: float = 0.0

    @classmethod
    def of(cls, model: nn.Module, config: FullConfig) -> Shape:
        settings: Any = model.config
        return cls(
            config.data.max_encoder_length, config.data.max_decoder_length, settings.num_attention_heads,
            settings.num_key_value_heads, settings.head_dim, settings.attention_dropout,
        )  # fmt: skip


def _recorded_or_found(
    shape: Shape, config: FullConfig, paths: RunPaths, attempt: int, device: torch.device, dtype: torch.dtype
) -> str:
    place = {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}
    name = recorded(paths, place)
    if name is not None and legal(name, device, dtype, shape.head_dim, shape.dropout):
        return name
    name, facts = attention_by_rule(config), {}
    if measured_on(device):
        with kept_randomness():
            facts = measure(shape, device, dtype)
        name = min(facts["milliseconds"], key=facts["milliseconds"].get, default=name)
    with JsonLinesWriter(paths.attempt(attempt).events("rank-0")) as ledger:
        ledger.write(event(EVENT, implementation=name, **place, **facts))
        ledger.sync()
    log.info("attention: %s%s", name, "".join(f"; {key}: {value}" for key, value in facts.items()))
    return name


def measured_on(device: torch.device) -> bool:
    return device.type != "cpu"


def recorded(paths: RunPaths, place: dict[str, str]) -> str | None:
    """What the newest attempt in such a place chose; None if there was none."""
    wanted = {"event": EVENT, **place}
    for number in reversed(paths.attempt_numbers()):
        for line in read_json_lines(paths.attempt(number).events("rank-0")):
            if wanted.items() <= line.items() and isinstance(line.get("implementation"), str):
                return line["implementation"]
    return None


# ---- the measurement


def measure(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Candidates that give the right result, by what one encoder and one decoder layer's attention take.

    Returns:
        ``milliseconds`` by name, the median of REPEATS forward and backward passes; ``passed_over``, why by name.
    """
    times: dict[str, float] = {}
    passed_over: dict[str, str] = {}
    for name in CANDIDATES:
        if not legal(name, device, dtype, shape.head_dim, shape.dropout):
            passed_over[name] = "not for this device, dtype or shape"
            continue
        try:
            error, bound = disagreement(name, shape, device, dtype)
            if error > bound:
                passed_over[name] = f"off by {error:.2e} from plain attention, where {bound:.2e} is allowed"
                continue
            times[name] = round(_milliseconds(_layer(name, shape, device, dtype), device), 4)
        except Exception as error:  # a kernel's or a compiler's own: whatever it is, there is another candidate
            passed_over[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"milliseconds": times, "passed_over": passed_over}


def disagreement(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(largest error of outputs and gradients against plain attention in float32, the error that is allowed).

    Allowed is what plain attention in the same dtype is off by, times TOLERANCE, and rounding in float32 itself.
    """
    short = Shape(
        min(shape.encoder_length, CHECKED_TOKENS), min(shape.decoder_length, CHECKED_TOKENS), shape.heads,
        shape.kv_heads, shape.head_dim,
    )  # fmt: skip
    exact = _layer(EAGER, short, device, torch.float32, values_of=dtype)()
    plain, candidate = (_layer(one, short, device, dtype)() for one in (EAGER, name))

    def off(results: list[Tensor]) -> float:
        pairs = zip(results, exact, strict=True)
        return max(((result.float() - right).abs().max() / right.abs().max()).item() for result, right in pairs)

    return off(candidate), TOLERANCE * off(plain) + 1e-5


def _layer(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype, values_of: torch.dtype | None = None
) -> Callable[[], list[Tensor]]:
    """The attention of one encoder and one decoder layer on the same random tensors each time, forward and backward.

    Args:
        values_of: round the tensors to this dtype first.

    Returns:
        What computes outputs and gradients.
    """
    generator = torch.Generator(device).manual_seed(0)
    masks = [_uneven(length, device) for length in (shape.encoder_length, shape.decoder_length)]
    encoder, decoder = map(Sequences.from_mask, masks)
    tokens = [sequences.positions.shape[1] for sequences in (encoder, decoder)]
    sizes = [(heads, count) for count in tokens for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    inputs = [
        torch.randn(1, heads, count, shape.head_dim, device=device, generator=generator)
        .to(values_of or dtype)
        .to(dtype)
        for heads, count in sizes
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    settings = SimpleNamespace(_attn_implementation=name, attention_dropout=0.0, head_dim=shape.head_dim)
    stack: Any = SimpleNamespace(config=settings, training=True)
    of_encoder = plan_encoder(stack, encoder, encoder, masks[0].shape, inputs[0])
    of_decoder = plan_decoder(stack, decoder, encoder, (decoder, encoder), (0, 0), 0, inputs[0])
    module: Any = SimpleNamespace(
        scaling=shape.head_dim**-0.5, attention_dropout=0.0, training=True, is_causal=False,
        num_key_value_groups=shape.heads // shape.kv_heads,
    )  # fmt: skip

    def compute() -> list[Tensor]:
        query, key, value, own_query, own_key, own_value = inputs
        outputs = [
            attend(module, of_encoder, query, key, value)[0],
            attend_merged(module, of_decoder, own_query, (own_key, own_value), (key, value))[0],
        ]
        gradients = torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
        return [*outputs, *gradients]

    return compute


def _uneven(length: int, device: torch.device) -> Tensor:
    """[B, length] mask of sequences from half the length to all of it."""
    lengths = torch.linspace(length / 2, length, BATCH, device=device).ceil()
    return torch.arange(length, device=device) < lengths[:, None]


def _milliseconds(compute: Callable[[], Any], device: torch.device) -> float:
    """Median over REPEATS calls."""
    times = []
    for index in range(WARM_UP + REPEATS):
        _wait_for(device)
        began = time.perf_counter()
        compute()
        _wait_for(device)
        if index >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
