"""python -m encdec.checkpoints {list,verify,digest} PATH"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from rich.progress import Progress

from encdec.checkpoints import CheckpointManager, logical_digest
from encdec.checkpoints.manifest import read_manifest, verify
from encdec.command_line import Parser, exit_code_of
from encdec.errors import CheckpointError
from encdec.files import RunPaths


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m encdec.checkpoints", description="Look at and check checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the checkpoints of a run directory, one a line")
    listing.add_argument("path", type=Path, help="run directory, or its checkpoints folder")
    listing.add_argument("--json", action="store_true", help="one JSON list (sizes in bytes)")
    check = commands.add_parser("verify", help="compare every file with its BLAKE3 digest; exit 1 naming the bad one")
    check.add_argument("path", type=Path, help="a step-<k> folder")
    digest = commands.add_parser("digest", help="64 hex digits of the logical state, the same for any sharding")
    digest.add_argument("path", type=Path, help="a step-<k> folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: show(parse(argv)))


def show(arguments: argparse.Namespace) -> int:
    return {"list": show_list, "verify": show_verify, "digest": show_digest}[arguments.command](arguments)


def show_list(arguments: argparse.Namespace) -> int:
    inside = RunPaths(arguments.path).checkpoints
    manager = CheckpointManager(inside if os.path.lexists(inside) else require_folder(arguments.path))
    if arguments.json:
        print(json.dumps([asdict(info) for info in manager.list_checkpoints()]))
    else:
        manager.print_summary()
    return 0


def show_verify(arguments: argparse.Namespace) -> int:
    folder = require_folder(arguments.path)
    total = sum(record.bytes for record in read_manifest(folder).files)
    with Progress(disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("verifying", total=total)
        manifest = verify(folder, progress=lambda done: bar.advance(task, done))
    print(f"{folder.name}: {len(manifest.files)} files, {total / 1e6:.1f} MB, all match")
    return 0


def show_digest(arguments: argparse.Namespace) -> int:
    print(logical_digest(require_folder(arguments.path)))
    return 0


def require_folder(path: Path) -> Path:
    try:
        os.scandir(path).close()
    except OSError as error:
        raise CheckpointError(
            "A checkpoint is a folder that can be read",
            found=error,
            remedy="python -m encdec.checkpoints list RUN shows them",
        ) from None
    return path


if __name__ == "__main__":
    sys.exit(main())
