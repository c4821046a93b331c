"""Canaries: values that must be found nowhere, and where to look for them; files that others must not reach."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CANARIES = {
    "WANDB_API_KEY": "canary-wandb-" + "0123456789abcdef" * 3,
    "HF_TOKEN": "hf_canaryHubToken0123456789",
    "AWS_SECRET_ACCESS_KEY": "canaryAwsSecret/0123456789",
    "OPENAI_API_KEY": "sk-canary-0123456789",
    "LAB_PASSPHRASE": "canary passphrase; with $(touch sang) 'quotes'",
}
"""Variable -> value; the last is secret only because --env-secret says so."""


def found_in(text: str, canaries: Mapping[str, str] = CANARIES) -> list[str]:
    """The variables whose values the text holds, or a good part of one: quoting may break them up."""
    return [name for name, value in canaries.items() if value in text or value.split()[0][:16] in text]


def found_below(folders: Iterable[Path], canaries: Mapping[str, str] = CANARIES) -> list[tuple[str, Path]]:
    """The same, of all files below some folders; names of files included."""
    return [
        (name, path)
        for folder in folders
        for path in [folder, *folder.rglob("*")]
        for name in found_in(str(path) + (path.read_bytes().decode("latin-1") if path.is_file() else ""), canaries)
    ]


@contextmanager
def command_lines() -> Iterator[set[str]]:
    """The command lines of all processes that live meanwhile, looked at all the time."""
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(file.read_bytes().decode("latin-1"))
                except OSError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def reached_by_others(folder: Path) -> list[Path]:
    """What below ``folder``, itself included, users of its group or any others can read, write or enter."""
    mode = folder.lstat().st_mode
    open_to = mode & (stat.S_IRWXG | stat.S_IRWXO)
    if stat.S_ISLNK(mode):
        return []
    if not folder.is_dir():
        return [folder] if open_to else []
    if open_to & (stat.S_IXGRP | stat.S_IXOTH):
        return [folder, *(found for inner in folder.iterdir() for found in reached_by_others(inner))]
    return [folder] if open_to else []


def views(report: Path, runs: Path) -> list[list[str]]:
    """All commands that show a run, with their flags, the last two into these files."""
    return [
        ["status", "--json"],
        ["logs"],
        ["monitor", "--once"],
        ["monitor", "--json"],
        ["report"],
        ["report", "--json"],
        ["report", "--html", str(report)],
        ["monitor", "--html", str(runs)],
    ]
