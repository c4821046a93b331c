"""What has to hold before speed is worth anything. Each check returns what it found, or raises AssertionError."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import set_seed

from benchmarks.model_peers import Batch, Peer, batches, ours, with_plain_loss
from encdec.attention.plan import EAGER, IMPLEMENTATIONS, legal
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM

CHECKED = Qwen3EncoderDecoderConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, sentinel_start_id=8000, pad_token_id=0, eos_token_id=1,
    decoder_start_token_id=0,
)  # fmt: skip
"""Small enough for float32 everywhere, with grouped heads and a real vocabulary."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative, of losses and gradient norms."""


def outcome(peer: Peer, batch: Batch) -> tuple[float, float]:
    """Loss and gradient norm of a batch."""
    peer.model.zero_grad(set_to_none=True)
    loss = peer.loss(batch)
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in peer.model.parameters() if p.grad is not None])
    return loss.item(), float(norm)


def require_close(found: tuple[float, float], wanted: tuple[float, float], tolerance: float) -> str:
    """Loss and gradient norm within a relative tolerance.

    Raises:
        AssertionError: one is not.
    """
    gaps = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, wanted, strict=True)]
    assert max(gaps) <= tolerance, f"(loss, gradient norm) {found} and {wanted}: off by {max(gaps):.2e} > {tolerance}"
    return f"off by {max(gaps):.1e} (at most {tolerance})"


def build(dtype: torch.dtype, device: str, attention: str, **options: bool) -> Peer:
    set_seed(0)
    peer = ours(CHECKED, attention, **options)
    peer.model.to(device=device, dtype=dtype)
    return peer


def implementations(device: str, dtype: torch.dtype) -> list[str]:
    """Those of attention that train with such tensors here, eager first."""
    found = [name for name in IMPLEMENTATIONS if legal(name, torch.device(device), dtype, CHECKED.head_dim)]
    return sorted(found, key=lambda name: name != EAGER)


def check_attention(device: str, given: list[Batch]) -> dict[str, str]:
    """Every implementation agrees with eager, forward and backward, on batches with padding."""
    found = {}
    for dtype, tolerance in TOLERANCE.items():
        wanted = outcome(build(dtype, device, EAGER), given[0])
        for name in implementations(device, dtype)[1:]:
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = require_close(
                outcome(build(dtype, device, name), given[0]), wanted, tolerance
            )
    return found


def check_loss(device: str, given: list[Batch]) -> str:
    """The loss in pieces is that over whole logits."""
    peer = build(torch.float32, device, EAGER)
    return require_close(outcome(peer, given[0]), outcome(with_plain_loss(peer), given[0]), TOLERANCE[torch.float32])


def check_checkpointing(device: str, given: list[Batch]) -> str:
    """Activations computed again are the same."""
    plain, again = (build(torch.float32, device, "sdpa", checkpointing=on) for on in (False, True))
    return require_close(outcome(again, given[0]), outcome(plain, given[0]), TOLERANCE[torch.float32])


def check_compiled(device: str, given: list[Batch]) -> dict[str, str]:
    """torch.compile changes nothing."""
    dtype, found = torch.bfloat16 if device != "cpu" else torch.float32, {}
    for name in implementations(device, dtype):
        wanted = outcome(build(dtype, device, name), given[0])
        peer = build(dtype, device, name)
        compile_layers(peer.model)
        found[name] = require_close(outcome(peer, given[0]), wanted, TOLERANCE[dtype])
    return found


def compile_layers(model: nn.Module) -> None:
    """Compile each layer by itself, as training does: one graph serves all of them, and lengths may vary."""
    assert isinstance(model, Qwen3ForSeq2SeqLM)
    for layer in model.transformer_layers():
        layer.compile(dynamic=True)


def check_bits(device: str, given: list[Batch]) -> dict[str, str]:
    """Whether two backward passes agree to the last bit; on a GPU that is asked for, and not only hoped for.

    Raises:
        AssertionError: not even where torch is told to be deterministic.
    """
    dtype, found = torch.bfloat16 if device != "cpu" else torch.float32, {}
    for name in implementations(device, dtype):
        free = outcome(build(dtype, device, name), given[0]) == outcome(build(dtype, device, name), given[0])
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            told = outcome(build(dtype, device, name), given[0]) == outcome(build(dtype, device, name), given[0])
        finally:
            torch.use_deterministic_algorithms(False)
        found[name] = (
            "the same" if free else "the same only by use_deterministic_algorithms" if told else "not the same"
        )
        assert device != "cpu" or free, f"{name}: two passes differ on a processor"
    return found


@torch.no_grad()
def check_generation(device: str, given: list[Batch]) -> str:
    """With a cache, greedy search finds what it finds without."""
    model = build(torch.float32, device, "sdpa").model.eval()
    assert isinstance(model, Qwen3ForSeq2SeqLM)
    asked = {name: given[0][name] for name in ("input_ids", "attention_mask")}
    with_cache, without = (
        model.generate(**asked, max_new_tokens=24, do_sample=False, use_cache=cached) for cached in (True, False)
    )
    assert torch.equal(with_cache, without), "cached decoding differs"
    return f"{tuple(with_cache.shape)} tokens are the same"


CHECKS: Mapping[str, Callable[[str, list[Batch]], dict[str, str] | str]] = {
    "attention implementations agree": check_attention,
    "the loss in pieces is the whole one": check_loss,
    "checkpointed activations are the same": check_checkpointing,
    "compiled layers are the same": check_compiled,
    "two passes have the same bits": check_bits,
    "cached decoding is full decoding": check_generation,
}


def check_all(device: str, *, compiled: bool = True) -> dict[str, object]:
    """Every check on small models.

    Raises:
        AssertionError: names the first that does not hold.
    """
    given = list(batches(CHECKED, encoder_tokens=256, size=4, count=1, device=device))
    found: dict[str, object] = {}
    for name, check in CHECKS.items():
        if check is check_compiled and not compiled:
            continue
        try:
            found[name] = check(device, given)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return found
