"""Qwen3 encoder-decoder: a bidirectional encoder, and a decoder with self- and cross-attention in one softmax.

The construction is T5Gemma 2's (transformers, `models/t5gemma2`) on Qwen3's blocks: a decoder layer has the parameters
of a Qwen3 layer and no more, so both stacks start from the same pretrained weights.

Shape legend:
    B    examples                        H    hidden size
    S_e  encoder tokens                  V    vocabulary, rows of the shared embedding
    S_d  decoder tokens of this call     P    decoder tokens in the cache
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from encdec.attention.plan import AttentionMask, lay_out, plan_decoder, plan_encoder, without_padding
from encdec.attention.sequences import tokens_before_the_end
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.cross_entropy import IGNORED_LABEL, MAX_LOGITS_BYTES, chunked_cross_entropy, labelled_places
from encdec.layers_qwen3_encdec import Qwen3DecoderLayer, Qwen3EncoderLayer
from encdec.merged_attention import Qwen3MergedAttention
from encdec.mixture_of_experts import (
    Seq2SeqMoeLMOutput,
    balancing_loss,
    initialize_experts,
    routing_where,
    spread_routing,
)
from encdec.model_inputs import check_inputs, refuse_unknown
from encdec.seq2seq_interface import Seq2SeqInterface


class Qwen3EncoderDecoderPreTrainedModel(PreTrainedModel):
    """What all parts share with transformers: configuration, random initialisation, loading and saving."""

    config_class = Qwen3EncoderDecoderConfig
    config: Qwen3EncoderDecoderConfig
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Qwen3EncoderLayer", "Qwen3DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True  # and "split", of encdec.attention: flash attention alone cannot express the merged mask

    def shows_inside(self, outputs_asked_for: dict[str, Any]) -> bool:
        """Whether hidden states or attentions of the layers are asked for: they are shown as tokens came, padded."""
        return any(
            outputs_asked_for.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions", "output_cross_attentions")
        )

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in this file, and ours stands in mixture_of_experts

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_experts(module, self.config.initializer_range)


class Qwen3Stack(Qwen3EncoderDecoderPreTrainedModel):
    """What encoder and decoder have in common: embedding, layers, final norm, rotary embedding.

    Inside `Qwen3ForSeq2SeqLM`, `embed_tokens` is a plain reference to the parent's `shared`, not a submodule of its
    own: the one matrix then has one name in `state_dict`, in checkpoints and for sharding. A stack built alone owns it.
    """

    def __init__(
        self,
        config: Qwen3EncoderDecoderConfig,
        layer_class: type[nn.Module],
        num_layers: int,
        embed_tokens: nn.Embedding | None,
    ) -> None:
        super().__init__(config)
        if embed_tokens is None:
            self.embed_tokens = new_embedding(config)
        else:
            self.borrow_embedding(embed_tokens)
        self.layers = nn.ModuleList(layer_class(config, index) for index in range(num_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def borrow_embedding(self, embed_tokens: nn.Embedding) -> None:
        """Use an embedding that another module owns."""
        self.__dict__["embed_tokens"] = embed_tokens  # past nn.Module.__setattr__, which would register it here too

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        if "embed_tokens" in self.__dict__:
            self.borrow_embedding(value)
        else:
            self.embed_tokens = value

    def save_pretrained(self, save_directory, *, state_dict: dict[str, torch.Tensor] | None = None, **kwargs) -> None:
        """As transformers' own, but complete also where the embedding is borrowed."""
        if state_dict is None:
            state_dict = self.state_dict() | {"embed_tokens.weight": self.embed_tokens.weight}
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)


class Qwen3Encoder(Qwen3Stack):
    """Bidirectional Qwen3. Stands alone, too: without `embed_tokens` it owns its embedding."""

    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": Qwen3EncoderLayer, "attentions": Qwen3Attention}

    def __init__(self, config: Qwen3EncoderDecoderConfig, embed_tokens: nn.Embedding | None = None) -> None:
        super().__init__(config, Qwen3EncoderLayer, config.num_encoder_layers or config.num_hidden_layers, embed_tokens)

    @capture_outputs
    def forward(
        self, input_ids: torch.Tensor, attention_mask: AttentionMask = None, **outputs_asked_for
    ) -> BaseModelOutput:
        """Encode tokens. No layer computes padding.

        Args:
            input_ids: [B, S_e] token ids.
            attention_mask: [B, S_e], 1 for tokens and 0 for padding, or the `Sequences` that it comes to; None where
                nothing is padded.
            **outputs_asked_for: `output_hidden_states`, `output_attentions` (of eager attention), `return_dict`; what
                else `generate` hands every encoder is without effect.

        Returns:
            `last_hidden_state` [B, S_e, H], after the final norm, as a rule zeros where padded; and what was asked for
            beside it.
        """
        sequences = None
        if not self.shows_inside(outputs_asked_for):
            sequences = lay_out(attention_mask, input_ids.shape, input_ids.device)
        hidden_states = self.embed_tokens(input_ids if sequences is None else sequences.pack(input_ids))
        plan = plan_encoder(self, sequences, attention_mask, input_ids.shape, hidden_states)
        position_embeddings = self.rotary_emb(hidden_states, plan.positions)
        for layer in self.layers:
            hidden_states = layer(hidden_states, plan, position_embeddings)
        if sequences is not None:
            hidden_states = sequences.unpack(hidden_states)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class Qwen3Decoder(Qwen3Stack):
    """Causal Qwen3 whose every layer also attends to the encoder's output."""

    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": Qwen3DecoderLayer,
        "attentions": OutputRecorder(Qwen3MergedAttention, index=1),
        "cross_attentions": OutputRecorder(Qwen3MergedAttention, index=2),
    }

    def __init__(self, config: Qwen3EncoderDecoderConfig, embed_tokens: nn.Embedding | None = None) -> None:
        super().__init__(config, Qwen3DecoderLayer, config.num_hidden_layers, embed_tokens)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: AttentionMask = None,
        encoder_attention_mask: AttentionMask = None,
        past_key_values: EncoderDecoderCache | None = None,
        **outputs_asked_for,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Decode tokens; `past_key_values` is extended in place. Without a cache, no layer computes padding.

        A token's position is its place among the tokens of its sequence: padding on the left shifts nothing.

        Args:
            input_ids: [B, S_d] ids of the tokens that are not in the cache.
            encoder_hidden_states: [B, S_e, H], the encoder's output.
            attention_mask: [B, P + S_d], 1 for tokens and 0 for padding; None where nothing is padded. Without a cache
                it may be the `Sequences` that it comes to.
            encoder_attention_mask: [B, S_e], likewise.
            past_key_values: cache of P tokens, or None.
            **outputs_asked_for: `output_hidden_states`, `output_attentions` (of eager attention).

        Returns:
            `last_hidden_state` [B, S_d, H], after the final norm, as a rule zeros where padded; `past_key_values`, and
            what was asked for.
        """
        num_cached, queries, encoder = 0, None, None
        if past_key_values is not None:
            num_cached = int(past_key_values.get_seq_length())
        elif not self.shows_inside(outputs_asked_for):
            queries = lay_out(attention_mask, input_ids.shape, input_ids.device)
            encoder = lay_out(encoder_attention_mask, encoder_hidden_states.shape[:2], input_ids.device)
        masks, widths = (attention_mask, encoder_attention_mask), (input_ids.shape[1], encoder_hidden_states.shape[1])
        if queries is not None and encoder is not None:
            input_ids, encoder_hidden_states = queries.pack(input_ids), encoder.pack(encoder_hidden_states)
        hidden_states = self.embed_tokens(input_ids)
        plan = plan_decoder(self, queries, encoder, masks, widths, num_cached, hidden_states)
        position_embeddings = self.rotary_emb(hidden_states, plan.positions)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, encoder_hidden_states, plan, position_embeddings, past_key_values=past_key_values
            )
        if plan.queries is not None:
            hidden_states = plan.queries.unpack(hidden_states)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class Qwen3ForSeq2SeqLM(Seq2SeqInterface, Qwen3EncoderDecoderPreTrainedModel, GenerationMixin):
    """Encoder, decoder and language-model head around one matrix, `shared.weight` [V, H].

    The head is a product with that matrix inside `forward`: there is exactly one parameter to shard, save and update.
    Under FSDP2, `fully_shard` each of `transformer_layers()` and then the model. The root group owns `shared` and the
    two final norms, which is why training must enter through this `forward` and not through a stack's.
    """

    def __init__(self, config: Qwen3EncoderDecoderConfig) -> None:
        super().__init__(config)
        self.max_logits_bytes = MAX_LOGITS_BYTES  # of one piece of the loss, `encdec.cross_entropy`
        self.shared = new_embedding(config)
        self.encoder = Qwen3Encoder(config, self.shared)
        self.decoder = Qwen3Decoder(config, self.shared)
        self.post_init()

    def transformer_layers(self) -> Iterator[Qwen3EncoderLayer | Qwen3DecoderLayer]:
        """The units of sharding and activation checkpointing: encoder layers, then decoder layers."""
        yield from self.encoder.layers  # type: ignore[misc]
        yield from self.decoder.layers  # type: ignore[misc]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **outputs_asked_for,
    ) -> Seq2SeqMoeLMOutput:
        """One teacher-forced pass, or one step of generation.

        Args:
            input_ids: [B, S_e] encoder tokens; not needed where `encoder_outputs` is given.
            attention_mask: [B, S_e], 1 for tokens and 0 for padding; None where nothing is padded.
            labels: [B, S_d] target ids, -100 where there is no loss.
            decoder_input_ids: [B, S_d]; by default the labels, shifted right.
            decoder_attention_mask: [B, P + S_d]; needed where a prompt is padded on the left. Where the decoder's input
                is made from labels, what is behind the last label of each row is padding unless this says otherwise.
            encoder_outputs: what the encoder returned before.
            past_key_values: cache to extend.
            use_cache: start a cache where none is given; off by default whenever there are labels.
            num_items_in_batch: what to divide the summed loss by, in tokens: with gradient accumulation or several
                ranks, the label tokens of the whole global batch; default: those of this call.
            return_logits: whether to compute logits. The loss needs none: it never holds them all at once. By default
                they are left out in training mode with labels.
            logits_to_keep: only the logits of that many last positions (0: of all).
            **outputs_asked_for: `output_hidden_states`, `output_attentions` (of eager attention), `return_dict`; what
                else `generate` hands every model is without effect.

        Returns:
            `loss` (scalar, float32, None without labels; with experts `lm_loss` and the load-balancing `aux_loss`
            besides, of which it is the sum), `logits` [B, S_d, V], `past_key_values`,
            `encoder_last_hidden_state` [B, S_e, H], and what was asked for beside them, by transformers' names.

        Raises:
            InputError: inputs are missing, empty, too long, of different batches, or ids that have no row.
        """
        refuse_unknown(outputs_asked_for)
        from_labels = labels if decoder_input_ids is None else None
        if from_labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(from_labels)
        check_inputs(
            self.config, input_ids, attention_mask, labels, decoder_input_ids, decoder_attention_mask, encoder_outputs,
            num_cached=0 if past_key_values is None else int(past_key_values.get_seq_length()),
        )  # fmt: skip
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        packs = past_key_values is None and not torch.compiler.is_compiling()
        if from_labels is not None and decoder_attention_mask is None and packs:
            decoder_attention_mask = tokens_before_the_end(from_labels, IGNORED_LABEL)
        masks: tuple[AttentionMask, AttentionMask] = (attention_mask, decoder_attention_mask)
        if past_key_values is None and not self.shows_inside(outputs_asked_for):
            # before anything is computed: the host waits for the masks alone, and for the labels
            masks = without_padding(attention_mask), without_padding(decoder_attention_mask)
        labelled = None if labels is None or torch.compiler.is_compiling() else labelled_places(labels)
        balanced = labels is not None and self.config.num_experts is not None
        with routing_where(balanced) as encoder_routing:
            if encoder_outputs is None:
                encoded: BaseModelOutput = self.encoder(input_ids, masks[0], **outputs_asked_for)
            else:
                encoded = encoder_outputs if hasattr(encoder_outputs, "keys") else BaseModelOutput(*encoder_outputs)
        with routing_where(balanced) as decoder_routing:
            decoded = self.decoder(
                decoder_input_ids,
                encoded.last_hidden_state,
                attention_mask=masks[1],
                encoder_attention_mask=masks[0],
                past_key_values=past_key_values,
                **outputs_asked_for,
            )
        loss = lm_loss = aux_loss = logits = None
        if labels is not None:
            loss = lm_loss = chunked_cross_entropy(
                decoded.last_hidden_state, self.shared.weight, labels, num_items_in_batch, self.max_logits_bytes,
                labelled,
            )  # fmt: skip
            if self.config.num_experts is not None:
                targets = labels.ne(IGNORED_LABEL)
                stacks = [
                    (spread_routing(encoder_routing, masks[0], encoded.last_hidden_state.shape[:2]), attention_mask),
                    (spread_routing(decoder_routing, masks[1], labels.shape), targets),
                ]
                aux_loss = balancing_loss(stacks, targets.sum(dim=1), num_items_in_batch)
                loss = lm_loss + self.config.router_aux_loss_coef * aux_loss
        if return_logits or (return_logits is None and not (self.training and labels is not None)):
            kept = slice_logits_to_keep(decoded.last_hidden_state, logits_to_keep)
            logits = F.linear(kept, self.shared.weight)
        return Seq2SeqMoeLMOutput(
            loss=loss,
            lm_loss=lm_loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )


def new_embedding(config: Qwen3EncoderDecoderConfig) -> nn.Embedding:
    """The token embedding [V, H]. No padding_idx: it would stop the gradient of the padding row, which is the decoder's
    start token as well."""
    return nn.Embedding(config.vocab_size, config.hidden_size)


AutoModelForSeq2SeqLM.register(Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM)
