"""prune: delete old checkpoints, and say why the others stay."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from encdec.checkpoints.commands.shared import averaged_by, checkpoints_of, megabytes, print_json, progress_bar, writing
from encdec.checkpoints.pruning import prune


def show(arguments: argparse.Namespace) -> int:
    manager = checkpoints_of(arguments.run)
    averaged = averaged_by(arguments.run) if arguments.average is None else arguments.average
    total = sum(info.bytes for info in manager.list_checkpoints()[-max(arguments.keep, averaged, 1) :])
    with progress_bar("verifying", total) as progress, writing(manager.output_dir):
        verdicts = prune(manager, arguments.keep, averaged=averaged, dry_run=arguments.dry_run, progress=progress)
    if arguments.json:
        print_json({"dry_run": arguments.dry_run, "checkpoints": [asdict(verdict) for verdict in verdicts]})
        return 0
    goes = "would go" if arguments.dry_run else "deleted"
    for verdict in verdicts:
        print(f"{verdict.checkpoint_id:<14} {'stays' if verdict.stays else goes:<9} {verdict.why}")
    freed = sum(verdict.bytes for verdict in verdicts if not verdict.stays)
    print(f"{megabytes(freed)} {'would be freed' if arguments.dry_run else 'freed'}")
    return 0
