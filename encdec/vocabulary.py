"""The tokens that no text teaches: bytes, padding, end, sentinels. No transformers: the plan needs them too."""

from __future__ import annotations

PAD_TOKEN = "<|endoftext|>"
EOS_TOKEN = "<|im_end|>"
BYTE_ALPHABET_SIZE = 256
"""Symbols that a byte-level BPE starts from."""


def sentinel_token(index: int) -> str:
    """The name of sentinel `index`, as T5 has it."""
    return f"<extra_id_{index}>"


def reserved_tokens(num_sentinel_tokens: int) -> list[str]:
    """Padding, end and the sentinels, in the order of their ids."""
    return [PAD_TOKEN, EOS_TOKEN, *map(sentinel_token, range(num_sentinel_tokens))]


def smallest_vocabulary(num_sentinel_tokens: int) -> int:
    """Entries of a trained tokenizer that has learned nothing yet."""
    return BYTE_ALPHABET_SIZE + len(reserved_tokens(num_sentinel_tokens))
