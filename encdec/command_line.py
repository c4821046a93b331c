"""What every command shares: mistakes in its arguments, and errors meant for a user, end as one paragraph."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from encdec.errors import ConfigError, EncdecError

INTERRUPTED = 128 + signal.SIGINT
READER_GONE = 128 + signal.SIGPIPE


class Parser(argparse.ArgumentParser):
    """Argument mistakes end like every other mistake: one paragraph, exit code 78."""

    def error(self, message: str) -> NoReturn:
        remedy = f"See python -m {self.prog.split(' -m ')[-1]} --help"
        value = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if value:
            choices = re.findall(r"[\w-]+", value.group(2))
            near = difflib.get_close_matches(value.group(1), choices, n=1)
            remedy = f"Did you mean {near[0]}? {remedy}" if near else remedy
        raise ConfigError("The command line must be understood", found=message, remedy=remedy)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default only where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help
            if action.default is None or action.default is False or action.default == []
            else super()._get_help_string(action)
        )


def exit_code_of(command: Callable[[], int]) -> int:
    """What ``command`` returns; an error meant for a user is told on stderr and becomes its exit code.

    Ctrl-C and a reader that has gone (``| head``) end as a shell reports them, with 128 + the signal's number.
    """
    try:
        code = command()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a broken pipe can still be answered
        return code
    except EncdecError as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # the interpreter flushes both again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return READER_GONE
