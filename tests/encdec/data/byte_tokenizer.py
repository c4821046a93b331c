"""A fake tokenizer that is small, reversible and really tokenizes."""

from __future__ import annotations

import numpy as np


class ByteTokenizer:
    """UTF-8 bytes as ids 2..257, EOS 1, padding 0 or EOS, sentinels above."""

    def __init__(self, num_sentinels: int = 100, pad_token_id: int = 0, vocab_size: int = 400) -> None:
        self.eos_token_id, self.pad_token_id, self._vocab_size = 1, pad_token_id, vocab_size
        self.sentinel_ids = list(range(258, 258 + num_sentinels))

    def __len__(self) -> int:
        return self._vocab_size

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        return [[byte + 2 for byte in text.encode()] for text in texts]

    def decode(self, ids: np.ndarray) -> list[str]:
        """Documents of a token stream, the last one perhaps cut."""
        raw = bytes(int(token) - 2 if token != 1 else 0 for token in ids)
        return [part.decode(errors="ignore") for part in raw.split(b"\0")]

    def fingerprint(self) -> str:
        return f"bytes-{self._vocab_size}"
