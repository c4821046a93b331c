"""The one ladder of exceptions, and the exit codes they end in.

Every message a user sees is one paragraph: the rule, the value that broke it, and the remedy.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How an attempt ended, as a process exit status (75 and 78 are sysexits.h's EX_TEMPFAIL and EX_CONFIG)."""

    COMPLETE = 0
    CRASHED = 1
    GATE_NOT_PASSED = 3
    CONTINUE_ME = 75
    CONFIG_WRONG = 78


class EncdecError(Exception):
    """Base of all errors that are meant for a user.

    Args:
        rule: what must hold, as a sentence without its full stop.
        found: the value that broke the rule, or None where there is none to show.
        remedy: what to do next, as a sentence without its full stop.
    """

    exit_code: ExitCode = ExitCode.CRASHED

    def __init__(self, rule: str, *, found: object = None, remedy: str) -> None:
        self.rule, self.found, self.remedy = rule, found, remedy
        middle = "" if found is None else f", found {found!s}"
        super().__init__(f"{rule}{middle}. {remedy}.")

    def __reduce__(self):  # exceptions cross process boundaries (torch elastic, submitit): keep the three parts
        return _rebuild, (type(self), self.rule, self.found, self.remedy)


def _rebuild(kind: type[EncdecError], rule: str, found: object, remedy: str) -> EncdecError:
    return kind(rule, found=found, remedy=remedy)


class ConfigError(EncdecError):
    """A key or value of the configuration or command line breaks a rule. Never requeued."""

    exit_code = ExitCode.CONFIG_WRONG


class RunDirectoryError(EncdecError):
    """The run directory cannot be used: not writable, or made for another configuration. Never requeued."""

    exit_code = ExitCode.CONFIG_WRONG


class DataError(EncdecError):
    """The corpus cannot be used: empty, missing, unreadable. Never requeued."""

    exit_code = ExitCode.CONFIG_WRONG


class InputError(EncdecError, ValueError):
    """What a model was called with breaks a rule: its shapes, its lengths or its token ids. Never requeued."""

    exit_code = ExitCode.CONFIG_WRONG


class MissingPrerequisite(EncdecError):
    """Something the run needs is not on this machine: a Slurm controller, a GPU, a model. Never requeued."""

    exit_code = ExitCode.CONFIG_WRONG


class ShardingError(EncdecError):
    """The process group or the placement of the parameters is not what was asked for. Never requeued."""

    exit_code = ExitCode.CONFIG_WRONG


class CheckpointError(EncdecError):
    """A checkpoint does not verify or does not fit the model."""


class UnreadableCheckpoint(CheckpointError):
    """Storage does not let a checkpoint be read, so nothing is known about it: it may well be sound."""


class MirrorError(EncdecError):
    """The second place of checkpoints cannot be read or written; those in the first place are untouched."""


class ForeignCheckpoint(CheckpointError):
    """A sound checkpoint of another run, which nobody has asked to continue from."""


class FencedError(EncdecError):
    """A newer attempt of the same run exists, so this one may no longer write."""


class TrainingDiverged(EncdecError):
    """The loss is not a number, or a phase's bounds were not met."""

    exit_code = ExitCode.GATE_NOT_PASSED


class GateNotPassed(EncdecError):
    """A required gate did not pass: what was measured does not allow to go on. Never requeued."""

    exit_code = ExitCode.GATE_NOT_PASSED
