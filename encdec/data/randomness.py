"""Counter-based random bits: the same words in give the same bits out, on any machine, in any order of calls.

Nothing here keeps a state, so batches, workers and ranks need not agree on who drew what before.

Sources: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) with its published constants; the 32-bit mixer is
"lowbias32" (Wellons, Hash Prospector, bias 0.17).
"""

from __future__ import annotations

import numpy as np

WORD_MASK = 0xFFFF_FFFF_FFFF_FFFF
GOLDEN64 = 0x9E37_79B9_7F4A_7C15
GOLDEN32 = np.uint32(0x9E37_79B9)

_M1, _M2 = 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB


def mix_word(word: int) -> int:
    """SplitMix64's finaliser on one Python integer (taken modulo 2**64)."""
    word &= WORD_MASK
    word = (word ^ (word >> 30)) * _M1 & WORD_MASK
    word = (word ^ (word >> 27)) * _M2 & WORD_MASK
    return word ^ (word >> 31)


def key_of(*words: int) -> int:
    """One 64-bit key from any number of integers; their order matters."""
    key = 0
    for word in words:
        key = mix_word(key + GOLDEN64 + mix_word(word + GOLDEN64))
    return key


def mix64(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on an array of uint64, element by element; the argument is left as it was."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_M1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_M2)
    return words ^ (words >> np.uint64(31))


def mix32_in_place(words: np.ndarray, keys: np.ndarray | np.uint32, scratch: np.ndarray) -> None:
    """lowbias32 on an array of uint32, in place.

    Args:
        words: any shape; holds the result.
        keys: uint32, broadcastable to `words`; enters half-way.
        scratch: like `words`; its content is lost. The caller may use it again, which spares a page fault per page.
    """
    words ^= np.right_shift(words, np.uint32(16), out=scratch)
    words *= np.uint32(0x7FEB_352D)
    words ^= keys
    words ^= np.right_shift(words, np.uint32(15), out=scratch)
    words *= np.uint32(0x846C_A68B)
    words ^= np.right_shift(words, np.uint32(16), out=scratch)
