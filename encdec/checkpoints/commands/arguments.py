"""What the tools are told on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from encdec.checkpoints.commands import average, digest, export, listing, mirror, prune, verify
from encdec.checkpoints.encoder import POOLINGS
from encdec.checkpoints.export import DEFAULT_SHARD_MB, DTYPES
from encdec.checkpoints.lora_weights import PARTS
from encdec.checkpoints.pruning import DEFAULT_AVERAGED
from encdec.command_line import Help, Parser

RUN = "run directory, or its checkpoints folder"
RUNS_OWN = f"default: training.average_last of the run, else {DEFAULT_AVERAGED}"
Tool = Callable[[argparse.Namespace], int]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The words of a command line; ``tool`` is what they ask for.

    Raises:
        ConfigError: not understood.
    """
    parser = Parser(
        prog="python -m encdec.checkpoints", description="Look at, check, turn into models and copy checkpoints."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, tool: Tool, purpose: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=purpose, description=purpose, formatter_class=Help)
        command.set_defaults(tool=tool)
        command.add_argument("--json", action="store_true", help="print one JSON document (sizes in bytes)")
        return command

    command = add("list", listing.show, "The checkpoints of a run, one a line.")
    command.add_argument("path", type=Path, help=RUN)

    command = add("verify", verify.show, "Compare every file with its BLAKE3 digest; exit 1 naming the bad one.")
    command.add_argument("path", type=Path, help="a step-<k> folder")

    command = add("digest", digest.show, "64 hex digits of the logical state, the same for any sharding.")
    command.add_argument("path", type=Path, help="a step-<k> folder")

    command = add("average", average.show, "The mean of the newest step checkpoints' weights, as a checkpoint.")
    command.add_argument("run", type=Path, help=RUN)
    command.add_argument("out", type=Path, help="folder of the new checkpoint; must not exist")
    command.add_argument("--last", type=_at_least(2), help=f"step checkpoints to average ({RUNS_OWN})")

    _export(add("export", export.show, "A Hugging Face directory, for from_pretrained."))
    _prune(add("prune", prune.show, "Delete old checkpoints; never the last valid one, nor the best."))
    _mirror(add("mirror", mirror.show, "Copy valid checkpoints to a second place, or back."))
    return parser.parse_args(argv)


def _export(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=Path, help="a checkpoint, or a run directory: its newest valid one")
    command.add_argument("out", type=Path, help="directory to make; must not exist")
    command.add_argument("--best", action="store_true", help="of a run directory: the one with the least loss")
    command.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights; checkpoints have fp32")
    command.add_argument("--encoder", action="store_true", help="the encoder alone, for sentence-transformers")
    command.add_argument(
        "--pooling", choices=tuple(POOLINGS), help="with --encoder: how token vectors become one (mean)"
    )
    command.add_argument("--shard-mb", type=_at_least(1), default=DEFAULT_SHARD_MB, help="most of one file, 10^6 bytes")
    command.add_argument(
        "--files-from", type=Path, metavar="DIR", help="config.json and tokenizer, instead of RUN/model"
    )
    command.add_argument(
        "--part", choices=PARTS, default="merged",
        help="of a run with low-rank adapters (model.lora): the model with them merged in, without them, or the "
        "adapter alone, for peft.PeftModel.from_pretrained",
    )  # fmt: skip


def _prune(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, help=RUN)
    command.add_argument("--keep", type=_at_least(1), required=True, help="newest valid checkpoints to keep")
    command.add_argument(
        "--average",
        type=_at_least(0),
        help=f"newest valid checkpoints that an average needs, kept as well; 0: no average is wanted ({RUNS_OWN})",
    )
    command.add_argument("--dry-run", action="store_true", help="say what would go; delete nothing")


def _mirror(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, help=RUN)
    command.add_argument("target", help="folder or fsspec URL (s3://bucket/a) of this run's checkpoints alone")
    command.add_argument("--verify", action="store_true", help="read back what is there, copied now or before")
    command.add_argument("--keep", type=_at_least(1), help="checkpoints to keep there, and the best (default: all)")
    command.add_argument("--restore", action="store_true", help="copy the newest valid one back into the run")
    command.add_argument("--all", action="store_true", help="with --restore: all valid ones")


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} up, not {text!r}")
        return int(text)

    return whole_number
