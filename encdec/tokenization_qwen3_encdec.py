"""Qwen's byte-level BPE with sentinels, and the encoding of documents as data.

Two ways in: `tokenizer(text)` reads `<extra_id_3>` and `<|im_end|>` as the special tokens they name, for people and
prompts; `encode_documents(texts)` reads every character as data, for corpora, where those strings are just text.
"""

from __future__ import annotations

import hashlib
import json
import numbers
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError, DataError, MissingPrerequisite
from encdec.vocabulary import (
    BYTE_ALPHABET_SIZE,
    EOS_TOKEN,
    MODE_TOKENS,
    PAD_TOKEN,
    reserved_tokens,
    sentinel_token,
)

DEFAULT_NUM_SENTINEL_TOKENS = 100


class Qwen3EncoderDecoderTokenizer(Qwen2Tokenizer):
    """Qwen's tokenizer with distinct padding and end-of-sequence tokens and contiguous, ascending sentinels.

    Saves, loads and encodes as transformers' own `Qwen2Tokenizer`, which it is; also through `AutoTokenizer`.
    """

    @classmethod
    def train_from_texts(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        num_sentinel_tokens: int = DEFAULT_NUM_SENTINEL_TOKENS,
        *,
        mode_tokens: bool = False,
    ) -> Qwen3EncoderDecoderTokenizer:
        """Learn a byte-level BPE with Qwen's normalisation and word splitting; the same texts give the same vocabulary.

        Args:
            texts: documents; read once.
            vocab_size: length of the result in tokens, everything counted: bytes, merges, padding, end, sentinels.
            num_sentinel_tokens: sentinels to add at the end.
            mode_tokens: add UL2's [R], [S] and [X] behind them.

        Raises:
            ConfigError: `vocab_size` leaves no room for the 256 bytes, or `num_sentinel_tokens` is negative.
            DataError: the texts have fewer distinct merges than `vocab_size` asks for.
        """
        _require_count(num_sentinel_tokens)
        reserved = reserved_tokens(num_sentinel_tokens, mode_tokens=mode_tokens)
        num_learned = vocab_size - len(reserved)
        if num_learned < BYTE_ALPHABET_SIZE:
            raise ConfigError(
                f"vocab_size must hold {BYTE_ALPHABET_SIZE} bytes and {len(reserved)} special tokens",
                found=vocab_size,
                remedy=f"Set vocab_size to {BYTE_ALPHABET_SIZE + len(reserved)} or more",
            )
        vocab, merges = _learn_bpe(texts, num_learned)
        if len(vocab) != num_learned:
            raise DataError(
                f"the texts must yield a vocabulary of {vocab_size} tokens",
                found=len(vocab) + len(reserved),
                remedy=f"Give more text, or set vocab_size to {len(vocab) + len(reserved)} or less",
            )
        # Ids follow this order. Being in the vocabulary without a merge, a reserved token is never made from text.
        vocab |= {token: num_learned + offset for offset, token in enumerate(reserved)}
        tokenizer = cls(vocab=vocab, merges=merges, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, unk_token=PAD_TOKEN)
        tokenizer._ensure_sentinels(num_sentinel_tokens)
        tokenizer._ensure_mode_tokens(mode_tokens)
        return tokenizer

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args,
        num_sentinel_tokens: int | None = None,
        mode_tokens: bool | None = None,
        **kwargs,
    ) -> Qwen3EncoderDecoderTokenizer:
        """Load from a directory or the hub, and add what an encoder-decoder needs where it is missing.

        A tokenizer that ends and pads with the same token (Qwen3's base models) gets `<|im_end|>` as its end.

        Args:
            pretrained_model_name_or_path: a saved tokenizer of this class, or any Qwen2 or Qwen3 checkpoint.
            num_sentinel_tokens: sentinels wanted; None keeps those that are there, or adds 100 if there are none.
            mode_tokens: whether UL2's [R], [S] and [X] are wanted behind the sentinels; None keeps those that are
                there. Text for people that holds them literally (`x[R]`) then reads as mode tokens, documents never do.
            *args, **kwargs: transformers' own.

        Raises:
            ConfigError: the tokenizer already has more sentinels than wanted, or fewer than 0 are wanted; it has mode
                tokens where none are wanted, or lacks `<|im_end|>`.
            MissingPrerequisite: no such directory, no tokenizer in it, or no way to the hub.
        """
        if num_sentinel_tokens is not None:
            _require_count(num_sentinel_tokens)
        try:
            tokenizer = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError as error:
            raise _nothing_to_load(pretrained_model_name_or_path) from error
        if len(tokenizer) < BYTE_ALPHABET_SIZE:  # transformers makes an empty tokenizer of an empty directory
            raise _nothing_to_load(pretrained_model_name_or_path)
        tokenizer._ensure_distinct_end()
        if num_sentinel_tokens is None:
            num_sentinel_tokens = len(tokenizer.sentinel_ids) or DEFAULT_NUM_SENTINEL_TOKENS
        tokenizer._ensure_sentinels(num_sentinel_tokens)
        if mode_tokens is not None:
            tokenizer._ensure_mode_tokens(mode_tokens)
        return tokenizer

    @property
    def mode_token_ids(self) -> list[int]:
        """Ids of [R], [S] and [X]; empty without mode tokens. A new list each time: keep it."""
        added = self.get_added_vocab()
        return [added[name] for name in MODE_TOKENS if name in added]

    @property
    def sentinel_ids(self) -> list[int]:
        """Ids of `<extra_id_0>`, `<extra_id_1>`, ...: contiguous and ascending. A new list each time: keep it."""
        added = self.get_added_vocab()
        names = map(sentinel_token, range(len(added)))
        return [added[name] for name in names if name in added]

    @property
    def decoder_start_token_id(self) -> int:
        """Id that opens every decoder input: the padding token's, as in T5."""
        return self.pad_token_id

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, as data: no special token is added, and none is recognised.

        A literal `<|im_end|>` or `<extra_id_3>` in a source file becomes the tokens of its characters. Runs in Rust,
        over all texts at once; `TOKENIZERS_PARALLELISM` and `RAYON_NUM_THREADS` govern its threads.
        """
        return [encoding.ids for encoding in self._data_encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, token_ids, *args, **kwargs) -> str:
        """As transformers' own, which says nothing about ids that it does not know.

        Raises:
            DataError: there are some.
        """
        token_ids = int(token_ids) if isinstance(token_ids, numbers.Integral) else token_ids  # NumPy's, too
        self._require_known([token_ids] if isinstance(token_ids, int) else token_ids)
        return super()._decode(token_ids, *args, **kwargs)

    def convert_ids_to_tokens(self, ids, *args, **kwargs):
        """As transformers' own, which makes None of ids that it does not know.

        Raises:
            DataError: there are some.
        """
        ids = int(ids) if isinstance(ids, numbers.Integral) else ids  # NumPy's, too
        self._require_known([ids] if isinstance(ids, int) else ids)
        return super().convert_ids_to_tokens(ids, *args, **kwargs)

    def _require_known(self, ids: Iterable[int]) -> None:
        unknown = sorted(number for number in {int(one) for one in ids} if not self._knows(number))
        if unknown:
            shown = ", ".join(map(str, unknown[:3])) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            raise DataError(
                f"every id to decode must be one of the tokenizer's {len(self):,} tokens",
                found=shown,
                remedy="Cut ids off at the end token, replace the label -100 by the padding id, and use the tokenizer "
                "that was saved with the model",
            )

    def _knows(self, number: int) -> bool:
        return 0 <= number < 2**32 and self.backend_tokenizer.id_to_token(number) is not None

    def fingerprint(self) -> str:
        """SHA-256, 64 hex digits, of what decides the ids: vocabulary, merges, normalisation, special tokens.

        Tokens packed under one fingerprint mean the same under every tokenizer that has it.
        """
        backend = json.loads(self.backend_tokenizer.to_str())
        identity = {
            "vocabulary": backend["model"]["vocab"],
            "merges": backend["model"]["merges"],
            "normalizer": backend["normalizer"],
            "pre_tokenizer": backend["pre_tokenizer"],
            "added_tokens": [[token["id"], token["content"], token["special"]] for token in backend["added_tokens"]],
            "roles": [self.pad_token_id, self.eos_token_id, self.decoder_start_token_id, self.sentinel_ids],
        }
        if self.mode_token_ids:
            identity["mode_tokens"] = self.mode_token_ids
        canonical = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def assert_matches(self, config: Qwen3EncoderDecoderConfig) -> None:
        """Check that a model reads this tokenizer's ids as they are meant.

        Raises:
            ConfigError: an id or a count differs (both values are named), or a token has no row in the embedding.
        """
        sentinel_ids = self.sentinel_ids
        pairs = {
            "pad_token_id": (self.pad_token_id, config.pad_token_id),
            "eos_token_id": (self.eos_token_id, config.eos_token_id),
            "decoder_start_token_id": (self.decoder_start_token_id, config.decoder_start_token_id),
            "num_sentinel_tokens": (len(sentinel_ids), config.num_sentinel_tokens),
            "mode_token_ids": (self.mode_token_ids, list(config.mode_token_ids or [])),
        }
        if sentinel_ids and config.num_sentinel_tokens:
            pairs["sentinel_start_id"] = (sentinel_ids[0], config.sentinel_start_id)
        for name, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise ConfigError(
                    f"tokenizer and model must agree on {name}",
                    found=f"{ours} in the tokenizer and {theirs} in the model",
                    remedy="Use the tokenizer that was saved with the model, or build the model's config from this one",
                )
        if len(self) > config.vocab_size:
            raise ConfigError(
                "every token must have a row in the embedding",
                found=f"{len(self)} tokens and vocab_size={config.vocab_size}",
                remedy=f"Set vocab_size to {len(self)} or more",
            )

    @cached_property
    def _data_encoder(self) -> Tokenizer:
        """The BPE without its added tokens. Switching off special tokens would not do: Qwen marks some of its added
        tokens (`<|fim_prefix|>`, `<tool_call>`) as ordinary, and those would still be recognised."""
        backend = json.loads(self.backend_tokenizer.to_str())
        backend |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(backend))

    def _ensure_distinct_end(self) -> None:
        if self.eos_token_id != self.pad_token_id:
            return
        if EOS_TOKEN not in self.get_vocab():
            raise ConfigError(
                f"padding and end must be different tokens, and {EOS_TOKEN} must exist to be the end",
                found=f"{self.pad_token} for both in {self.name_or_path}",
                remedy="Use a Qwen2 or Qwen3 tokenizer, or pass eos_token=",
            )
        self.eos_token = EOS_TOKEN

    def _ensure_mode_tokens(self, wanted: bool) -> None:
        present = len(self.mode_token_ids)
        if wanted and not present:
            self.add_special_tokens({"extra_special_tokens": list(MODE_TOKENS)}, replace_extra_special_tokens=False)
        elif present != (len(MODE_TOKENS) if wanted else 0):
            raise ConfigError(
                f"a tokenizer must have all of {', '.join(MODE_TOKENS)} or none, as it was made",
                found=f"{present} of them and mode_tokens={wanted}",
                remedy="Set model.use_mode_tokens (mode_tokens) as the tokenizer has it, or start from another one",
            )

    def _ensure_sentinels(self, count: int) -> None:
        present = len(self.sentinel_ids)
        if present > count:
            raise ConfigError(
                "a tokenizer cannot lose sentinels",
                found=f"{present} present and num_sentinel_tokens={count}",
                remedy=f"Set num_sentinel_tokens to {present} or leave it out",
            )
        if present < count:
            wanted = [sentinel_token(index) for index in range(count)]
            self.add_special_tokens({"extra_special_tokens": wanted}, replace_extra_special_tokens=False)
        ids = self.sentinel_ids
        if ids != list(range(ids[0], ids[0] + count) if ids else []):
            raise ConfigError(
                "sentinel ids must be contiguous and ascending",
                found=f"{count} sentinels from {ids[0]} to {ids[-1]}",
                remedy=f"Start from a tokenizer with no sentinels, or with exactly {count}",
            )


def _learn_bpe(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of `vocab_size` tokens at most, by Qwen's rules for normalising and splitting text."""
    qwen = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _require_count(num_sentinel_tokens: int) -> None:
    if num_sentinel_tokens < 0:
        raise ConfigError(
            "num_sentinel_tokens must be 0 or more", found=num_sentinel_tokens,
            remedy=f"{DEFAULT_NUM_SENTINEL_TOKENS} is the default",
        )  # fmt: skip


def _nothing_to_load(name: str | Path) -> MissingPrerequisite:
    return MissingPrerequisite(
        "a tokenizer must be in the directory named, on the hub or in its local cache",
        found=name,
        remedy="Correct the name; without a network, download the tokenizer elsewhere and give its directory",
    )


AutoTokenizer.register(Qwen3EncoderDecoderConfig, fast_tokenizer_class=Qwen3EncoderDecoderTokenizer)
