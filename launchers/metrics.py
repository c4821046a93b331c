"""python -m launchers.metrics [RUN...] --file FILE | --port N: runs for a site's Prometheus."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from encdec.command_line import Help, Parser, exit_code_of
from encdec.errors import ConfigError, EncdecError, MissingPrerequisite
from encdec.files import RunPaths
from launchers.names import add_run, find_runs, runs_under

if TYPE_CHECKING:
    from launchers.views.gauges import Runs  # needs prometheus_client

LEAST_INTERVAL = 1.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m launchers.metrics",
        description="Give runs to Prometheus: step, loss, throughput, MFU, checkpoint age, attempt, restarts, state.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    add_run(parser, nargs="*")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--file",
        type=Path,
        help="text file for node_exporter's textfile collector, with a name that ends in .prom; replaced whole",
    )
    where.add_argument("--port", type=int, help="serve http://ADDRESS:PORT/metrics until Ctrl-C")
    parser.add_argument("--address", default="127.0.0.1", help="with --port: address to listen at")
    parser.add_argument(
        "--interval", type=float, metavar="SECONDS",
        help="with --file: write again and again until Ctrl-C (default: once); with --port: look at the runs, and ask "
        "Slurm, at most so often (default: 30)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.interval is not None and not arguments.interval >= LEAST_INTERVAL:
        raise ConfigError(
            f"--interval must be at least {LEAST_INTERVAL:g} s",
            found=arguments.interval,
            remedy="30 is often enough: Slurm is asked once an interval",
        )
    if arguments.file is not None and arguments.file.suffix != ".prom":
        raise ConfigError(
            "node_exporter reads files that end in .prom", found=arguments.file, remedy="Give --file such a name"
        )
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode, or 130 after Ctrl-C."""
    return exit_code_of(lambda: export(parse(argv)))


def export(arguments: argparse.Namespace) -> int:
    """Write or serve, once or until Ctrl-C."""
    if importlib.util.find_spec("prometheus_client") is None:
        raise MissingPrerequisite(
            "launchers.metrics needs prometheus_client",
            found=f"none in {sys.prefix}",
            remedy='Install it: python -m pip install "prometheus_client>=0.20"',
        )
    from prometheus_client import CollectorRegistry, start_http_server

    from launchers.views.gauges import Runs

    runs_of(arguments)  # a name that is none is said now
    runs = Runs(lambda: runs_of(arguments), 30.0 if arguments.interval is None else arguments.interval)
    if arguments.port is not None:
        registry = CollectorRegistry()
        registry.register(runs)
        with told(f"{arguments.address}:{arguments.port}"):
            start_http_server(arguments.port, arguments.address, registry)
        threading.Event().wait()
    write(arguments.file, runs)
    while arguments.interval is not None:
        time.sleep(arguments.interval)
        try:
            write(arguments.file, runs)
        except EncdecError as error:  # it worked before: the trouble may pass
            print(f"error: {error}", file=sys.stderr, flush=True)
    return 0


def runs_of(arguments: argparse.Namespace) -> list[RunPaths]:
    """Those that are named, each once, or all below --root."""
    named = {paths.root: paths for word in arguments.run for paths in find_runs(word, arguments.root)}
    return list(named.values()) if arguments.run else runs_under(arguments.root)


def write(file: Path, runs: Runs) -> None:
    """Look, then replace ``file`` whole; readable for all, for node_exporter is another user.

    Raises:
        EncdecError: the runs cannot be found or read, or the file takes nothing.
    """
    from prometheus_client import CollectorRegistry, write_to_textfile

    from launchers.views.gauges import Seen

    registry = CollectorRegistry()
    try:
        registry.register(Seen(runs.collect()))
    except OSError as error:
        raise MissingPrerequisite(
            "Metrics need run directories that can be read",
            found=f"{error.filename or 'one of them'} ({error.strerror})",
            remedy="Give --root, or the names of runs that are yours",
        ) from None
    before = os.umask(0o022)
    try:
        with told(str(file)):
            write_to_textfile(str(file), registry)
    finally:
        os.umask(before)


@contextlib.contextmanager
def told(place: str) -> Iterator[None]:
    """A place that takes nothing is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise MissingPrerequisite(
            "Metrics need a place that takes them",
            found=f"{place} ({error.strerror})",
            remedy="Give another --file or --port, or free that one",
        ) from None


if __name__ == "__main__":
    sys.exit(main())
