"""What a run reads before it has a model: its tokenizer and the packed text, made once and then reused."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from blake3 import blake3

from encdec.data.corpus import Corpus, open_corpus
from encdec.data.packing import ensure_packed
from encdec.files import staged_directory
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training.config import FullConfig
from encdec.training.run_config import RunConfig

log = logging.getLogger("encdec.train")
SECONDS_BETWEEN_LOOKS = 0.05


def prepare_text(run: RunConfig) -> tuple[Qwen3EncoderDecoderTokenizer, Path]:
    """The tokenizer and the folder of packed text, made once and then reused by every run and rank.

    Global rank 0 makes what is missing, however long it takes; the others wait for the finished folders. This happens
    before there is a process group, whose collectives would time out.
    """
    config, data = run.config, run.config.data
    os.environ["RAYON_NUM_THREADS"] = str(data.preprocessing_num_workers)  # read when the first batch is tokenized
    corpus = corpus_of(config)
    first = int(os.environ.get("RANK", 0)) == 0
    tokenizer = _tokenizer(config, corpus, first)
    folder = Path(data.packed_dir) / f"packed-{_key(corpus, tokenizer, run)}"
    if first:
        began = time.perf_counter()
        index = ensure_packed(
            corpus, tokenizer, folder, sample_length=run.sample_length, validation_fraction=data.validation_fraction
        )
        samples = index.splits["train"].samples
        log.info(
            "%s: %d samples of %d tokens, ready in %.1f s",
            index.corpus,
            samples,
            index.sample_length,
            time.perf_counter() - began,
        )
    else:
        _wait_for(folder)
    return tokenizer, folder


def corpus_of(config: FullConfig) -> Corpus:
    """The text that the configuration names; nothing of it is read yet."""
    data = config.data
    return open_corpus(
        data.dataset_name,
        text_column=data.text_column,
        dataset_config=data.dataset_config,
        streaming=data.streaming,
        max_examples=data.max_examples,
    )


def load_tokenizer_of(config: FullConfig) -> Qwen3EncoderDecoderTokenizer:
    """The tokenizer that the configuration names, in one process; one that is to be trained is, where none is there."""
    return _tokenizer(config, corpus_of(config), first=True)


def _tokenizer(config: FullConfig, corpus: Corpus, first: bool) -> Qwen3EncoderDecoderTokenizer:
    model = config.model
    if model.train_tokenizer_vocab_size is None:
        name = model.tokenizer_name_or_path or model.model_name_or_path
        return Qwen3EncoderDecoderTokenizer.from_pretrained(
            name, num_sentinel_tokens=model.num_sentinel_tokens, mode_tokens=model.use_mode_tokens
        )
    facts = [corpus.fingerprint(), model.train_tokenizer_vocab_size, model.num_sentinel_tokens]
    if model.use_mode_tokens:
        facts.append("mode tokens")
    folder = Path(config.data.packed_dir) / f"tokenizer-{_short_digest(*facts)}"
    if first and not folder.is_dir():
        log.info("training a tokenizer of %d entries on %s", model.train_tokenizer_vocab_size, corpus.description)
        made = Qwen3EncoderDecoderTokenizer.train_from_texts(
            corpus.documents(), model.train_tokenizer_vocab_size, model.num_sentinel_tokens,
            mode_tokens=model.use_mode_tokens,
        )  # fmt: skip
        try:
            with staged_directory(folder) as staging:
                made.save_pretrained(staging)
        except FileExistsError:
            log.info("another run has made the same tokenizer meanwhile")
    _wait_for(folder)
    return Qwen3EncoderDecoderTokenizer.from_pretrained(str(folder))


def _key(corpus: Corpus, tokenizer: Qwen3EncoderDecoderTokenizer, run: RunConfig) -> str:
    fraction = run.config.data.validation_fraction
    return _short_digest(corpus.fingerprint(), tokenizer.fingerprint(), run.sample_length, fraction)


def _short_digest(*facts: object) -> str:
    return blake3(repr(facts).encode()).hexdigest()[:16]


def _wait_for(folder: Path) -> None:
    while not folder.is_dir():
        time.sleep(SECONDS_BETWEEN_LOOKS)
