"""Experts: transformers' blocks in our layers, a load-balancing loss that no cut changes, a dense model's start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM

from encdec.checkpoints.weights import Piece, box
from encdec.checkpoints.weights import whole as whole_of
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError
from encdec.flops import forward_flops
from encdec.initialization.streams import StoredStream
from encdec.mixture_of_experts import Qwen3MoeFeedForward, Routing, recorded_routing, sequence_balance
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.config import ModelConfig
from encdec.training.model_options import ArchitectureConfig
from encdec.training.model_sizes import model_size
from encdec.upcycling import experts_model, plan_experts
from encdec.weight_initialization import UnfilledModel

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
TOKENS = {
    "vocab_size": 512, "num_sentinel_tokens": 16, "sentinel_start_id": 496, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip


def shape(**changed: Any) -> Qwen3EncoderDecoderConfig:
    return Qwen3EncoderDecoderConfig(**(SHAPE | TOKENS | {"num_experts": 4} | changed))


def small_model(**changed: Any) -> Qwen3ForSeq2SeqLM:
    torch.manual_seed(3)
    return Qwen3ForSeq2SeqLM(shape(**changed))


def batch(examples: int = 4, tokens: int = 12, targets: int = 10) -> dict[str, torch.Tensor]:
    """Of uneven lengths on both sides."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, 400, (examples, tokens + targets), generator=generator)
    inputs, labels = ids[:, :tokens].clone(), ids[:, tokens:].clone()
    mask = torch.ones_like(inputs)
    for row in range(examples):
        mask[row, tokens - 2 * row :] = 0
        labels[row, targets - row :] = -100
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


# ---- the block


def test_block_is_the_sum_over_chosen_experts_by_their_probabilities():
    """Written out here, token by token."""
    block = small_model().encoder.layers[0].mlp
    assert isinstance(block, Qwen3MoeFeedForward)
    hidden = torch.randn(2, 5, 32)
    expected = torch.zeros_like(hidden)
    for row in range(2):
        for at in range(5):
            token = hidden[row, at]
            chances = (block.gate.weight @ token).softmax(-1)
            best = chances.topk(2)
            for share, expert in zip(best.values / best.values.sum(), best.indices, strict=True):
                gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
                expected[row, at] += share * (block.experts.down_proj[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(block(hidden), expected, rtol=1e-5, atol=1e-6)


def test_grouped_product_is_used_and_equals_the_loop_over_experts():
    """The loop adds with atomics on a GPU, which no resumption repeats."""
    model, inputs = small_model(), batch()
    assert model.config._experts_implementation == "grouped_mm"
    grouped = model(**inputs)
    grouped.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_experts_implementation("eager")
    looped = model(**inputs)
    looped.loss.backward()
    torch.testing.assert_close(grouped.logits, looped.logits, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_cached_generation_equals_full_decoding():
    model, inputs = small_model().eval(), batch()
    made = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6, min_length=6)
    with torch.no_grad():
        whole = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], decoder_input_ids=made[:, :-1]
        )
    assert torch.equal(whole.logits.argmax(-1)[:, -1], made[:, -1])
    assert whole.aux_loss is None  # nothing is balanced where nothing is learned


def test_saved_and_loaded_is_the_same(tmp_path: Path):
    model, inputs = small_model(), batch()
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert again.config.num_experts == 4 and again.config.num_experts_per_tok == 2
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)


def test_random_weights_are_drawn_for_experts_and_routers():
    layer = small_model(initializer_range=0.05).decoder.layers[1].mlp
    for weight in (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
        assert weight.std().item() == pytest.approx(0.05, rel=0.3)


# ---- the load-balancing loss


def routing_of(logits: torch.Tensor, k: int = 2) -> Routing:
    return Routing(logits, logits.topk(k, dim=-1).indices)


def test_balance_is_one_where_experts_are_used_alike_and_e_over_k_where_one_takes_all():
    even = torch.zeros(1, 4, 4)
    even[0, :, :] = torch.eye(4) * 1e-6  # each token's first choice is another expert
    assert sequence_balance(routing_of(even, k=1), None).item() == pytest.approx(1, abs=1e-4)
    one = torch.full((1, 4, 4), -50.0)
    one[..., 0] = 50.0
    assert sequence_balance(routing_of(one, k=1), None).item() == pytest.approx(4)


def test_padding_does_not_count():
    logits = torch.randn(2, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    found = sequence_balance(routing_of(logits), mask)
    assert found[0] == pytest.approx(sequence_balance(routing_of(logits[:1, :4]), None).item())
    assert found[1] == pytest.approx(sequence_balance(routing_of(logits[1:]), None).item())
    logits[0, 4:] = 1e4
    assert torch.equal(sequence_balance(routing_of(logits), mask), found)
    assert sequence_balance(routing_of(logits), torch.zeros(2, 6)).tolist() == [0, 0]  # a filler row


def test_padding_on_either_side_changes_nothing_of_the_loss():
    model, inputs = small_model(), batch()
    wider = {name: F.pad(values, (0, 5), value=-100 if name == "labels" else 0) for name, values in inputs.items()}
    narrow, wide = model(**inputs), model(**wider)
    assert wide.aux_loss.item() == pytest.approx(narrow.aux_loss.item(), rel=1e-5)
    assert wide.loss.item() == pytest.approx(narrow.loss.item(), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_add_up_to_the_whole_batch(checkpointing: bool):
    """Losses and all gradients: how a step is cut decides nothing."""
    model, inputs = small_model(router_aux_loss_coef=0.1), batch()
    tokens = (inputs["labels"] != -100).sum()
    whole = model(**inputs)
    whole.loss.backward()
    assert whole.loss.item() == pytest.approx((whole.lm_loss + 0.1 * whole.aux_loss).item())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = model(**{name: values[rows] for name, values in inputs.items()}, num_items_in_batch=tokens)
        part.loss.backward()
        parts.append((part.lm_loss + 0, part.aux_loss + 0))
    assert sum(part[1] for part in parts).item() == pytest.approx(whole.aux_loss.item(), rel=1e-5)
    assert sum(part[0] for part in parts).item() == pytest.approx(whole.lm_loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_it_balances():
    """Trained on it alone, a router that sends nearly all tokens to two experts comes to use the others, too."""
    block = small_model().encoder.layers[0].mlp
    hidden = 1 + 0.5 * torch.randn(4, 64, 32)
    with torch.no_grad():
        block.gate.weight[:2] += 0.1
    optimizer, losses = torch.optim.SGD([block.gate.weight], lr=1e-2), []
    for _ in range(60):
        with recorded_routing() as routings:
            block(hidden)
        loss = sequence_balance(routings[0], None).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1.7 and losses[-1] < 1.1
    assert (F.one_hot(routings[0].chosen, 4).float().mean((0, 1, 2)) < 0.35).all()  # of 0.5 at most


def test_re_entrant_checkpointing_is_refused():
    model = small_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    with pytest.raises(ConfigError, match=r"must not be re-entrant.*use_reentrant=True"):
        model(**batch())
    with torch.no_grad(), recorded_routing() as routings:
        model.encoder(batch()["input_ids"])
    assert len(routings) == 2  # where no gradient is wanted, none is missed


# ---- from a dense model


EXPERTS = ModelConfig(n_experts=4, top_k=2)


class HeldWeights:
    """A dense model's weights, as of a checkpoint."""

    def __init__(self, model: Qwen3ForSeq2SeqLM | None = None) -> None:
        self.held = (model or small_model(num_experts=None)).state_dict()
        self.tensors = {name: tensor.to("meta") for name, tensor in self.held.items()}

    def pieces(self, name: str) -> list[Piece]:
        return [whole_of(self.tensors[name])]

    def read(self, name: str, piece: Piece | None = None) -> torch.Tensor:
        return box(self.held[name], piece)


def upcycled(dense: Qwen3ForSeq2SeqLM, k: int) -> Qwen3ForSeq2SeqLM:
    plan = UnfilledModel(dense, StoredStream(HeldWeights(dense)))
    return plan_experts(plan, ModelConfig(n_experts=4, top_k=k), 5).filled().eval()


@pytest.mark.parametrize("k", [2, 3])
def test_upcycled_model_computes_what_the_dense_one_does(k: int):
    dense, inputs = small_model(num_experts=None).eval(), batch()
    before = torch.random.get_rng_state()
    made = upcycled(dense, k)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert made.config.num_experts_per_tok == k
    torch.testing.assert_close(made(**inputs).logits, dense(**inputs).logits, rtol=1e-5, atol=1e-5)
    stack = made.encoder.layers[1].mlp
    theirs = dense.encoder.layers[1].mlp
    assert torch.equal(stack.experts.gate_up_proj[3], torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]))
    assert 0 < stack.gate.weight.std() < 0.02
    again = upcycled(dense, k)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))  # on every rank


def test_each_box_of_an_upcycled_parameter_is_that_of_the_whole():
    plan = plan_experts(UnfilledModel(small_model(num_experts=None), StoredStream(HeldWeights())), EXPERTS, 5)
    weights = plan.weights.weights  # type: ignore[attr-defined]
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        whole = weights.read(f"decoder.layers.0.mlp.{name}")
        for begin in (0, 1, whole.shape[-2] // 2 - 1):  # across the border of gate and up, too
            offsets, sizes = [0] * whole.ndim, list(whole.shape)
            offsets[-2], sizes[-2] = begin, min(3, whole.shape[-2] - begin)
            found = weights.read(f"decoder.layers.0.mlp.{name}", Piece(tuple(offsets), tuple(sizes)))
            assert torch.equal(found, whole.narrow(-2, begin, sizes[-2]))


def test_model_with_experts_is_taken_as_it_is_and_another_number_refused():
    model = small_model()
    assert experts_model(model, ModelConfig(n_experts=4)) is model
    with pytest.raises(ConfigError, match=r"model\.n_experts .*found 8, and 4 there"):
        experts_model(model, ModelConfig(n_experts=8))
    with pytest.raises(ConfigError, match=r"model\.top_k .*found 3, and 2 there"):
        experts_model(model, ModelConfig(n_experts=4, top_k=3))
    assert experts_model(model, ModelConfig(n_experts=4, router_aux_loss_coef=0.5)).config.router_aux_loss_coef == 0.5


def test_one_expert_a_token_is_refused_where_the_model_was_dense():
    with pytest.raises(ConfigError, match=r"top_k must be 2 or more"):
        experts_model(small_model(num_experts=None), ModelConfig(n_experts=4, top_k=1))


def test_batch_without_a_token_has_no_loss_and_no_gradient():
    model, inputs = small_model(), batch()
    inputs["attention_mask"][:], inputs["labels"][:] = 0, -100
    loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ---- refusals and arithmetic


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be .* at most num_experts.*5 of 4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be 1 or more"),
        ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "router would learn nothing"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size"),
    ],
)
def test_impossible_experts_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        shape(**change)


def test_one_expert_a_token_keeps_its_probability_so_that_the_router_learns():
    model = small_model(num_experts_per_tok=1, router_aux_loss_coef=0.0)
    assert model.config.norm_topk_prob is False
    model(**batch()).loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.transformer_layers())


def settings(**changed: Any) -> ModelConfig:
    values = {"from_scratch": ArchitectureConfig(**SHAPE), "train_tokenizer_vocab_size": 512, "n_experts": 4, **changed}
    return ModelConfig(**values)


@pytest.mark.parametrize(("experts", "k"), [(None, 2), (2, 1), (4, 2), (8, 3)])
def test_sizes_are_those_of_the_model(experts: int | None, k: int):
    with torch.device("meta"):
        model = Qwen3ForSeq2SeqLM(shape(num_experts=experts, num_experts_per_tok=k, norm_topk_prob=None))
    size = model_size(settings(n_experts=experts, top_k=k))
    assert size is not None
    layers = [p for layer in model.transformer_layers() for p in layer.parameters()]
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.matrices == sum(p.numel() for p in layers if p.ndim >= 2)
    stacked = sum(p.numel() for p in layers if p.ndim == 3)
    assert size.inactive == (stacked // experts * (experts - k) if experts else 0)


def test_flops_are_those_of_active_parameters():
    model, inputs = small_model().eval(), batch(examples=1, tokens=32, targets=24)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    inputs["attention_mask"][:], inputs["labels"][:] = 1, 5
    size = model_size(settings())
    assert size is not None
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(**inputs, return_logits=False)
    assert forward_flops(size, 32, 24) == pytest.approx(counted.get_total_flops(), rel=0.02)
