"""average: the mean of the newest step checkpoints' weights."""

from __future__ import annotations

import argparse
import sys

from encdec.checkpoints import folders
from encdec.checkpoints.averaging import average, bytes_to_read, choose_sources, require_new
from encdec.checkpoints.commands.shared import (
    averaged_by,
    checkpoints_of,
    megabytes,
    print_json,
    progress_bar,
    size_of,
    writing,
)


def show(arguments: argparse.Namespace) -> int:
    root = checkpoints_of(arguments.run).output_dir
    last = arguments.last or max(2, averaged_by(arguments.run))
    require_new(arguments.out)
    newest = folders.committed_steps(root)[-last:]
    with progress_bar("verifying", sum(size_of(root / f"step-{step}") for step in newest)) as progress:
        sources, passed_over = choose_sources(root, last, progress)
    for error in passed_over:
        print(f"passed over: {error}", file=sys.stderr)
    with progress_bar("averaging", bytes_to_read(sources)) as progress, writing(arguments.out):
        manifest = average(sources, arguments.out, progress)
    size = sum(record.bytes for record in manifest.files)
    if arguments.json:
        print_json(
            {
                "checkpoint": str(arguments.out),
                "made_of": manifest.made_of,
                "passed_over": [str(error) for error in passed_over],
                "bytes": size,
            }
        )
    else:
        few = f" ({last} were asked for)" if len(sources) < last else ""
        print(f"{arguments.out}: mean of {', '.join(manifest.made_of)}{few}, {megabytes(size)}")
    return 0
