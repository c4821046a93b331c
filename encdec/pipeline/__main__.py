"""python -m encdec.pipeline {run,progressive,validate,scales,suite}: the pipeline from a shell."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from encdec.command_line import Help, Parser, exit_code_of
from encdec.errors import ConfigError, ExitCode
from encdec.gates import GateLevel
from encdec.pipeline.config import Launch, PipelineConfig
from encdec.pipeline.results import ScaleResult, print_results
from encdec.pipeline.scales import VOCABULARY, ModelScale, print_scale_comparison, scale_records, scales_between
from encdec.pipeline.seed_suites import SEED_SUITES, write_seed_suite
from encdec.training.yaml_values import apply_settings, read_yaml

PROGRAM = "python -m encdec.pipeline"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=PROGRAM, description="Train scales of the model, each judged by gates, from a small one upward.",
        allow_abbrev=False,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, formatter_class=Help, allow_abbrev=False)

    run = add("run", "Train one scale and judge it by QUICK, STANDARD and the levels up to --through.")
    progressive = add("progressive", "Train one scale after the other; a gate that does not pass ends it.")
    validate = add("validate", "Check place, text, model and gates; train nothing.")
    for command in (run, progressive, validate):
        _add_config(command)
    run.add_argument("--scale", choices=list(ModelScale), help="instead of training.model_scale")
    run.add_argument(
        "--through", choices=list(GateLevel)[1:], default="standard", help="last level of gates that is asked for"
    )
    for command in (progressive, validate):
        command.add_argument("--from", dest="start", choices=list(ModelScale), default="tiny", help="first scale")
        command.add_argument("--to", dest="end", choices=list(ModelScale), default="small", help="last scale")
    progressive.add_argument(
        "--no-validation-between", action="store_true", help="do not ask for FULL before the next scale"
    )
    scales = add("scales", "Show all scales side by side, with the parameters that the model really has.")
    scales.add_argument("--vocabulary", type=int, default=VOCABULARY, metavar="ROWS", help="rows of the embedding")
    scales.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    suite = add("suite", "Write a small task suite, made from a seed, as JSON lines.")
    suite.add_argument("metric", choices=list(SEED_SUITES), help="what it measures")
    suite.add_argument("out", type=Path, help="file to write")
    suite.add_argument("--items", type=int, default=200, metavar="N", help="questions")
    suite.add_argument("--seed", type=int, default=0, metavar="N", help="another seed makes other questions")
    return parser.parse_args(argv)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, default=Path("configs/pipeline_tiny.yaml"), help="YAML or JSON file of a PipelineConfig"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="lay one value over the file, for example training.max_steps=100; repeatable",
    )  # fmt: skip
    command.add_argument("--checkpoint-dir", metavar="DIR", help="instead of the file's checkpoint_dir")
    command.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the tables")


def read_config(arguments: argparse.Namespace) -> PipelineConfig:
    """The file with the flags laid over it."""
    values = apply_settings(read_yaml(arguments.config), arguments.set)
    config = PipelineConfig.from_mapping(values, source=f"{arguments.config}{' with --set' if arguments.set else ''}")
    if arguments.checkpoint_dir:
        config.checkpoint_dir = arguments.checkpoint_dir
    if getattr(arguments, "scale", None):
        config.training.model_scale = ModelScale(arguments.scale)
    return config


def run(arguments: argparse.Namespace) -> int:
    from encdec.pipeline.runner import PipelineRunner  # loads torch: only where something is trained

    config = read_config(arguments)
    runner = PipelineRunner(config, launch=arguments.launch)
    results = [runner.run(GateLevel(arguments.through))]
    return _tell(arguments, results, (config.training.model_scale,), runner.validator.print_summary)


def progressive(arguments: argparse.Namespace) -> int:
    from encdec.pipeline.runner import PipelineRunner

    planned = scales_between(arguments.start, arguments.end)
    runner = PipelineRunner(read_config(arguments), launch=arguments.launch)
    results = runner.run_progressive(arguments.start, arguments.end, not arguments.no_validation_between)
    return _tell(arguments, results, planned, runner.validator.print_summary)


def _tell(
    arguments: argparse.Namespace, results: list[ScaleResult], planned: tuple[ModelScale, ...],
    print_gates: Callable[[], None],
) -> int:  # fmt: skip
    if arguments.json:
        success = len(results) == len(planned) and all(result.success for result in results)
        print(json.dumps({"success": success, "scales": [result.to_json() for result in results]}, indent=2))
    else:
        print_gates()
        print_results(results, planned)
    return results[-1].exit_code


def validate(arguments: argparse.Namespace) -> int:
    from encdec.pipeline.runner import PipelineRunner

    scales = scales_between(arguments.start, arguments.end)
    levels = [GateLevel.STANDARD, *([GateLevel.FULL] if len(scales) > 1 else [])]
    report = PipelineRunner(read_config(arguments)).validate_infrastructure(scales, levels)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print("\n".join(report.lines()))
        print("all checks passed" if report.passed else "NOT all checks passed")
    return ExitCode.COMPLETE if report.passed else ExitCode.CONFIG_WRONG


def scales(arguments: argparse.Namespace) -> int:
    if arguments.vocabulary < 1:
        raise ConfigError("--vocabulary must be at least 1", found=arguments.vocabulary, remedy="Give it rows")
    if arguments.json:
        print(json.dumps(scale_records(arguments.vocabulary), indent=2))
    else:
        print_scale_comparison(arguments.vocabulary)
    return ExitCode.COMPLETE


def suite(arguments: argparse.Namespace) -> int:
    if arguments.items < 1:
        raise ConfigError("--items must be at least 1", found=arguments.items, remedy="Give it a positive number")
    path = write_seed_suite(arguments.metric, arguments.out, items=arguments.items, seed=arguments.seed)
    print(f"{path}: {arguments.items} questions for eval_benchmarks.{arguments.metric}")
    return ExitCode.COMPLETE


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "run": run, "progressive": progressive, "validate": validate, "scales": scales, "suite": suite,
}  # fmt: skip


def main(argv: list[str] | None = None, *, launch: Launch | None = None) -> int:
    """Returns 0 for success, 3 for a gate, 75 for a clean stop (the same command continues), 78 for what is refused.

    Args:
        launch: trains a scale elsewhere; default: this process, or torchrun for several ranks.
    """

    def command() -> int:
        arguments = parse(argv)
        arguments.launch = launch
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        return COMMANDS[arguments.command](arguments)

    return exit_code_of(command)


if __name__ == "__main__":
    sys.exit(main())
