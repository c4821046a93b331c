"""verify: whether every file of a checkpoint is as it was written."""

from __future__ import annotations

import argparse

from encdec.checkpoints.commands.shared import megabytes, print_json, progress_bar, require_folder
from encdec.checkpoints.manifest import read_manifest, verify


def show(arguments: argparse.Namespace) -> int:
    folder = require_folder(arguments.path)
    total = sum(record.bytes for record in read_manifest(folder).files)
    with progress_bar("verifying", total) as progress:
        manifest = verify(folder, progress)
    if arguments.json:
        print_json({"checkpoint": str(folder), "step": manifest.step, "files": len(manifest.files), "bytes": total})
    else:
        print(f"{folder.name}: {len(manifest.files)} files, {megabytes(total)}, all match")
    return 0
