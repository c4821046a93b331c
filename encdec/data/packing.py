"""Packing: a corpus becomes shards of tokens, once, whoever asks first.

Each document's tokens and EOS are put one after another and cut into samples of exactly L tokens; a sample may begin
and end within a document. What is left at the end of a split, shorter than L, is dropped and counted in the index.
Packing the same text with the same tokenizer gives the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from blake3 import blake3

from encdec.data.corpus import Corpus, is_held_out
from encdec.data.packed import (
    FORMAT_VERSION,
    INDEX_NAME,
    TRAIN,
    VALIDATION,
    PackedDataset,
    PackedIndex,
    Shard,
    Split,
    open_packed,
)
from encdec.errors import DataError
from encdec.files import atomic_write_json, make_parents, staged_directory

__all__ = ["PackedDataset", "PackedIndex", "TextTokenizer", "ensure_packed", "open_packed", "pack_corpus"]

logger = logging.getLogger(__name__)

# A batch for the tokenizer ends at either limit: enough to keep its threads busy, a few hundred MB as Python integers
# at the most.
_BATCH_DOCUMENTS = 1_000
_BATCH_CHARACTERS = 4_000_000
# An empty validation split is an error only where about this many documents should be in it.
_EXPECTED_HELD_OUT = 10


class TextTokenizer(Protocol):
    """What packing needs of a tokenizer."""

    eos_token_id: int

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    def fingerprint(self) -> str:
        """Changes when the ids of any text may change."""

    def __len__(self) -> int:
        """Size of the vocabulary: every id is below it."""


def ensure_packed(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    directory: Path | str,
    *,
    sample_length: int,
    validation_fraction: float = 0.01,
    tokens_per_shard: int = 2**26,
    progress: Callable[[int, int], None] | None = None,
) -> PackedIndex:
    """Packs unless it has been done; waits where another process is at it. Arguments as for `pack_corpus`.

    Raises:
        DataError: as `pack_corpus`; or the directory holds something else than what is asked for.
    """
    directory = Path(directory)
    wanted = _identity(corpus, tokenizer, sample_length, validation_fraction)
    if not directory.exists():
        with _lock(directory):
            if not directory.exists():
                return _pack(corpus, tokenizer, directory, wanted, tokens_per_shard, progress)
    index = PackedIndex.read(directory)
    differing = [name for name, value in wanted.items() if getattr(index, name) != value]
    if differing:
        raise DataError(
            f"packed data must have been made from what is asked for ({directory})",
            found=", ".join(f"{name} {getattr(index, name)} instead of {wanted[name]}" for name in differing),
            remedy="Remove the directory, or name another one",
        )
    return index


def pack_corpus(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    directory: Path | str,
    *,
    sample_length: int,
    validation_fraction: float = 0.01,
    tokens_per_shard: int = 2**26,
    progress: Callable[[int, int], None] | None = None,
) -> PackedIndex:
    """Tokenizes and packs a corpus into a new directory, which appears when it is complete.

    Args:
        corpus: where the documents come from.
        tokenizer: turns them into ids.
        directory: must not exist; `<directory>.lock` beside it keeps other packers waiting.
        sample_length: L, tokens per sample.
        validation_fraction: share of documents held out, 0 to below 1.
        tokens_per_shard: tokens per file, rounded down to whole samples (at least one).
        progress: called as progress(documents, tokens) after each batch of about 1,000 documents.

    Raises:
        DataError: the directory exists; there is no text, too little for one sample, or no validation sample though
            the corpus is large enough for one.
        MissingPrerequisite: a hub dataset cannot be reached.
    """
    directory = Path(directory)
    with _lock(directory):
        if directory.exists():
            raise DataError("packing needs a directory that does not exist", found=directory, remedy="Remove it")
        wanted = _identity(corpus, tokenizer, sample_length, validation_fraction)
        return _pack(corpus, tokenizer, directory, wanted, tokens_per_shard, progress)


def _identity(corpus: Corpus, tokenizer: TextTokenizer, sample_length: int, validation_fraction: float) -> dict:
    """The fields of the index that decide whether packed data is what is asked for."""
    if sample_length < 2 or not 0 <= validation_fraction < 1:
        raise DataError(
            "packing needs a sample length >= 2 and a validation fraction of 0 to below 1",
            found=f"{sample_length} and {validation_fraction}",
            remedy="Take the length from raw_sample_length()",
        )
    return {
        "version": FORMAT_VERSION,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "corpus_fingerprint": corpus.fingerprint(),
        "validation_fraction": validation_fraction,
        "sample_length": sample_length,
        "dtype": "<u2" if len(tokenizer) <= 2**16 else "<u4",
    }


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One packer at a time, by flock(2) on `<directory>.lock`, which the kernel releases when its holder dies.

    The file stays: removing it would let two packers hold two different files of that name.
    """
    make_parents(directory)
    place = directory.with_name(directory.name + ".lock")
    with open(os.open(place, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process is packing %s; waiting for it", directory)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise DataError(
                "the file system of the packed data must support file locks",
                found=f"{error} at {place}",
                remedy="Pack into a directory on another file system, and copy it here",
            ) from error
        yield


def _pack(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    directory: Path,
    identity: dict,
    tokens_per_shard: int,
    progress: Callable[[int, int], None] | None,
) -> PackedIndex:
    """Packs while the lock is held."""
    for left_over in directory.parent.glob(f".{directory.name}.*.tmp"):  # of a packer that was killed: we have its lock
        shutil.rmtree(left_over, ignore_errors=True)
    with staged_directory(directory) as staging:
        writers = {
            name: _SplitWriter(staging, name, identity["dtype"], identity["sample_length"], tokens_per_shard)
            for name in (TRAIN, VALIDATION)
        }
        with contextlib.ExitStack() as files:
            for writer in writers.values():
                files.callback(writer.close)
            for numbered in _batches(corpus.documents()):
                encoded = tokenizer.encode_documents([text for _, text in numbered])
                for name, writer in writers.items():
                    held_out = name == VALIDATION
                    writer.write(
                        [
                            np.array([*ids, tokenizer.eos_token_id], dtype=identity["dtype"])
                            for (number, _), ids in zip(numbered, encoded, strict=True)
                            if is_held_out(number, identity["validation_fraction"]) == held_out
                        ]
                    )
                if progress is not None:
                    progress(numbered[-1][0] + 1, sum(writer.tokens for writer in writers.values()))
        splits = {name: writer.summary() for name, writer in writers.items()}
        _check_samples(splits, corpus, identity)
        index = PackedIndex(**identity, corpus=corpus.description, splits=splits)
        atomic_write_json(staging / INDEX_NAME, index.to_json())
    return index


def _batches(documents: Iterator[str]) -> Iterator[list[tuple[int, str]]]:
    """Lists of (number, document) of a size that suits the tokenizer."""
    batch, characters = [], 0
    for number, text in enumerate(documents):
        batch.append((number, text))
        characters += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_samples(splits: dict[str, Split], corpus: Corpus, identity: dict) -> None:
    train, validation = splits[TRAIN], splits[VALIDATION]
    length, fraction = identity["sample_length"], identity["validation_fraction"]
    if train.samples == 0:
        raise DataError(
            f"the training split must hold at least one sample of {length} tokens",
            found=f"{train.tokens} tokens in {train.documents} documents of {corpus.description}",
            remedy="Use more text, or shorter samples (data.max_seq_length)",
        )
    if validation.samples == 0 and fraction * (train.documents + validation.documents) >= _EXPECTED_HELD_OUT:
        raise DataError(
            f"the validation split must hold at least one sample of {length} tokens",
            found=f"{validation.tokens} tokens in {validation.documents} documents of {corpus.description}",
            remedy="Raise validation_fraction, or set it to 0 to train without validation",
        )


class _SplitWriter:
    """Writes one split's tokens into shards as they come, hashing on the way."""

    def __init__(self, directory: Path, name: str, dtype: str, sample_length: int, tokens_per_shard: int) -> None:
        self._directory, self._name, self._sample_length = directory, name, sample_length
        self._shard_tokens = max(tokens_per_shard // sample_length, 1) * sample_length
        self._rest = np.empty(0, dtype=dtype)  # tokens that do not fill a sample yet
        self._file: BinaryIO | None = None
        self._digest, self._in_shard = blake3(), 0
        self._shards: list[Shard] = []
        self.documents = self.tokens = 0

    def write(self, documents: list[np.ndarray]) -> None:
        """Appends documents, each with its EOS."""
        self.documents += len(documents)
        self.tokens += sum(map(len, documents))
        stream = np.concatenate([self._rest, *documents])
        whole = len(stream) // self._sample_length * self._sample_length
        self._rest = stream[whole:].copy()
        start = 0
        while start < whole:
            if self._file is None:
                self._file = (self._directory / self._next_name()).open("wb")
            piece = stream[start : min(whole, start + self._shard_tokens - self._in_shard)]
            content = piece.tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._in_shard += len(piece)
            start += len(piece)
            if self._in_shard == self._shard_tokens:
                self.close()

    def close(self) -> None:
        """Ends the current shard, if there is one."""
        if self._file is None:
            return
        self._file.close()
        self._shards.append(Shard(name=self._next_name(), tokens=self._in_shard, blake3=self._digest.hexdigest()))
        self._file, self._digest, self._in_shard = None, blake3(), 0

    def summary(self) -> Split:
        """What has been written."""
        return Split(
            documents=self.documents,
            tokens=self.tokens,
            samples=self.tokens // self._sample_length,
            dropped_tail_tokens=self.tokens % self._sample_length,
            shards=tuple(self._shards),
        )

    def _next_name(self) -> str:
        return f"{self._name}-{len(self._shards):05d}.bin"
