"""Does a model do all that training and generation will ask of it? Ten checks, a verdict each.

python -m encdec.sanity_check --model-path DIR_OR_ID_OR_RUN [--device cpu] [--dtype fp32] [--report FILE]
python -m encdec.sanity_check --config configs/tiny.yaml          the model that a run would begin with
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from encdec.command_line import Help, Parser, exit_code_of
from encdec.errors import ConfigError, EncdecError, MissingPrerequisite
from encdec.files import MANIFEST, RunPaths, atomic_write_json
from encdec.model_checks import CHECKS, LOADING, Check, SanityReport, check_model
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.pipeline.scale_run import load_trained
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training.build import build_model
from encdec.training.config import FullConfig
from encdec.training.run_config import read_run_config, resolve_run
from encdec.training.text import load_tokenizer_of

__all__ = ["Check", "SanityReport", "check_model", "main"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHOWN = 300
"""Characters of another library's error."""


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if all checks pass, 1 if one fails, 78 for a command line that is not understood, a device that is not
    there or a report that cannot be written."""
    return exit_code_of(lambda: check_and_show(parse(argv)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m encdec.sanity_check",
        description="Ten checks of a model; exit 1 if one fails, 78 if the command is not understood, the device is "
        "not there or the report cannot be written. With --config, a tokenizer that the run would train is trained "
        "and kept in data.packed_dir.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model-path", metavar="DIR",
        help="folder with model and tokenizer as save_pretrained writes them, a hub id, or a run directory: its newest "
        "valid checkpoint",
    )  # fmt: skip
    what.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file: the model that a run of it begins with, also from scratch",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="with --config: lay one value over the file",
    )
    parser.add_argument("--device", default="cpu", help="torch device, for example cpu or cuda:0")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights and the computation")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the verdicts there, as JSON")
    parser.add_argument("--json", action="store_true", help="print them as one JSON document instead of a table")
    arguments = parser.parse_args(argv)
    if arguments.set and not arguments.config:
        raise ConfigError("--set goes with --config", found="--set alone", remedy="Give --config FILE")
    return arguments


def check_and_show(arguments: argparse.Namespace) -> int:
    require_device(arguments.device)
    if arguments.report and not arguments.report.parent.is_dir():
        raise unwritable(arguments.report, "no such folder")
    report = check_named_model(arguments)
    document = {
        "model": str(arguments.config or arguments.model_path), "device": arguments.device, "dtype": arguments.dtype,
        **report.to_json(),
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(document))
    else:
        print("\n".join(report.lines()))
        print("all checks passed" if report.passed else "sanity check FAILED")
    if arguments.report:
        try:
            atomic_write_json(arguments.report, document)
        except OSError as error:
            raise unwritable(arguments.report, error.strerror) from None
    return 0 if report.passed else 1


def unwritable(report: Path, reason: str | None) -> MissingPrerequisite:
    return MissingPrerequisite(
        "--report must name a file that can be written, in a folder that is there",
        found=f"{report} ({reason})", remedy="Give another one",
    )  # fmt: skip


def check_named_model(arguments: argparse.Namespace) -> SanityReport:
    """Load what the command line names, then run the checks; each of the ten has a verdict.

    Raises:
        ConfigError: --config is no valid configuration.
    """
    report, dtype = SanityReport(), DTYPES[arguments.dtype]
    config = configured(arguments.config, arguments.set) if arguments.config else None
    try:
        tokenizer = None
        model: nn.Module
        if config:
            tokenizer = load_tokenizer_of(config)
            model = build_model(config, tokenizer)
        elif RunPaths(Path(arguments.model_path)).run_yaml.is_file():
            model, tokenizer = load_run(RunPaths(Path(arguments.model_path)))
        else:
            model = load_saved(arguments.model_path, dtype)
        model.to(arguments.device)
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32, as in training
            parameter.data = parameter.data.to(dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        report.add(LOADING[0], True, f"{parameters:,} parameters in {arguments.dtype} on {arguments.device}")
        if tokenizer is None:
            tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(arguments.model_path)
        tokenizer.assert_matches(model.config)  # type: ignore[arg-type]
        report.add(LOADING[1], True, f"{len(tokenizer):,} tokens")
        check_model(model, tokenizer, report)
    except (OSError, ValueError, RuntimeError, SafetensorError, EncdecError) as error:
        name = next(name for name in (*LOADING, *CHECKS) if name not in {check.name for check in report.checks})
        shown = " ".join(str(error).split())[:SHOWN]
        report.add(name, False, f"{arguments.config or arguments.model_path}: {shown}")
    report.complete((*LOADING, *CHECKS))
    return report


def load_saved(name_or_path: str, dtype: torch.dtype) -> Qwen3ForSeq2SeqLM:
    """The model of a folder or hub id, all of it: transformers would draw what is missing and only warn.

    Raises:
        ConfigError: parameters are missing, unknown or of another shape, or it is a run's checkpoint.
        MissingPrerequisite: there is no such folder.
    """
    require_folder_of_model(name_or_path)
    model, info = Qwen3ForSeq2SeqLM.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[kind])):
            raise ConfigError(
                "a saved model must hold exactly the parameters that its config.json describes",
                found=f"{len(keys)} {kind.replace('_', ' ')}, {keys[0]} among them",
                remedy="Save or export the model again",
            )
    return model


def require_folder_of_model(name_or_path: str) -> None:
    """Refuse what is clearly neither a model's folder nor a hub id, before transformers asks the hub for it.

    Raises:
        ConfigError: it is a checkpoint, which has no model's files.
        MissingPrerequisite: a path that leads nowhere.
    """
    path = Path(name_or_path)
    if (path / MANIFEST).is_file():
        raise ConfigError(
            "--model-path must be a model's folder or a run directory",
            found="a run's checkpoint",
            remedy="Give the run directory, or export it: python -m encdec.checkpoints export CHECKPOINT DIR",
        )
    is_path = path.is_absolute() or name_or_path.startswith((".", "~")) or len(path.parts) > 2
    if is_path and not path.exists():
        raise MissingPrerequisite("--model-path must be there", found="no such folder", remedy="Correct the path")


def load_run(paths: RunPaths) -> tuple[nn.Module, Qwen3EncoderDecoderTokenizer]:
    """The newest valid checkpoint of a run, and the tokenizer that the run keeps."""
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(paths.model)
    return load_trained(paths, read_run_config(paths).config, tokenizer, None).model, tokenizer


def configured(config_file: Path, settings: list[str]) -> FullConfig:
    """What a file and the values laid over it come to.

    Raises:
        ConfigError: a key or value is wrong.
    """
    return resolve_run(None, config_file=config_file, settings=settings, ranks_per_node=1).config


def require_device(name: str) -> None:
    """Refuse a device that torch does not know or this machine does not have.

    Raises:
        MissingPrerequisite: nothing can be put there.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise MissingPrerequisite(
            "--device must be a torch device of this machine",
            found=f"{name!r} ({str(error).splitlines()[0].rstrip('.')})",
            remedy="Use --device cpu",
        ) from None


if __name__ == "__main__":
    sys.exit(main())
