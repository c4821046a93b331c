"""Packed tokens on disk: a directory of flat shards and an index, read as samples of exactly L tokens.

    <directory>/
      index.json                what is in it, where from, and the digest of every shard
      train-00000.bin ...       tokens, little-endian, one after another; a whole number of samples per shard
      validation-00000.bin ...

The directory is complete or absent: it gets its name when the last byte is on disk (see packing.py).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from encdec.errors import DataError

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
TRAIN, VALIDATION = "train", "validation"

# Each memory map holds a file descriptor, and processes commonly may have 1,024.
_OPEN_MAPS = 256


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens."""

    name: str
    """File name in the directory."""
    tokens: int
    """Tokens in it: a multiple of the sample length."""
    blake3: str
    """64 hex digits over the file's bytes."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The training or the validation part."""

    documents: int
    """Documents it was made from."""
    tokens: int
    """Tokens of those documents, each with its EOS."""
    samples: int
    """Samples of L tokens."""
    dropped_tail_tokens: int
    """Tokens after the last whole sample, which are not stored: tokens - samples * L, below L."""
    shards: tuple[Shard, ...]
    """In order; all but the last hold the same number of tokens."""


@dataclass(frozen=True, kw_only=True)
class PackedIndex:
    """Content of index.json."""

    version: int
    """Format version."""
    tokenizer_fingerprint: str
    """Of the tokenizer whose ids these are."""
    corpus: str
    """Description, for people."""
    corpus_fingerprint: str
    """Of the text."""
    validation_fraction: float
    """Share of documents held out."""
    sample_length: int
    """L, tokens per sample."""
    dtype: str
    """"<u2" or "<u4": unsigned, little-endian, 2 or 4 bytes."""
    splits: dict[str, Split]
    """"train" and "validation"."""

    def to_json(self) -> dict:
        """Plain values for index.json."""
        return asdict(self)

    @classmethod
    def read(cls, directory: Path) -> PackedIndex:
        """The index of a packed directory.

        Raises:
            DataError: there is none, or it is not one that this version wrote.
        """
        path = Path(directory) / INDEX_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != FORMAT_VERSION:
                raise ValueError(f"format version {content['version']}, not {FORMAT_VERSION}")
            splits = {
                name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
                for name, split in content.pop("splits").items()
            }
            return cls(**content, splits=splits)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} must be the index of packed data",
                found=f"{type(error).__name__}: {error}",
                remedy=f"Remove {directory}; it is packed again at the next start",
            ) from error


class PackedDataset:
    """Samples of one split, by number: a memory map per shard, opened when first read.

    Can be pickled; the copy opens its own maps.
    """

    def __init__(self, directory: Path, index: PackedIndex, split: str) -> None:
        self.directory, self.index, self.split_name = Path(directory), index, split
        self.split, self.sample_length = index.splits[split], index.sample_length
        self._samples_per_shard = self.split.shards[0].tokens // self.sample_length if self.split.shards else 1
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._check_sizes()

    def __len__(self) -> int:
        """Samples of the split."""
        return self.split.samples

    def __getitem__(self, sample_id: int) -> np.ndarray:
        """[L] uint16 or uint32: one sample, copied.

        Raises:
            IndexError: not in range(len(self)).
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)} in {self.directory} ({self.split_name})")
        shard, row = divmod(int(sample_id), self._samples_per_shard)
        return self._shard(shard)[row].copy()

    def __getitems__(self, sample_ids: Sequence[int]) -> np.ndarray:
        """[n, L] uint16 or uint32: the samples in the order asked for.

        Raises:
            IndexError: one is not in range(len(self)).
        """
        samples = np.empty((len(sample_ids), self.sample_length), dtype=self.index.dtype)
        for place, sample_id in enumerate(sample_ids):
            samples[place] = self[sample_id]
        return samples

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": OrderedDict()}

    def verify(self) -> None:
        """Reads every byte and compares the digests (about 5 GB/s when cached).

        Raises:
            DataError: a shard differs from the index; names it.
        """
        for shard in self.split.shards:
            found = blake3().update_mmap(self.directory / shard.name).hexdigest()
            if found != shard.blake3:
                raise self._damaged(shard, f"BLAKE3 {shard.blake3}", found)

    def _check_sizes(self) -> None:
        width = np.dtype(self.index.dtype).itemsize
        for shard in self.split.shards:
            path = self.directory / shard.name
            size = path.stat().st_size if path.is_file() else 0
            if size != shard.tokens * width:
                raise self._damaged(shard, f"{shard.tokens * width} bytes", size)

    def _damaged(self, shard: Shard, expected: str, found: object) -> DataError:
        return DataError(
            f"the shard {self.directory / shard.name} must have {expected}, as its index says",
            found=found,
            remedy=f"Remove {self.directory}; it is packed again at the next start",
        )

    def _shard(self, number: int) -> np.ndarray:
        """[samples, L]: the map of one shard."""
        if number in self._maps:
            self._maps.move_to_end(number)
            return self._maps[number]
        if len(self._maps) >= _OPEN_MAPS:
            self._maps.popitem(last=False)
        tokens = np.memmap(self.directory / self.split.shards[number].name, dtype=self.index.dtype, mode="r")
        self._maps[number] = np.asarray(tokens).reshape(-1, self.sample_length)
        return self._maps[number]


def open_packed(directory: Path | str, split: str) -> PackedDataset:
    """Opens one split, "train" or "validation", of a packed directory; an empty split has length 0.

    Raises:
        DataError: the index is missing or foreign, or a shard does not have the size the index says; names the file.
    """
    return PackedDataset(Path(directory), PackedIndex.read(Path(directory)), split)
