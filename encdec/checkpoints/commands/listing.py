"""list: the checkpoints of a run, one a line."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from encdec.checkpoints.commands.shared import checkpoints_of, print_json


def show(arguments: argparse.Namespace) -> int:
    manager = checkpoints_of(arguments.path)
    if arguments.json:
        print_json([asdict(info) for info in manager.list_checkpoints()])
    else:
        manager.print_summary()
    return 0
