"""--env-secret NAME: a variable of the submitting shell that the job must have, and that nobody must read elsewhere.

Its value travels in the environment that sbatch hands to the job, which Slurm shows to nobody, unless the site has it
keep environments in its accounting. What is written down is the name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence

from encdec.errors import ConfigError, MissingPrerequisite
from encdec.files import RunPaths
from encdec.redaction import NAMED_SECRETS
from launchers import slurm
from launchers.launch_options import read_launch_options

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def require_names(names: Sequence[str]) -> None:
    """Names alone: a value on a command line is read by everyone on the machine.

    Raises:
        ConfigError: one is no name, or of a variable that no job gets; it is not repeated, for it may hold a value.
    """
    for number, name in enumerate(names, 1):
        if not NAME.fullmatch(name):
            raise ConfigError(
                "--env-secret takes the name of an environment variable, never its value",
                found=f"something else in number {number}, which is not repeated here",
                remedy="export NAME=... in the shell, then --env-secret NAME; if a secret stood there, replace it: "
                "command lines are public",
            )
        if not slurm.outside_any_job({name: ""}):
            raise ConfigError(
                "--env-secret takes a variable that is the user's own",
                found=f"{name}, which is Slurm's",
                remedy="Give the variable another name",
            )


def require_values(names: Sequence[str], environment: Mapping[str, str]) -> None:
    """What is to be handed on must be there.

    Raises:
        MissingPrerequisite: naming what is not set, or empty.
    """
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise MissingPrerequisite(
            "--env-secret names variables that are set in the shell that submits",
            found=f"no {', '.join(missing)}",
            remedy=f"export {missing[0]}=..., or read -rs {missing[0]} && export {missing[0]}, which leaves no trace "
            "in the shell's history; or leave the flag out",
        )


def require_unkept(names: Sequence[str]) -> None:
    """Where Slurm's accounting keeps the environments of jobs, sacct shows them to others.

    Raises:
        MissingPrerequisite: it does here.
    """
    if names and slurm.accounting_keeps("job_env"):
        raise MissingPrerequisite(
            "--env-secret needs a Slurm that does not keep the environments of jobs",
            found="AccountingStoreFlags with job_env, by which sacct --env-vars shows them",
            remedy="Leave the flag out and keep the secret in a file that only you can read (~/.netrc for W&B, "
            "HF_TOKEN_PATH for the hub), and out of the shell that submits",
        )


def warn_of_accounting(names: Sequence[str]) -> None:
    """Inside the job it is too late to refuse what ``require_unkept`` does: sbatch has handed the environment over."""
    if names and slurm.accounting_keeps("job_env"):
        print(
            f"warning: Slurm's accounting keeps the environments of jobs (AccountingStoreFlags has job_env): sacct "
            f"--env-vars shows {', '.join(names)} of this one. Replace what they hold, and keep secrets in files that "
            "only you can read",
            file=sys.stderr,
        )


def take_over(paths: RunPaths, environment: MutableMapping[str, str], *, notify_env: str | None = None) -> None:
    """In the job: what was asked for must have arrived; what the ranks log is kept free of it.

    Args:
        environment: of this process, which its ranks inherit.
        notify_env: ``infra.notify_env``, the variable with the addresses of notifications, which hold secrets as well.

    Raises:
        MissingPrerequisite: naming what did not.
    """
    names = read_launch_options(paths).env_secrets
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise MissingPrerequisite(
            "A job must have the variables that --env-secret named",
            found=f"no {', '.join(missing)} in its environment",
            remedy="Submit again from a shell that has them; a container or an own srun argument may drop them",
        )
    unsaid = [*names, *([notify_env] if notify_env and notify_env not in names else ())]
    if unsaid:
        environment[NAMED_SECRETS] = " ".join(unsaid)
