"""Where text comes from, and what is said when it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice

import pytest

from encdec.data.corpus import is_held_out, open_corpus
from encdec.errors import DataError, MissingPrerequisite


def test_the_standard_library_is_real_text_in_a_fixed_order():
    corpus = open_corpus("python-stdlib")
    first = list(islice(corpus.documents(), 50))
    assert first == list(islice(open_corpus("python-stdlib").documents(), 50))
    assert any("def " in text for text in first)
    assert corpus.fingerprint() == open_corpus("python-stdlib").fingerprint()
    assert corpus.fingerprint() != open_corpus("python-stdlib", max_examples=3).fingerprint()
    assert len(list(open_corpus("python-stdlib", max_examples=3).documents())) == 3


def test_files_of_all_kinds_are_read_in_order(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "three"}) + "\n\n" + json.dumps({"text": "four"}) + "\n")
    parquet.write_table(pyarrow.table({"text": ["five", "six"], "other": [1, 2]}), tmp_path / "c.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert list(open_corpus(str(tmp_path)).documents()) == ["one\ntwo", "three", "four", "five", "six"]
    assert list(open_corpus(str(tmp_path / "b.jsonl"), max_examples=1).documents()) == ["three"]


def test_a_long_text_file_comes_in_pieces_that_lose_nothing(tmp_path):
    lines = "".join(f"line {number} of a long file\n" for number in range(100_000))
    (tmp_path / "long.txt").write_text(lines)
    pieces = list(open_corpus(str(tmp_path / "long.txt")).documents())
    assert len(pieces) > 1
    assert "\n".join(pieces) + "\n" == lines


def test_the_fingerprint_follows_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = open_corpus(str(path)).fingerprint()
    assert open_corpus(str(path)).fingerprint() == before
    path.write_text("two")
    os.utime(path, ns=(1, 1))
    assert open_corpus(str(path)).fingerprint() != before


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="no such path"):
        open_corpus(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="no such files"):
        open_corpus(str(tmp_path))
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        list(open_corpus(str(tmp_path / "bad.jsonl")).documents())
    (tmp_path / "column.jsonl").write_text('{"content": "fine"}\n')
    with pytest.raises(DataError, match=r"'text'.*\['content'\].*data\.text_column"):
        list(open_corpus(str(tmp_path / "column.jsonl")).documents())
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="at least one document"):
        list(open_corpus(str(tmp_path / "empty.txt")).documents())
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match="whole"):
        list(open_corpus(str(tmp_path / "torn.parquet")).documents())
    with pytest.raises(DataError, match="max_examples"):
        open_corpus("python-stdlib", max_examples=0)


def test_a_hub_dataset_without_network_is_a_missing_prerequisite(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    corpus = open_corpus("some/dataset")
    assert len(corpus.fingerprint()) == 64, "needs no network: packed data can be found offline"
    with pytest.raises(MissingPrerequisite, match=r"some/dataset.*python-stdlib"):
        next(corpus.documents())


def test_hub_records_are_streamed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"body": "one"}, {"body": "two"}])
    assert list(open_corpus("some/dataset", text_column="body").documents()) == ["one", "two"]


def test_held_out_documents_are_a_fixed_fraction():
    held_out = [index for index in range(20_000) if is_held_out(index, 0.05)]
    assert 900 < len(held_out) < 1100
    assert set(held_out) <= {index for index in range(20_000) if is_held_out(index, 0.1)}
    assert not any(is_held_out(index, 0.0) for index in range(1000))


def test_nothing_heavy_is_imported_for_local_text():
    heavy = ["torch", "datasets", "transformers", "pyarrow"]
    program = f"import sys, encdec.data.packing; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
