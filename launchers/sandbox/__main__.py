"""The command line: python -m launchers.sandbox {up,down,status,env,crash,cut,heal,exec}."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys

from encdec.command_line import Parser, exit_code_of
from launchers.sandbox import __doc__ as about
from launchers.sandbox.cluster import Sandbox
from launchers.sandbox.layout import Shape
from launchers.sandbox.status import table

say = functools.partial(print, flush=True)


def parser() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    shared.add_argument("--dir", default="build/sandbox", help="holds all of its state (default: %(default)s)")
    top = Parser(prog="python -m launchers.sandbox", description=about.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[shared])

    up = command("up", "Start a cluster and wait until all its nodes are idle.")
    up.add_argument("--nodes", type=int, default=Shape.nodes, help="compute nodes (default: %(default)s)")
    up.add_argument("--gpus", type=int, default=Shape.gpus, help="fake GPUs per node (default: %(default)s)")
    command("down", "End the cluster and remove every trace of it.")
    command("status", "One table: nodes, their state in Slurm, their link, their daemons.")
    command("env", 'Print what a shell needs to use the cluster: eval "$(python -m launchers.sandbox env)".')
    for name, text in (
        ("crash", "Power failure: kill every process of a machine at once."),
        ("cut", "Network failure: the machine runs on, but nobody reaches it."),
        ("heal", "Boot a crashed machine or restore its link, and wait until Slurm uses it again."),
        ("exec", "Run a command on a machine, as ssh would: exec n2 -- hostname."),
    ):
        command(name, text).add_argument("machine", help="n1, n2, ... or ctl, the controller")
    commands.choices["exec"].add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD", help="default: a shell")
    return top


def run(arguments: argparse.Namespace) -> int:
    sandbox = Sandbox(arguments.dir)
    match arguments.command:
        case "up":
            sandbox.up(Shape(nodes=arguments.nodes, gpus=arguments.gpus), say)
        case "down":
            sandbox.down(say)
        case "status":
            print(table(sandbox.status()))
        case "env":
            print("\n".join(f"export {key}={shlex.quote(value)}" for key, value in sandbox.environment.items()))
        case "crash" | "cut" as accident:
            getattr(sandbox, accident)(arguments.machine)
        case "heal":
            sandbox.heal(arguments.machine, say)
        case "exec":
            argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
            command = sandbox.inside(arguments.machine, argv or [os.environ.get("SHELL", "/bin/sh")])
            os.execvp(command[0], command)
    return 0


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
