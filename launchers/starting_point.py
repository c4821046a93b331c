"""What a phase begins with where a person has given it: --from-weights and --resume."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from encdec.errors import ConfigError
from encdec.files import MANIFEST, RunPaths
from encdec.training.execution import StartingPoint
from encdec.training.run_config import RunConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resume_word(arguments: Namespace) -> str:
    """auto | never | PATH"""
    return str(getattr(arguments, "resume", None) or "auto")


def starting_point(arguments: Namespace) -> StartingPoint | None:
    """What --from-weights or --resume names; None where a gate is to open the phase.

    Raises:
        ConfigError: both are given, or what they name cannot be used.
    """
    word = resume_word(arguments)
    if word in ("auto", "never"):
        return given_weights(arguments.from_weights)
    if arguments.from_weights:
        raise ConfigError(
            "A phase begins with weights, or with all that is in a checkpoint",
            found=f"--from-weights {arguments.from_weights} and --resume {word}",
            remedy="Leave one of them out",
        )
    folder = checkpoint_folder(word)
    if folder is None:
        raise ConfigError(
            "--resume must be auto, never, or name a checkpoint's folder or a run directory with one",
            found=word,
            remedy="Give RUN/checkpoints/step-<k>; encdec.checkpoints list RUN shows them",
        )
    return StartingPoint.at_checkpoint("checkpoint", folder, manifest_entry(folder, "digest"))


def checkpoint_folder(word: str) -> Path | None:
    """A checkpoint, or a run directory's newest one."""
    path = Path(word).absolute()
    path = RunPaths(path).newest_checkpoint() or path
    return path if (path / MANIFEST).is_file() else None


def manifest_entry(folder: Path, name: str) -> Any:
    """One value of a checkpoint's manifest, which the job will verify.

    Raises:
        ConfigError: a damaged one.
    """
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "A checkpoint's manifest must be readable",
            found=f"{folder / MANIFEST}: {type(error).__name__}",
            remedy="Give another checkpoint; encdec.checkpoints verify says more",
        ) from None


def require_steps_left(folder: Path, run: RunConfig) -> None:
    """A checkpoint at or past the end of what is to be run leaves nothing to do.

    Raises:
        ConfigError: it is.
    """
    step = manifest_entry(folder, "step")
    if not isinstance(step, int) or step >= run.num_train_steps:
        raise ConfigError(
            "--resume must name a checkpoint before the last step of the phase",
            found=f"step {step} of {run.num_train_steps} in {folder}",
            remedy="Give an earlier checkpoint, or more steps; --from-weights begins at step 0 with its weights",
        )


def given_weights(word: str | None) -> StartingPoint | None:
    """What --from-weights names: a checkpoint, a run directory's newest one, a Hugging Face directory, or a hub id.

    Raises:
        ConfigError: none of them.
    """
    if word is None:
        return None
    folder = checkpoint_folder(word)
    if folder:
        return StartingPoint.at_checkpoint("weights", folder, manifest_entry(folder, "digest"))
    path = Path(word).absolute()
    if (path / "config.json").is_file():
        return StartingPoint("weights", str(path), str(path))
    if HUB_ID.fullmatch(word) and not path.parent.is_dir():  # or it is a mistyped path
        return StartingPoint("weights", word, word)
    raise ConfigError(
        "--from-weights must name a checkpoint's folder, a run directory with one, a model directory or a hub id",
        found=word,
        remedy="Give RUN/checkpoints/step-<k>, a directory with config.json and safetensors, or owner/name",
    )
