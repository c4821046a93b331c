"""Text to train on: one name in, a stream of documents out.

Three kinds of source, told apart by the name:
    "python-stdlib"               real text on every machine with Python: the standard library's sources and its docs
    a path                        a .txt, .jsonl or .parquet file, or a directory of them
    anything else                 a Hugging Face dataset, by its name on the hub
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

from blake3 import blake3

from encdec.errors import DataError, MissingPrerequisite

PYTHON_STDLIB = "python-stdlib"
FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")

# Left out of the standard library: installed packages, and tests, which are long and repeat themselves.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
# A .txt file longer than this many characters becomes several documents, so that no file need fit in memory.
_TXT_PIECE = 2**20


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A source of documents that can be read any number of times, always in the same order."""

    description: str
    """What it is, in words, for plans and logs."""
    settings: dict[str, object]
    """Plain values that decide which documents come out."""
    max_examples: int | None = None
    """Read at most this many documents; None reads all."""
    read: Callable[[], Iterator[str]] = field(repr=False)
    """Opens the source anew."""
    evidence: Callable[[], Iterator[str]] = field(repr=False)
    """Strings that change when the content does: sizes and times of files. Needs no network."""
    is_local: bool = True
    """Whether it can be read without a network."""

    def documents(self) -> Iterator[str]:
        """The documents, in a fixed order.

        Raises:
            DataError: there is none, or a record is not what the source promises.
            MissingPrerequisite: a hub dataset cannot be reached.
        """
        empty = True
        for document in islice(self.read(), self.max_examples):
            empty = False
            yield document
        if empty:
            raise DataError(
                "A corpus must hold at least one document with text",
                found=f"none in {self.description}",
                remedy="Check data.dataset_name, data.text_column and data.max_examples",
            )

    def fingerprint(self) -> str:
        """64 hex digits that change when settings or files do (files count by path, size and time of change).

        A hub dataset counts by its settings only: a node without network must be able to find what was packed. Files
        are looked at once; a corpus opened anew looks again.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = blake3(json.dumps([self.settings, self.max_examples], sort_keys=True).encode())
        for line in self.evidence():
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def open_corpus(
    dataset_name: str,
    *,
    text_column: str = "text",
    dataset_config: str | None = None,
    streaming: bool = True,
    max_examples: int | None = None,
) -> Corpus:
    """Finds a corpus by name; reads nothing yet.

    Args:
        dataset_name: "python-stdlib", a path, or a name on the Hugging Face hub.
        text_column: field of a record that holds the text (.jsonl, .parquet, hub).
        dataset_config: configuration of a hub dataset, such as "sample-10BT".
        streaming: whether a hub dataset is streamed while it is packed, or downloaded first.
        max_examples: read at most this many documents.

    Raises:
        DataError: the name looks like a path, and nothing readable is there.
    """
    if max_examples is not None and max_examples < 1:
        raise DataError("data.max_examples must be at least 1", found=max_examples, remedy="Leave it out to read all")
    if dataset_name == PYTHON_STDLIB:
        return _stdlib_corpus(max_examples)
    path = Path(dataset_name).expanduser()
    if path.exists() or path.suffix in FILE_SUFFIXES or dataset_name.startswith(("/", ".", "~")):
        return _file_corpus(path, text_column, max_examples)
    return _hub_corpus(dataset_name, text_column, dataset_config, streaming, max_examples)


def is_held_out(document_index: int, fraction: float) -> bool:
    """Whether a document belongs to the validation split: a hash of its index falls below `fraction` (0 to 1)."""
    digest = blake3(document_index.to_bytes(8, "little")).digest(8)
    return int.from_bytes(digest, "little") < fraction * 2**64


def _stdlib_corpus(max_examples: int | None) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = _stdlib_files(root)

    def read() -> Iterator[str]:
        for path in files:
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # a few sources declare another encoding, some installations have dangling files
            if text.strip():
                yield text
        yield from _documentation_topics()

    version = ".".join(map(str, sys.version_info[:3]))
    return Corpus(
        description=f"the standard library of Python {version}, sources and documentation",
        settings={"source": PYTHON_STDLIB, "version": version},
        max_examples=max_examples,
        read=read,
        # No absolute path and no time: two installations of one version hold the same text.
        evidence=lambda: (f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in files),
    )


def _stdlib_files(root: Path) -> list[Path]:
    """Sources and texts, sorted by their path below `root`."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        files += [Path(folder, name) for name in names if Path(name).suffix in {".py", ".rst", ".txt"}]
    # The documentation topics come as documents of their own.
    files = [file for file in files if file.is_file() and file.name != "topics.py"]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _documentation_topics() -> Iterator[str]:
    """The language reference as pydoc ships it, one topic at a time (absent from slim installations)."""
    try:
        from pydoc_data import topics
    except ImportError:
        return
    for name in sorted(topics.topics):
        yield topics.topics[name]


def _file_corpus(path: Path, text_column: str, max_examples: int | None) -> Corpus:
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in found if file.suffix in FILE_SUFFIXES and file.is_file()]
    if not files:
        raise DataError(
            f"data.dataset_name={path} must be a file or a directory of files ending in {', '.join(FILE_SUFFIXES)}",
            found="no such path" if not path.exists() else "no such files",
            remedy='Correct data.dataset_name; "python-stdlib" is text that is always there',
        )

    def read() -> Iterator[str]:
        readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
        for file in files:
            yield from readers[file.suffix](file, text_column)

    def evidence() -> Iterator[str]:
        for file in files:
            facts = file.stat()
            yield f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}"

    return Corpus(
        description=f"{path} ({len(files)} file{'s' * (len(files) > 1)})",
        settings={"source": "files", "text_column": text_column},
        max_examples=max_examples,
        read=read,
        evidence=evidence,
    )


def _read_txt(path: Path, text_column: str) -> Iterator[str]:
    """One document per file; a long file is cut at line ends."""
    try:
        with path.open(encoding="utf-8") as file:
            while lines := file.readlines(_TXT_PIECE):
                if text := "".join(lines).strip():
                    yield text
    except UnicodeDecodeError as error:
        raise DataError("a .txt file must be UTF-8", found=f"{path}: {error}", remedy="Convert or remove it") from error


def _read_jsonl(path: Path, text_column: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(
                    "each line of a .jsonl file must be one JSON object",
                    found=f"{path}:{number}: {error}",
                    remedy="Correct or remove the line",
                ) from error
            yield _text_of(record, text_column, f"{path}:{number}")


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPrerequisite(
            "reading .parquet files needs pyarrow", found=error, remedy="pip install pyarrow, or convert to .jsonl"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            if text_column not in file.schema_arrow.names:
                _text_of(dict.fromkeys(file.schema_arrow.names), text_column, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    yield _text_of({text_column: text}, text_column, str(path))
    except pyarrow.ArrowInvalid as error:
        raise DataError("a .parquet file must be whole", found=f"{path}: {error}", remedy="Write it again") from error


def _text_of(record: object, text_column: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(text_column), str):
        columns = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f"each record must have text in the column {text_column!r}",
            found=f"{where} with {columns}",
            remedy="Set data.text_column to the column that holds the text",
        )
    return record[text_column]


def _hub_corpus(name: str, text_column: str, config: str | None, streaming: bool, max_examples: int | None) -> Corpus:
    def read() -> Iterator[str]:
        try:
            import datasets  # half a second to import, so only here
        except ImportError as error:
            raise MissingPrerequisite(
                "reading a Hugging Face dataset needs the package datasets",
                found=error,
                remedy=f"pip install datasets, or set data.dataset_name to a local path or {PYTHON_STDLIB!r}",
            ) from error
        try:
            records = iter(datasets.load_dataset(name, config, split="train", streaming=streaming))
            for number, record in enumerate(records):
                yield _text_of(record, text_column, f"{name}, record {number}")
        # What the package raises when the hub, the dataset or its configuration is not there.
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise MissingPrerequisite(
                f"the Hugging Face dataset {name!r} (configuration {config!r}) must be reachable",
                found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                remedy="Check the name, data.dataset_config and the network (pack on a login node if the compute nodes"
                f" have none), or set data.dataset_name to a local path or {PYTHON_STDLIB!r}",
            ) from error

    return Corpus(
        description=f"Hugging Face dataset {name}" + (f", configuration {config}" if config else ""),
        settings={"source": "hub", "name": name, "config": config, "text_column": text_column, "split": "train"},
        max_examples=max_examples,
        is_local=False,
        read=read,
        evidence=lambda: iter(()),
    )
