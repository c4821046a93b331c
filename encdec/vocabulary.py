"""The tokens that no text teaches: bytes, padding, end, sentinels. No transformers: the plan needs them too."""

from __future__ import annotations

PAD_TOKEN = "<|endoftext|>"
EOS_TOKEN = "<|im_end|>"
MODE_TOKENS = ("[R]", "[S]", "[X]")
"""UL2's names for the denoiser that an input was made by (Tay et al., 2022), in the order of their ids."""
BYTE_ALPHABET_SIZE = 256
"""Symbols that a byte-level BPE starts from."""


def sentinel_token(index: int) -> str:
    """The name of sentinel `index`, as T5 has it."""
    return f"<extra_id_{index}>"


def reserved_tokens(num_sentinel_tokens: int, *, mode_tokens: bool = False) -> list[str]:
    """Padding, end, the sentinels and, where asked for, the mode tokens, in the order of their ids."""
    modes = MODE_TOKENS if mode_tokens else ()
    return [PAD_TOKEN, EOS_TOKEN, *map(sentinel_token, range(num_sentinel_tokens)), *modes]


def smallest_vocabulary(num_sentinel_tokens: int, *, mode_tokens: bool = False) -> int:
    """Entries of a trained tokenizer that has learned nothing yet."""
    return BYTE_ALPHABET_SIZE + len(reserved_tokens(num_sentinel_tokens, mode_tokens=mode_tokens))
