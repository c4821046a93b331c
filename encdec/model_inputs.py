"""What may go into a model, checked before anything is computed: errors that say more than an index out of range.

Shapes: B examples, S_e encoder tokens, S_d decoder tokens of this call, P decoder tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.cross_entropy import IGNORED_LABEL
from encdec.errors import InputError

UNKNOWN = ("position_ids", "decoder_position_ids", "inputs_embeds", "decoder_inputs_embeds")
"""Arguments of other models' forward passes."""


def check_inputs(
    config: Qwen3EncoderDecoderConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    decoder_input_ids: Tensor | None,
    decoder_attention_mask: Tensor | None,
    encoder_outputs: Any | None,
    num_cached: int = 0,
) -> None:
    """Compare the inputs of one forward pass with each other and with the model.

    Shapes alone, which costs nothing, and where they lie on the CPU the ids themselves. On a GPU that would stall it at
    each step: `check_token_ids` does it there once, before generation.

    Args:
        config: the model's.
        input_ids: [B, S_e], or None with `encoder_outputs`, whose first part is [B, S_e, H].
        attention_mask: [B, S_e].
        labels: [B, S_d].
        decoder_input_ids: [B, S_d].
        decoder_attention_mask: [B, P + S_d].
        encoder_outputs: see above.
        num_cached: P.

    Raises:
        InputError: inputs are missing, not of two dimensions, not integers, empty, too long, of different batches, or
            ids that have no row.
    """
    if decoder_input_ids is None or (input_ids is None and encoder_outputs is None):
        raise InputError(
            "give input_ids or encoder_outputs, and labels or decoder_input_ids",
            found=f"input_ids {_shape(input_ids)}, encoder_outputs {'none' if encoder_outputs is None else 'given'}, "
            f"labels {_shape(labels)}, decoder_input_ids {_shape(decoder_input_ids)}",
            remedy="Give the ones that are missing",
        )
    for label, ids in (("input_ids", input_ids), ("labels", labels), ("decoder_input_ids", decoder_input_ids)):
        if ids is not None and (ids.ndim != 2 or ids.is_floating_point()):
            raise InputError(
                f"{label} must be integers, one row of token ids for each example",
                found=f"{ids.dtype} {list(ids.shape)}",
                remedy="Give the ids that the tokenizer makes with return_tensors='pt' and padding=True",
            )
    if encoder_outputs is not None:
        encoder_shape, name = tuple(encoder_outputs[0].shape[:2]), "encoder_outputs"
    else:
        assert input_ids is not None
        encoder_shape, name = tuple(input_ids.shape), "input_ids"
        check_length(name, encoder_shape[1], config)
        _check_on_host(name, input_ids, config.vocab_size)
    if labels is not None:  # before the inputs that are made of them
        _check_on_host("labels", labels, config.vocab_size, ignored=IGNORED_LABEL)
    decoder_shape = tuple(decoder_input_ids.shape)
    check_length("decoder_input_ids", decoder_shape[1], config)
    check_length("the cache and decoder_input_ids together", num_cached + decoder_shape[1], config)
    _check_on_host("decoder_input_ids", decoder_input_ids, config.vocab_size)
    whole = (decoder_shape[0], num_cached + decoder_shape[1])
    for label, tensor, expected, beside in (
        ("attention_mask", attention_mask, encoder_shape, name),
        ("labels", labels, decoder_shape, "decoder_input_ids"),
        ("decoder_attention_mask", decoder_attention_mask, whole, "the cache and decoder_input_ids together"),
    ):
        if tensor is not None and not torch.is_tensor(tensor):  # masks that transformers makes for a static cache
            raise InputError(
                f"{label} must be a tensor of ones and zeros, {list(expected)}",
                found=type(tensor).__name__,
                remedy="In generate, leave cache_implementation out: merged attention's cache grows as it fills",
            )
        if tensor is not None and tuple(tensor.shape) != expected:
            raise InputError(
                f"{label} must have the shape of {beside}, {list(expected)}",
                found=list(tensor.shape),
                remedy=f"Give one entry of {label} for each token",
            )
    if encoder_shape[0] != decoder_shape[0]:
        raise InputError(
            f"{name} and decoder_input_ids must be of one batch",
            found=f"{encoder_shape[0]} and {decoder_shape[0]} examples",
            remedy="Give each example its encoder and its decoder side",
        )


def refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that other models of transformers take and this one would pass over.

    Args:
        kwargs: what a forward pass was given besides its own arguments; None counts as not given.

    Raises:
        InputError: positions, or embeddings instead of ids.
    """
    given = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if given:
        raise InputError(
            "positions follow from the masks, and tokens come as ids",
            found=f"{', '.join(given)} given",
            remedy="Leave it out; give input_ids with attention_mask, and labels or decoder_input_ids",
        )


def check_token_ids(name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    """Refuse ids that have no row in the embedding; waits for the device.

    Args:
        name: of the argument, for the message.
        ids: integers of any shape, or scores or embeddings, which are not looked at.
        vocab_size: V.
        ignored: one id that is no token.

    Raises:
        InputError: an id below 0, or V and above.
    """
    if ids.is_floating_point() or not ids.numel() or ids.is_meta:
        return
    bad = (ids < 0) | (ids >= vocab_size)
    if ignored is not None:
        bad &= ids != ignored
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise InputError(
            f"{name} must hold token ids from 0 to {vocab_size - 1}" + (f", or {ignored}" if ignored else ""),
            found=f"{int(ids[tuple(place)])} at {place}",
            remedy="Use the tokenizer that was saved with the model, or resize_token_embeddings for a larger one",
        )


def check_length(name: str, length: int, config: Qwen3EncoderDecoderConfig) -> None:
    """Refuse no token at all, and more than the model's positions were made for.

    Raises:
        InputError: `length`, in tokens, is 0 or above max_position_embeddings.
    """
    if length == 0:
        raise InputError(
            f"{name} must have a token at least",
            found="none",
            remedy="Begin the decoder with its start token; encode an empty text as the end token alone",
        )
    if length > config.max_position_embeddings:
        raise InputError(
            f"{name} must be no longer than max_position_embeddings={config.max_position_embeddings}",
            found=f"{length} tokens",
            remedy="Cut the text, or load the model with a larger max_position_embeddings",
        )


def _check_on_host(name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        check_token_ids(name, ids, vocab_size, ignored)


def _shape(tensor: Tensor | None) -> object:
    return "none" if tensor is None else list(tensor.shape)
