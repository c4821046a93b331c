"""The tracker's process: reads messages, one JSON object a line, and hands them to W&B or TensorBoard until its input
ends. Rank 0 starts it; ``encdec.training.tracking.observer`` says what the messages are.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from encdec.errors import ExitCode
from encdec.files import RunPaths
from encdec.redaction import Redacting
from encdec.training.run_config import read_run_config
from encdec.training.tracking.backends import Backend, open_backend

log = logging.getLogger("encdec.train")


def serve(name: str, paths: RunPaths, lines: Iterable[str]) -> None:
    """Tell the tracker ``name`` what ``lines`` say.

    Raises:
        Exception: whatever the tracker raises.
    """
    run, messages = read_run_config(paths), map(json.loads, lines)
    begin = next(messages, None)
    if begin is None:
        return
    backend = open_backend(name, paths, run, begin["step"])
    for message in messages:
        tell(backend, message)
    backend.close()


def tell(backend: Backend, message: dict[str, Any]) -> None:
    """One message: scalars, a text or a return to an earlier step."""
    step = message["step"]
    if "scalars" in message:
        backend.scalars(step, message["scalars"])
    elif "words" in message:
        backend.text(step, message["kind"], message["words"], warn=message["warn"])
    else:
        backend.rewind(step)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m encdec.training.tracking", description=__doc__)
    parser.add_argument("name", choices=["wandb", "tensorboard"])
    parser.add_argument("run_dir", type=Path, help="run directory")
    arguments = parser.parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    code = ExitCode.COMPLETE
    try:
        serve(arguments.name, RunPaths(arguments.run_dir), sys.stdin)
    except Exception as error:
        words = str(error).splitlines() or [""]
        log.warning(
            "%s is told nothing more, training goes on: %s: %s", arguments.name, type(error).__name__, words[0][:300]
        )
        code = ExitCode.CRASHED
    sys.stderr.flush()
    os._exit(code)  # the libraries' own hooks at the end may wait for a server for long


if __name__ == "__main__":
    main()
