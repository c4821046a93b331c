"""UL2 denoising: one packed sample of raw tokens becomes an encoder input and a decoder target.

Shapes: B samples, L raw tokens per sample, N noise tokens, K = L - N kept tokens, s spans;
S_e = K + s + 1 encoder tokens, S_d = N + s + 1 decoder tokens (the + 1 is EOS on either side).

    tokens   k k k n n k k n            k: kept, n: noise; keep first, noise last
    encoder  k k k <0> k k <1> EOS      each span is replaced by its sentinel; a mode token may come before, not in S_e
    decoder  <0> n n <1> n EOS          each sentinel is followed by the span it stands for

Both sides are laid out from one span list, so they cannot disagree. Which task a sample gets, and where its spans lie,
is a function of (seed, epoch, sample id) alone. Nothing is ever cut off after corruption: `raw_sample_length` says
beforehand how many raw tokens fit.

Sources: UL2 (Tay et al., 2022, arXiv:2205.05131), T5's `random_spans_noise_mask` (Raffel et al., 2020), and the
five-task mixture of T5Gemma (Zhang et al., 2025, arXiv:2504.06225).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from encdec.data.randomness import GOLDEN64, WORD_MASK, key_of, mix64
from encdec.data.spans import Section, lay_out, segment_lengths
from encdec.denoisers import UL2_DENOISERS, checked_task_weights
from encdec.errors import ConfigError, DataError
from encdec.vocabulary import MODE_TOKENS

IGNORED_LABEL = -100
"""Label that the loss skips (torch's `cross_entropy` default)."""

SampleKey = tuple[int, int]
"""(epoch, sample id): all that the noise of a sample depends on, beside the seed."""

# Rows are corrupted in blocks of about this many tokens, so that temporaries stay in the L2 cache.
_BLOCK_TOKENS = 32_768


class CorruptedBatch(NamedTuple):
    """Both sides of B samples, padded on the right.

    Rows end where the lengths say; padding must never be recognised by its value, which may equal EOS.
    """

    encoder_ids: np.ndarray
    """[B, width >= max S_e] int64."""
    encoder_lengths: np.ndarray
    """[B] int64, S_e of each row; one more with mode tokens."""
    decoder_ids: np.ndarray
    """[B, width >= max S_d] int64: the targets, not shifted."""
    decoder_lengths: np.ndarray
    """[B] int64, S_d of each row."""
    tasks: np.ndarray
    """[B] int64, index into UL2_DENOISERS."""


class UL2Corruptor:
    """Corrupts packed samples, alone or in batches, with the same result either way.

    Args:
        sentinel_ids: ids that stand for span 0, 1, ...; distinct, and none of them EOS.
        eos_token_id: id that ends both sides.
        task_weights: shares of the tasks of UL2_DENOISERS, in that order.
        seed: changes tasks and spans of every sample.
        mode_token_ids: ids of vocabulary.MODE_TOKENS, one of which then opens each encoder input; or none.

    Raises:
        ConfigError: no sentinels, a sentinel twice, a sentinel that is EOS, or bad weights.
    """

    def __init__(
        self,
        sentinel_ids: Sequence[int],
        eos_token_id: int,
        task_weights: Sequence[float] = (1, 1, 1, 1, 4),
        seed: int = 42,
        mode_token_ids: Sequence[int] = (),
    ) -> None:
        sentinels = [int(sentinel) for sentinel in sentinel_ids]
        if not sentinels or len({*sentinels, int(eos_token_id)}) != len(sentinels) + 1:
            raise ConfigError(
                "the tokenizer must have at least one sentinel, all different from each other and from EOS",
                found=f"{len(sentinels)} sentinels {sentinels[:3]}... and EOS {eos_token_id}",
                remedy="Load the tokenizer with Qwen3EncoderDecoderTokenizer, num_sentinel_tokens >= 1",
            )
        self.sentinel_ids = np.array(sentinels, dtype=np.int64)
        self.eos_token_id = int(eos_token_id)
        self.task_weights = checked_task_weights(task_weights)
        modes = dict(zip(MODE_TOKENS, map(int, mode_token_ids), strict=bool(mode_token_ids)))
        of_task = [modes[denoiser.mode_token] for denoiser in UL2_DENOISERS] if modes else []
        self._mode_of_task = np.array(of_task, dtype=np.int64)
        """[tasks], or empty without mode tokens."""
        self.seed = int(seed)
        self._seed_key = np.uint64(key_of(self.seed))
        self._cumulative_weights = np.cumsum(self.task_weights) / np.sum(self.task_weights)

    def draw_tasks(self, keys: Sequence[SampleKey] | np.ndarray) -> np.ndarray:
        """[B] int64: the task of each sample, an index into UL2_DENOISERS."""
        return self._tasks_from(self._sample_words(keys))

    def side_lengths(self, sample_length: int, tasks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(S_e [B], S_d [B]) of samples of L tokens with the given tasks."""
        noise, spans = self._shape_table(sample_length)[tasks].T
        return sample_length - noise + spans + 1, noise + spans + 1

    def corrupt(self, tokens: np.ndarray, epoch: int, sample_id: int) -> tuple[np.ndarray, np.ndarray]:
        """(encoder ids [S_e], decoder ids [S_d]) of one sample, tokens [L]; both int64 and ending in EOS.

        With mode tokens the encoder side is one longer.
        """
        batch = self.corrupt_batch(np.asarray(tokens)[None, :], [(epoch, sample_id)])
        return batch.encoder_ids[0], batch.decoder_ids[0]

    def corrupt_batch(
        self,
        tokens: np.ndarray,
        keys: Sequence[SampleKey] | np.ndarray,
        *,
        encoder_limit: int | None = None,
        decoder_limit: int | None = None,
        width_multiple: int = 1,
        encoder_padding: int = 0,
        decoder_padding: int = IGNORED_LABEL,
    ) -> CorruptedBatch:
        """Corrupts B samples of one length.

        Args:
            tokens: [B, L] integers, L >= 2.
            keys: B pairs (epoch, sample id).
            encoder_limit, decoder_limit: the most columns the results may have, a mode token included; None is any
                number.
            width_multiple: columns are rounded up to a multiple of this, as far as the limit allows.
            encoder_padding, decoder_padding: values behind the end of a row.

        Raises:
            DataError: the shapes do not fit each other, or L < 2.
            ConfigError: a row is longer than its limit. It is never cut.
        """
        words = self._sample_words(keys)
        if tokens.ndim != 2 or len(tokens) != len(words) or len(words) == 0 or tokens.shape[1] < 2:
            raise DataError(
                "a batch must be [B, L] tokens with L >= 2 and B >= 1 keys",
                found=f"tokens of shape {tokens.shape} and {len(words)} keys",
                remedy="Pack the corpus again with sample_length from raw_sample_length()",
            )
        tasks = self._tasks_from(words)
        encoder_lengths, decoder_lengths = self.side_lengths(tokens.shape[1], tasks)
        opened = int(self._mode_of_task.size > 0)
        encoder = _padded(encoder_lengths + opened, encoder_limit, width_multiple, encoder_padding, "encoder")
        batch = CorruptedBatch(
            encoder[:, opened:],
            encoder_lengths,
            _padded(decoder_lengths, decoder_limit, width_multiple, decoder_padding, "decoder"),
            decoder_lengths,
            tasks,
        )
        by_task = np.argsort(tasks, kind="stable")
        several_spans = self._shape_table(tokens.shape[1])[tasks[by_task], 1] > 1
        self._cut_tails(tokens, by_task[~several_spans], batch)
        several, block_rows = by_task[several_spans], max(1, _BLOCK_TOKENS // tokens.shape[1])
        for start in range(0, len(several), block_rows):
            self._cut_spans(tokens, words, several[start : start + block_rows], batch)
        every_row = np.arange(len(tasks))
        batch.encoder_ids[every_row, encoder_lengths - 1] = self.eos_token_id
        batch.decoder_ids[every_row, decoder_lengths - 1] = self.eos_token_id
        if not opened:
            return batch
        encoder[:, 0] = self._mode_of_task[tasks]
        return batch._replace(encoder_ids=encoder, encoder_lengths=encoder_lengths + 1)

    def _sample_words(self, keys: Sequence[SampleKey] | np.ndarray) -> np.ndarray:
        """[B] uint64: one random word per sample, from (seed, epoch, sample id)."""
        pairs = np.asarray(keys, dtype=np.int64).reshape(-1, 2).astype(np.uint64)
        epoch_words = mix64(pairs[:, 0] * np.uint64(GOLDEN64) + self._seed_key)
        return mix64(pairs[:, 1] * np.uint64(GOLDEN64) + epoch_words)

    def _tasks_from(self, words: np.ndarray) -> np.ndarray:
        uniform = (mix64(words + np.uint64(GOLDEN64)) >> np.uint64(11)) * 2.0**-53  # [0, 1)
        return np.searchsorted(self._cumulative_weights, uniform, side="right")

    def _shape_table(self, sample_length: int) -> np.ndarray:
        """[tasks, 2] int64: (N, s) of each task of UL2_DENOISERS for samples of L tokens."""
        return _shape_table(sample_length, len(self.sentinel_ids))

    def _cut_tails(self, tokens: np.ndarray, rows: np.ndarray, batch: CorruptedBatch) -> None:
        """Corrupts `rows`, sorted by task, that have one span, their tail: slices do, for nothing is random."""
        for section in self._sections(batch.tasks[rows], tokens.shape[1]):
            at, keep = rows[section.rows], section.keep
            batch.encoder_ids[at, :keep] = tokens[at, :keep]
            batch.decoder_ids[at, 1 : section.noise + 1] = tokens[at, keep:]
            batch.encoder_ids[at, keep] = batch.decoder_ids[at, 0] = self.sentinel_ids[0]

    def _cut_spans(self, tokens: np.ndarray, words: np.ndarray, rows: np.ndarray, batch: CorruptedBatch) -> None:
        """Corrupts `rows`, sorted by task, that have two spans or more."""
        sections = self._sections(batch.tasks[rows], tokens.shape[1])
        noise_words = mix64(words[rows] + np.uint64(2 * GOLDEN64 & WORD_MASK))
        lengths = segment_lengths(noise_words, sections, tokens.shape[1])
        sides = lay_out(tokens[rows].astype(np.int64), lengths, sections, self.sentinel_ids)
        first = 0
        for section in sections:
            side = sides[first : first + section.height * section.width].reshape(section.height, section.width)
            first += side.size
            encoder_end = section.keep + section.spans
            batch.encoder_ids[rows[section.rows], :encoder_end] = side[:, :encoder_end]
            batch.decoder_ids[rows[section.rows], : section.noise + section.spans] = side[:, encoder_end + 1 : -1]

    def _sections(self, tasks: np.ndarray, sample_length: int) -> list[Section]:
        """One section per task of rows whose tasks are sorted."""
        sections, first = [], 0
        counts = np.bincount(tasks, minlength=len(UL2_DENOISERS)).tolist()
        for (noise, spans), count in zip(self._shape_table(sample_length).tolist(), counts, strict=True):
            if count:
                sections.append(Section(slice(first, first + count), sample_length - noise, noise, spans))
            first += count
        return sections


@lru_cache(maxsize=16)
def _shape_table(sample_length: int, num_sentinels: int) -> np.ndarray:
    table = np.array([denoiser.counts(sample_length, num_sentinels) for denoiser in UL2_DENOISERS], dtype=np.int64)
    table.setflags(write=False)
    return table


def _padded(lengths: np.ndarray, limit: int | None, multiple: int, padding: int, side: str) -> np.ndarray:
    """[B, width] int64 of padding, wide enough for every row."""
    longest = int(lengths.max())
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a corrupted sample must fit {limit} {side} tokens (it is never cut)",
            found=longest,
            remedy=f"Raise data.max_{side}_length, or pack again with sample_length from raw_sample_length()",
        )
    width = -(-longest // multiple) * multiple
    return np.full((len(lengths), width if limit is None else min(width, limit)), padding, dtype=np.int64)
