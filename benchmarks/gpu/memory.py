"""Memory of training by kind of optimizer and checkpointing: the estimate beside what a device's allocator counted.

    python -m benchmarks.gpu.memory --scale large
    python -m benchmarks.gpu.memory --scale tiny --layers 2 --batch 1 --vocabulary 1024    # on a host

On a GPU in bfloat16 where there is one (``--device cuda``), else on the host in float32, counted there by torch's
tracker of storages. Each case: the peak of the second micro-batch of the second step of one process.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from pathlib import Path

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.peers import emit
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.estimates import FP32_BYTES, GIGABYTE, MAX_LOGITS_BYTES, ModelSize, activation_bytes
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.pipeline.scales import ModelScale, get_model_config
from encdec.training.config import FullConfig, ModelConfig
from encdec.training.memory_utils import clear_memory
from encdec.training.model_sizes import model_size
from encdec.training.optimizer import make_optimizer
from encdec.upcycling import expert_fields


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=tuple(ModelScale), default="tiny", help="of the table (default: tiny)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--vocabulary", type=int, default=8192, help="rows of the embedding (default: 8192)")
    parser.add_argument("--batch", type=int, default=2, help="samples (default: 2)")
    parser.add_argument("--length", type=int, default=256, help="tokens of either side (default: 256)")
    parser.add_argument("--layers", type=int, help="of either stack (default: the scale's; on a host take 2)")
    parser.add_argument("--experts", type=int, help="feed-forwards of each layer (default: one)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    cases = {}
    for optimizer, checkpointing in itertools.product(("adamw", "muon"), (True, False)):
        measured, estimate = measure(arguments, optimizer, checkpointing)
        cases[f"{optimizer}, {'checkpointing' if checkpointing else 'all activations kept'}"] = {
            "measured_gb": round(measured, 4), "estimate_gb": round(estimate, 4),
            "estimate_over_measured": round(estimate / measured, 3),
        }  # fmt: skip
    emit(
        {
            "device": arguments.device,
            "scale": arguments.scale,
            "layers": arguments.layers,
            "experts": arguments.experts,
            **cases,
        },
        arguments.json,
    )


def measure(arguments: argparse.Namespace, optimizer: str, checkpointing: bool) -> tuple[float, float]:
    """(peak, estimate), GB of 10**9 bytes."""
    shape = get_model_config(arguments.scale).architecture
    shape.num_hidden_layers = arguments.layers or shape.num_hidden_layers
    settings = ModelConfig(
        from_scratch=shape, train_tokenizer_vocab_size=arguments.vocabulary, n_experts=arguments.experts
    )
    size = model_size(settings)
    assert size is not None
    config = FullConfig()
    config.training.optimizer = optimizer  # type: ignore[assignment]
    clear_memory()
    with torch.device(arguments.device):
        model = Qwen3ForSeq2SeqLM(
            Qwen3EncoderDecoderConfig(
                vocab_size=arguments.vocabulary, num_sentinel_tokens=16, sentinel_start_id=arguments.vocabulary - 16,
                pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
                **shape.model_dump(), **expert_fields(settings),
            )
        )  # fmt: skip
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stepper = make_optimizer(model, config)
    micro_batch(model, arguments)
    stepper.step()
    stepper.zero_grad()
    micro_batch(model, arguments)  # the next one has gradients beside all its activations: the moment of the estimate
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        micro_batch(model, arguments)
        stepper.step()
        peak = torch.cuda.max_memory_allocated()
    else:
        tracker = MemTracker()
        tracker.track_external(model, stepper)
        with tracker:
            micro_batch(model, arguments)
            stepper.step()
        peak = sum(row["Total"] for row in tracker.get_tracker_snapshot("peak").values())
    del model, stepper
    gc.collect()
    return peak / GIGABYTE, estimate(size, arguments, optimizer, checkpointing) / GIGABYTE


def micro_batch(model: torch.nn.Module, arguments: argparse.Namespace) -> None:
    """Forward and backward pass, fp32 weights under bfloat16 autocast on a GPU."""
    ids = torch.randint(16, arguments.vocabulary - 16, (arguments.batch, arguments.length), device=arguments.device)
    with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.device == "cuda"):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()


def estimate(size: ModelSize, arguments: argparse.Namespace, optimizer: str, checkpointing: bool) -> float:
    """fp32 weights and gradients, the optimizer's state; activations, and on a GPU bf16 copies of weights; a piece of
    the logits, and the head's gradient beside it.
    """
    tokens, per_value = arguments.batch * arguments.length, 2 if arguments.device == "cuda" else FP32_BYTES
    kept = activation_bytes(tokens, 2 * size.layers, size.widths, per_value, gradient_checkpointing=checkpointing)
    copies = per_value * size.parameters if arguments.device == "cuda" else 0
    state = size.optimizer_bytes(optimizer)
    logits = min(tokens * arguments.vocabulary, MAX_LOGITS_BYTES // FP32_BYTES) * (per_value + FP32_BYTES)
    return FP32_BYTES * (2 * size.parameters + size.embedding) + copies + state + kept + logits


if __name__ == "__main__":
    main()
