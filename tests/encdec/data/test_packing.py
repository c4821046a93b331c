"""Packing: complete or absent, once, and the text comes back."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest
from byte_tokenizer import ByteTokenizer

from encdec.data import packed
from encdec.data.corpus import is_held_out, open_corpus
from encdec.data.packing import ensure_packed, open_packed, pack_corpus
from encdec.errors import DataError

DOCUMENTS = [f"document {number}: " + "text " * (number % 17) for number in range(300)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return open_corpus(str(path))


def test_the_text_comes_back(corpus, tokenizer, tmp_path):
    calls = []
    index = pack_corpus(
        corpus, tokenizer, tmp_path / "out", sample_length=64, validation_fraction=0.2, tokens_per_shard=1000,
        progress=lambda documents, tokens: calls.append((documents, tokens)),
    )  # fmt: skip
    for split, held_out in (("train", False), ("validation", True)):
        dataset = open_packed(tmp_path / "out", split)
        expected = [text for number, text in enumerate(DOCUMENTS) if is_held_out(number, 0.2) == held_out]
        stream = np.concatenate([dataset[sample] for sample in range(len(dataset))])
        decoded = tokenizer.decode(stream)
        assert decoded[:-1] == expected[: len(decoded) - 1] and expected[len(decoded) - 1].startswith(decoded[-1])
        facts = index.splits[split]
        assert facts.documents == len(expected)
        assert facts.tokens == sum(len(text) + 1 for text in expected)
        assert facts.samples == len(dataset) == facts.tokens // 64
        assert facts.dropped_tail_tokens == facts.tokens - 64 * len(dataset) < 64
        assert len(facts.shards) > 1 and {shard.tokens for shard in facts.shards[:-1]} == {960}
        dataset.verify()
    assert calls == [(300, sum(split.tokens for split in index.splits.values()))]


def test_packing_is_deterministic(corpus, tokenizer, tmp_path):
    for name in ("one", "two"):
        pack_corpus(corpus, tokenizer, tmp_path / name, sample_length=32)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert contents[0] == contents[1]


def test_batches_for_the_tokenizer_do_not_change_the_result(corpus, tokenizer, tmp_path, monkeypatch):
    pack_corpus(corpus, tokenizer, tmp_path / "one", sample_length=32)
    monkeypatch.setattr("encdec.data.packing._BATCH_DOCUMENTS", 7)
    pack_corpus(corpus, tokenizer, tmp_path / "two", sample_length=32)
    assert (tmp_path / "one" / "index.json").read_bytes() == (tmp_path / "two" / "index.json").read_bytes()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_are_as_narrow_as_the_vocabulary_allows(corpus, tmp_path, vocab_size, dtype):
    pack_corpus(corpus, ByteTokenizer(vocab_size=vocab_size), tmp_path / "out", sample_length=32)
    assert open_packed(tmp_path / "out", "train")[0].dtype == dtype


def test_samples_by_number(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_OPEN_MAPS", 2)
    pack_corpus(corpus, tokenizer, tmp_path / "out", sample_length=32, tokens_per_shard=64, validation_fraction=0)
    dataset = open_packed(tmp_path / "out", "train")
    ids = [len(dataset) - 1, 0, 5, 5]
    samples = dataset.__getitems__(ids)
    assert samples.shape == (4, 32)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(np.array_equal(copy[sample_id], row) for sample_id, row in zip(ids, samples, strict=True))
    for outside in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[outside]
    assert len(open_packed(tmp_path / "out", "validation")) == 0


def test_an_interrupted_packer_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("encdec.data.packing._BATCH_DOCUMENTS", 100)

    def interrupt(documents, tokens):
        if documents >= 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_corpus(corpus, tokenizer, tmp_path / "new" / "out", sample_length=32, progress=interrupt)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.lock"]


def _pack_and_report(text_path, directory, delay, reports):
    class CountingTokenizer(ByteTokenizer):
        def encode_documents(self, texts):
            reports.put(os.getpid())
            time.sleep(delay)
            return super().encode_documents(texts)

    ensure_packed(open_corpus(text_path), CountingTokenizer(), directory, sample_length=32)
    reports.put("done")


def test_two_packers_pack_once(corpus, tmp_path):
    context = multiprocessing.get_context("fork")
    reports = context.Queue()
    arguments = (str(tmp_path / "text.jsonl"), str(tmp_path / "out"), 0.3, reports)
    packers = [context.Process(target=_pack_and_report, args=arguments) for _ in range(3)]
    for packer in packers:
        packer.start()
    found = [reports.get(timeout=20) for _ in range(4)]
    for packer in packers:
        packer.join()
    assert found.count("done") == 3 and len(found) == 4, "the tokenizer was called by one of them, once"
    assert len(open_packed(tmp_path / "out", "train")) > 0


def test_a_killed_packer_is_replaced_and_its_remains_removed(corpus, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    reports = context.Queue()
    arguments = (str(tmp_path / "text.jsonl"), str(tmp_path / "new" / "out"), 60, reports)
    packer = context.Process(target=_pack_and_report, args=arguments)
    packer.start()
    reports.get(timeout=20)
    os.kill(packer.pid, signal.SIGKILL)
    packer.join()
    assert not (tmp_path / "new" / "out").exists()
    assert len(list((tmp_path / "new").glob(".out.*"))) == 1
    ensure_packed(corpus, tokenizer, tmp_path / "new" / "out", sample_length=32)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out", "out.lock"]


def test_what_is_packed_is_found_again_or_refused(corpus, tokenizer, tmp_path):
    first = ensure_packed(corpus, tokenizer, tmp_path / "out", sample_length=32)
    assert ensure_packed(corpus, tokenizer, tmp_path / "out", sample_length=32) == first
    with pytest.raises(DataError, match="sample_length 32 instead of 64"):
        ensure_packed(corpus, tokenizer, tmp_path / "out", sample_length=64)
    with pytest.raises(DataError, match="tokenizer_fingerprint"):
        ensure_packed(corpus, ByteTokenizer(vocab_size=300), tmp_path / "out", sample_length=32)
    with pytest.raises(DataError, match="does not exist"):
        pack_corpus(corpus, tokenizer, tmp_path / "out", sample_length=32)


def test_too_little_text_is_refused(corpus, tokenizer, tmp_path):
    with pytest.raises(DataError, match="at least one sample of 100000 tokens"):
        pack_corpus(corpus, tokenizer, tmp_path / "out", sample_length=100_000)
    with pytest.raises(DataError, match="validation split must hold"):
        pack_corpus(corpus, tokenizer, tmp_path / "out", sample_length=2_500, validation_fraction=0.05)
    (tmp_path / "small.txt").write_text("one short document " * 20)
    small = pack_corpus(open_corpus(str(tmp_path / "small.txt")), tokenizer, tmp_path / "small", sample_length=32)
    assert small.splits["validation"].samples == 0, "one document cannot be split; training goes on without"


def test_a_damaged_directory_is_named(corpus, tokenizer, tmp_path):
    pack_corpus(corpus, tokenizer, tmp_path / "out", sample_length=32)
    shard = tmp_path / "out" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.bin"):
        open_packed(tmp_path / "out", "train").verify()
    shard.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"train-00000\.bin"):
        open_packed(tmp_path / "out", "train")
    shard.unlink()
    with pytest.raises(DataError, match="found 0"):
        open_packed(tmp_path / "out", "train")
    (tmp_path / "out" / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index\.json"):
        open_packed(tmp_path / "out", "train")
