"""The shape and the token ids of a Qwen3 encoder-decoder, as a transformers configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, Qwen3Config

from encdec.errors import ConfigError
from encdec.hub_code import AUTO_MAP, write_code

# Qwen3 pads its embedding from the 151,669 tokens of its tokenizer to 151,936 rows: 267 that no text ever reaches.
QWEN3_VOCAB_SIZE = 151_936
QWEN3_USED_ROWS = 151_669
QWEN3_PAD_TOKEN_ID = 151_643  # <|endoftext|>
QWEN3_EOS_TOKEN_ID = 151_645  # <|im_end|>

# Embeddings that have to grow do so to a multiple of this, so that the head's matrix product stays tensor-core shaped.
VOCAB_SIZE_MULTIPLE = 64

# Fields of a Qwen3Config that say nothing about the shape, or that this class settles itself.
_NOT_INHERITED = {
    "architectures", "dtype", "torch_dtype", "model_type", "transformers_version", "is_encoder_decoder",
    "tie_word_embeddings", "layer_types", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


class Qwen3EncoderDecoderConfig(Qwen3Config):
    """Configuration of `Qwen3ForSeq2SeqLM`; the defaults are Qwen3-0.6B's shape (1,036,517,376 parameters).

    All fields of `transformers.Qwen3Config` apply to both stacks. `head_dim` is a field of its own: Qwen3's heads
    together are wider than its hidden size, so it never follows from `hidden_size / num_attention_heads`.

    Args:
        num_hidden_layers: decoder layers.
        num_encoder_layers: encoder layers; None means as many as the decoder has.
        num_sentinel_tokens: sentinels (`<extra_id_0>`, `<extra_id_1>`, ...), for span corruption.
        sentinel_start_id: id of `<extra_id_0>`; the others follow, contiguous and ascending.
        mode_token_ids: ids of UL2's [R], [S] and [X]; None without mode tokens.
        pad_token_id: id of the padding token; never the end-of-sequence id.
        eos_token_id: id of the one end-of-sequence token.
        decoder_start_token_id: id that opens every decoder input; T5's convention is the padding token.
        num_experts: feed-forwards of each layer, of which a router picks some for each token; None: one, for all.
        num_experts_per_tok: experts that each token passes.
        norm_topk_prob: whether their weights are scaled to add up to 1; where there are several of them unless given.
        router_aux_loss_coef: what the load-balancing loss is multiplied by in the loss.
        moe_intermediate_size: width of one expert; `intermediate_size` unless given.

    Raises:
        ConfigError: a shape or an id breaks a rule; the message names the rule and the values.
    """

    model_type = "qwen3_encdec"
    # Qwen3's tensor- and pipeline-parallel plans name modules of a decoder-only model.
    base_model_tp_plan: ClassVar[dict | None] = None
    base_model_pp_plan: ClassVar[dict | None] = None
    default_theta: ClassVar[float] = 1_000_000.0

    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 40_960
    tie_word_embeddings: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int | None = QWEN3_PAD_TOKEN_ID
    eos_token_id: int | list[int] | None = QWEN3_EOS_TOKEN_ID
    decoder_start_token_id: int = QWEN3_PAD_TOKEN_ID
    num_encoder_layers: int | None = None
    num_sentinel_tokens: int = 100
    sentinel_start_id: int = QWEN3_USED_ROWS
    num_experts: int | None = None
    num_experts_per_tok: int = 2
    norm_topk_prob: bool | None = None
    router_aux_loss_coef: float = 0.001
    moe_intermediate_size: int | None = None
    mode_token_ids: list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_encoder_layers is None:
            self.num_encoder_layers = self.num_hidden_layers
        if self.num_experts is not None:
            self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
            if self.norm_topk_prob is None:
                self.norm_topk_prob = self.num_experts_per_tok > 1
        self._check_shape()
        self._check_experts()
        self._check_token_ids()

    def to_dict(self) -> dict[str, Any]:
        """With the names by which transformers finds the code that `save_pretrained` puts beside it."""
        return super().to_dict() | {"auto_map": dict(AUTO_MAP)}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers' own, and the model's source files, for those who load it without this package."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        write_code(Path(save_directory))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, which takes another architecture's fields for ours and only warns.

        Raises:
            ConfigError: the fields are another architecture's.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        _require(
            model_type == cls.model_type, f"the model_type must be {cls.model_type}", model_type,
            "Make an encoder-decoder of a Qwen3 with python -m encdec.weight_initialization --from ... --to ...",
        )  # fmt: skip
        return super().from_dict(config_dict, **kwargs)

    @property
    def sentinel_ids(self) -> range:
        """The ids of `<extra_id_0>`, `<extra_id_1>`, ... in this order."""
        return range(self.sentinel_start_id, self.sentinel_start_id + self.num_sentinel_tokens)

    @classmethod
    def from_qwen3_config(
        cls, qwen3_config: Qwen3Config, num_sentinel_tokens: int = 100, **overrides
    ) -> Qwen3EncoderDecoderConfig:
        """Derive the encoder-decoder of a decoder-only Qwen3: both stacks get its layers, one matrix its vocabulary.

        The sentinels take embedding rows that the tokenizer leaves unused, where there are enough of them; otherwise
        `vocab_size` grows to the next multiple of 64. A vocabulary of 151,936 rows is taken for Qwen3's own (rows from
        151,669 on are free); of any other, every row counts as used unless `sentinel_start_id` says otherwise.

        Args:
            qwen3_config: the source; every layer must use full attention.
            num_sentinel_tokens: sentinels to make room for.
            **overrides: fields of this class that are to differ from the source.

        Raises:
            ConfigError: the source has sliding-window layers, or no padding or end-of-sequence id.
        """
        if "sliding_attention" in (qwen3_config.layer_types or ()):
            raise ConfigError(
                "every layer of the source must use full attention",
                found=f"layer_types={qwen3_config.layer_types}",
                remedy="Use a checkpoint without a sliding window",
            )
        inherited = {key: value for key, value in qwen3_config.to_dict().items() if key not in _NOT_INHERITED}
        ids = _token_ids(qwen3_config) | {key: overrides[key] for key in _ID_FIELDS if overrides.get(key) is not None}
        for name in ("pad_token_id", "eos_token_id"):
            if not isinstance(ids[name], int):
                raise ConfigError(f"the source must name one {name}", found=ids[name], remedy=f"Pass {name}=<id>")
        ids.setdefault("decoder_start_token_id", ids["pad_token_id"])
        rows_needed = ids["sentinel_start_id"] + num_sentinel_tokens
        rows_needed = max([rows_needed, *(one + 1 for one in overrides.get("mode_token_ids") or ())])
        vocab_size = max(qwen3_config.vocab_size, rows_needed)
        if vocab_size > qwen3_config.vocab_size:
            vocab_size = -(-vocab_size // VOCAB_SIZE_MULTIPLE) * VOCAB_SIZE_MULTIPLE
        settled = {"vocab_size": vocab_size, "num_sentinel_tokens": num_sentinel_tokens}
        return cls(**(inherited | settled | overrides | ids))

    def _check_shape(self) -> None:
        for name in _POSITIVE_FIELDS:
            _require(
                getattr(self, name) > 0, f"{name} must be positive", getattr(self, name), f"Set {name} to 1 or more"
            )
        _require(
            self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads) == 0,
            "num_attention_heads must be a multiple of num_key_value_heads",
            f"{self.num_attention_heads} and {self.num_key_value_heads}",
            "Change one of the two",
        )
        _require(
            self.head_dim % 2 == 0, "head_dim must be even for RoPE", self.head_dim, "Set head_dim to an even number"
        )
        _require(
            set(self.layer_types) == {"full_attention"},
            "every layer must use full attention (merged attention has no sliding window)",
            sorted(set(self.layer_types)),
            "Leave layer_types and use_sliding_window at their defaults",
        )
        _require(
            bool(self.tie_word_embeddings),
            "tie_word_embeddings must be true: encoder, decoder and head share one matrix",
            self.tie_word_embeddings,
            "Remove tie_word_embeddings",
        )

    def _check_experts(self) -> None:
        if self.num_experts is None:
            return
        _require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok must be 1 or more, and at most num_experts",
            f"{self.num_experts_per_tok} of {self.num_experts}",
            "Lower num_experts_per_tok or raise num_experts",
        )
        _require(
            not (self.norm_topk_prob and self.num_experts_per_tok == 1),
            "norm_topk_prob must be false where a token passes one expert, whose weight would always be 1: the router "
            "would learn nothing",
            self.norm_topk_prob,
            "Leave it out",
        )
        _require(
            bool(self.moe_intermediate_size and self.moe_intermediate_size > 0),
            "moe_intermediate_size must be positive",
            self.moe_intermediate_size,
            "Leave it out: experts are then intermediate_size wide",
        )
        _require(
            self.router_aux_loss_coef >= 0, "router_aux_loss_coef must not be negative", self.router_aux_loss_coef,
            "Set it to 0 or more",
        )  # fmt: skip

    def _check_token_ids(self) -> None:
        _require(
            self.num_sentinel_tokens >= 0, "num_sentinel_tokens must not be negative", self.num_sentinel_tokens,
            "Set num_sentinel_tokens to 0 or more",
        )  # fmt: skip
        first, end = self.sentinel_start_id, self.sentinel_start_id + self.num_sentinel_tokens
        _require(
            first >= 0 and end <= self.vocab_size,
            "the sentinels must fit into the embedding",
            f"sentinel ids {first} to {end - 1} in {self.vocab_size} rows",
            "Lower num_sentinel_tokens or raise vocab_size",
        )
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and 0 <= value < self.vocab_size and not first <= value < end,
                f"{name} must be one id below vocab_size and no sentinel",
                f"{name}={value}, vocab_size={self.vocab_size}, sentinels {first} to {end - 1}",
                f"Set {name} to the tokenizer's id",
            )
        modes = self.mode_token_ids
        _require(
            modes is None
            or (len(set(modes)) == 3 == len(modes) and all(end <= one < self.vocab_size for one in modes)),
            "mode_token_ids must be three ids behind the sentinels and below vocab_size, or None",
            f"{modes}, vocab_size={self.vocab_size}, sentinels {first} to {end - 1}",
            "Set mode_token_ids to the tokenizer's",
        )
        _require(
            self.pad_token_id != self.eos_token_id,
            "pad_token_id and eos_token_id must differ, or the end of a sequence is masked as padding",
            f"{self.pad_token_id} and {self.eos_token_id}",
            "Set eos_token_id to another token, in Qwen3 to <|im_end|>",
        )


_POSITIVE_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_encoder_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_ID_FIELDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id", "sentinel_start_id")


def _token_ids(qwen3_config: Qwen3Config) -> dict[str, int | None]:
    """The ids a source implies. Qwen3's own configs name no padding token, and its base models end and pad alike."""
    if qwen3_config.vocab_size == QWEN3_VOCAB_SIZE:
        return {
            "pad_token_id": QWEN3_PAD_TOKEN_ID, "eos_token_id": QWEN3_EOS_TOKEN_ID, "sentinel_start_id": QWEN3_USED_ROWS
        }  # fmt: skip
    return {
        "pad_token_id": qwen3_config.pad_token_id,
        "eos_token_id": qwen3_config.eos_token_id,
        "sentinel_start_id": qwen3_config.vocab_size,
    }


def _require(holds: bool, rule: str, found: object, remedy: str) -> None:
    if not holds:
        raise ConfigError(rule, found=found, remedy=remedy)


AutoConfig.register(Qwen3EncoderDecoderConfig.model_type, Qwen3EncoderDecoderConfig)
