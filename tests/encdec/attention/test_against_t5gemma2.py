"""One layer's merged attention against transformers' T5Gemma 2: the same tensors, masks, RoPE and caches.

What differs between the two is set alike: T5Gemma 2's norm multiplies by 1 + weight, and its scale is a setting.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2DecoderConfig
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2MergedAttention, T5Gemma2RotaryEmbedding

from encdec.attention.masks import positions_of
from encdec.attention.plan import AttentionPlan, plan_decoder
from encdec.attention.sequences import Sequences
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.merged_attention import Qwen3MergedAttention
from tests.encdec.attention.batches import IDS, SHAPE, UNEVEN

HIDDEN, HEAD_DIM, THETA = SHAPE["hidden_size"], SHAPE["head_dim"], SHAPE["rope_parameters"]["rope_theta"]
MASK = torch.tensor(UNEVEN)


def theirs_config() -> T5Gemma2DecoderConfig:
    config = T5Gemma2DecoderConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM, layer_types=["full_attention"],
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": THETA}},
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


class Ours:
    def __init__(self) -> None:
        self.config = Qwen3EncoderDecoderConfig(**(SHAPE | IDS))
        self.attention = Qwen3MergedAttention(self.config, 0).eval()
        for parameter in self.attention.parameters():  # norms, too, unlike each other and unlike 1
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
        self.rotary = Qwen3RotaryEmbedding(self.config)

    def plan(self, attention: str, queries, encoder, masks, widths, cached, like) -> AttentionPlan:
        self.config._attn_implementation_internal = attention
        stack = SimpleNamespace(config=self.config, training=False)
        return plan_decoder(stack, queries, encoder, masks, widths, cached, like)  # type: ignore[arg-type]

    def packed(self, attention: str, hidden: Tensor, encoded: Tensor, mask: Tensor, encoder_mask: Tensor) -> Tensor:
        queries, encoder = Sequences.from_mask(mask), Sequences.from_mask(encoder_mask)
        plan = self.plan(attention, queries, encoder, (queries, encoder), (0, 0), 0, hidden)
        packed = queries.pack(hidden)
        rope = self.rotary(packed, plan.positions)
        return queries.unpack(self.attention(packed, encoder.pack(encoded), plan, rope)[0])

    def cached(self, hidden: Tensor, encoded: Tensor, mask: Tensor, encoder_mask: Tensor, cache) -> Tensor:
        done = mask.shape[1] - hidden.shape[1]
        widths = hidden.shape[1], encoded.shape[1]
        plan = self.plan("sdpa", None, None, (mask, encoder_mask), widths, done, hidden)
        return self.attention(hidden, encoded, plan, self.rotary(hidden, plan.positions), cache)[0]


class Theirs:
    """T5Gemma 2's attention with the weights of ours; its own masks, positions and cache."""

    def __init__(self, ours: Ours) -> None:
        self.config = theirs_config()
        self.attention = T5Gemma2MergedAttention(self.config, 0).eval()
        weights = {name: value - 1 if "norm" in name else value for name, value in ours.attention.state_dict().items()}
        self.attention.load_state_dict(weights, strict=True)
        self.rotary = T5Gemma2RotaryEmbedding(self.config)

    def __call__(
        self,
        hidden: Tensor,
        encoded: Tensor,
        mask: Tensor,
        encoder_mask: Tensor,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        cached = mask.shape[1] - hidden.shape[1]
        positions = positions_of(mask, cached, hidden.shape[1], mask.device)
        own = create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=mask, position_ids=positions,
            past_key_values=cache and cache.self_attention_cache, allow_is_causal_skip=False,
        )  # fmt: skip
        crossed = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=encoder_mask, encoder_hidden_states=encoded,
            allow_is_bidirectional_skip=False,
        )  # fmt: skip
        rope = self.rotary(hidden, positions, "full_attention")
        merged = torch.cat([own, crossed], dim=-1)
        return self.attention(hidden, rope, merged, encoded, cache)[0]


def inputs(requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    hidden, encoded = torch.randn(4, 9, HIDDEN), torch.randn(4, 9, HIDDEN)
    return hidden.requires_grad_(requires_grad), encoded.requires_grad_(requires_grad)


@pytest.mark.parametrize("attention", ["split", "sdpa", "eager"])
def test_outputs_and_gradients(attention):
    ours = Ours()
    theirs, tensors, kept = Theirs(ours), inputs(requires_grad=True), MASK.bool()
    gradient = torch.randn(4, 9, HIDDEN)[kept]
    results = []
    for attend in (theirs, lambda *given: ours.packed(attention, *given)):
        out = attend(*tensors, MASK, MASK.flip(0))[kept]
        results.append((out, *torch.autograd.grad(out, tensors, gradient)))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_flex_attention():
    ours, tensors, kept = Ours(), inputs(), MASK.bool()
    found = ours.packed("flex_attention", *tensors, MASK, MASK.flip(0))[kept]
    torch.testing.assert_close(found, Theirs(ours)(*tensors, MASK, MASK.flip(0))[kept], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_caches_hold_the_same_keys_and_values():
    ours, (hidden, encoded) = Ours(), inputs()
    theirs, caches = Theirs(ours), [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
    done = 0
    for chunk in hidden.split([4, 1, 3, 1], dim=1):
        done += chunk.shape[1]
        given, kept = (chunk, encoded, MASK[:, :done], MASK.flip(0)), MASK[:, done - chunk.shape[1] : done].bool()
        expected, found = theirs(*given, caches[0]), ours.cached(*given, caches[1])
        torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-5)
    for name in ("self_attention_cache", "cross_attention_cache"):
        first, second = (getattr(cache, name).layers[0] for cache in caches)
        torch.testing.assert_close(second.keys, first.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(second.values, first.values, atol=1e-5, rtol=1e-5)
    assert (first.keys.shape[2], caches[1].get_seq_length()) == (9, 9)


def test_rope_is_the_same():
    ours, theirs = Ours(), Theirs(Ours())
    positions, like = torch.arange(40)[None], torch.zeros(1)
    torch.testing.assert_close(
        ours.rotary(like, positions), theirs.rotary(like, positions, "full_attention"), atol=0, rtol=0
    )
