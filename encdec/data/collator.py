"""Samples to training batches: UL2 corruption and padding, as torch tensors.

Shapes: B samples of L raw tokens; S_e, S_d are the longest encoder and decoder side of the batch, rounded up.

    input_ids [B, S_e] int64, attention_mask [B, S_e] int64, labels [B, S_d] int64 (-100 where padded),
    sample_ids [B] int64
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypedDict

import numpy as np
import torch

from encdec.data.ul2_corruption import IGNORED_LABEL, SampleKey, UL2Corruptor
from encdec.errors import ConfigError


class DenoisingTokenizer(Protocol):
    """What the collator needs of a tokenizer."""

    sentinel_ids: list[int]
    eos_token_id: int
    pad_token_id: int


class Sample(TypedDict):
    """One packed sample."""

    key: SampleKey
    """(epoch, sample id)."""
    tokens: np.ndarray
    """[L] integers."""


class UL2DataCollator:
    """Corrupts and pads a list of samples: DataLoader(collate_fn=...).

    Args:
        tokenizer: for its sentinels, EOS and padding (which may be EOS: masks come from lengths, never from ids).
        max_encoder_length, max_decoder_length: limits of S_e and S_d in tokens. Nothing is cut to fit them.
        task_weights: shares of the tasks of UL2_DENOISERS.
        seed: key of the corruption, beside epoch and sample id.
        pad_to_multiple_of: widths are rounded up to this where the limits allow it.
        mode_token_ids: the tokenizer's, to open each encoder input with the one of its task; or none.

    Raises:
        ConfigError: bad weights or sentinels.
    """

    def __init__(
        self,
        tokenizer: DenoisingTokenizer,
        max_encoder_length: int,
        max_decoder_length: int,
        *,
        task_weights: Sequence[float] = (1, 1, 1, 1, 4),
        seed: int = 42,
        pad_to_multiple_of: int = 8,
        mode_token_ids: Sequence[int] = (),
    ) -> None:
        if pad_to_multiple_of < 1:
            raise ConfigError("pad_to_multiple_of must be at least 1", found=pad_to_multiple_of, remedy="Use 8")
        self.max_encoder_length, self.max_decoder_length = max_encoder_length, max_decoder_length
        self.pad_token_id, self.pad_to_multiple_of = int(tokenizer.pad_token_id), pad_to_multiple_of
        self.corruptor = UL2Corruptor(
            tokenizer.sentinel_ids, tokenizer.eos_token_id, task_weights, seed, mode_token_ids
        )

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """One batch, with the tensors that the module's head lists.

        Raises:
            ConfigError: a corrupted sample exceeds a limit, or the samples differ in length.
        """
        lengths = {len(sample["tokens"]) for sample in samples}
        if len(lengths) != 1:
            raise ConfigError(
                "a batch must hold samples of one length", found=sorted(lengths), remedy="Pack with one sample_length"
            )
        keys = np.array([sample["key"] for sample in samples], dtype=np.int64)
        batch = self.corruptor.corrupt_batch(
            np.stack([sample["tokens"] for sample in samples]),
            keys,
            encoder_limit=self.max_encoder_length,
            decoder_limit=self.max_decoder_length,
            width_multiple=self.pad_to_multiple_of,
            encoder_padding=self.pad_token_id,
            decoder_padding=IGNORED_LABEL,
        )
        mask = np.arange(batch.encoder_ids.shape[1]) < batch.encoder_lengths[:, None]
        return {
            "input_ids": torch.from_numpy(batch.encoder_ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "labels": torch.from_numpy(batch.decoder_ids),
            "sample_ids": torch.from_numpy(keys[:, 1].copy()),
        }
