"""Shared by the data tests."""

from __future__ import annotations

import pytest
from byte_tokenizer import ByteTokenizer


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()
