"""digest: what a checkpoint means, in 64 hex digits."""

from __future__ import annotations

import argparse

from encdec.checkpoints import logical_digest
from encdec.checkpoints.commands.shared import print_json, require_folder


def show(arguments: argparse.Namespace) -> int:
    folder = require_folder(arguments.path)
    digest = logical_digest(folder)
    if arguments.json:
        print_json({"checkpoint": str(folder), "digest": digest})
    else:
        print(digest)
    return 0
