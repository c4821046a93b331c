"""Where a run can run: which cluster answers, and whether this machine has what the configuration asks for."""

from __future__ import annotations

from pathlib import Path

from encdec.errors import ConfigError, DataError, MissingPrerequisite
from encdec.training.run_config import RunConfig
from launchers.slurm import why_no_controller

HERE = "python -m launchers.submit --phase sanity_check --config configs/tiny.yaml"
SANDBOX = "python -m launchers.sandbox up"
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def choose_cluster(asked: str, run: RunConfig) -> tuple[str, str]:
    """("local" or "slurm", why).

    Raises:
        MissingPrerequisite: several nodes or --cluster slurm, and no Slurm controller answers.
        ConfigError: several nodes on --cluster local.
    """
    if asked == "local":
        if run.nodes > 1:
            raise ConfigError(
                "--cluster local is this machine alone",
                found=f"--nodes {run.nodes}",
                remedy="Leave --nodes out, or --cluster local",
            )
        return "local", "asked for with --cluster local"
    reason = why_no_controller()
    if reason is None:
        return "slurm", "a Slurm controller answers"
    if asked == "slurm" or run.nodes > 1:
        wanted = f"{run.nodes} nodes of {run.ranks_per_node} {run.config.infra.device} ranks"
        raise MissingPrerequisite(
            f"{wanted} need a Slurm controller that answers from here",
            found=f"none ({reason})",
            remedy="Log in to a cluster's login node and give the same command; or start a small Slurm on this machine "
            f"with: {SANDBOX}; or run the tiny configuration here, without Slurm, GPU or hub, with: {HERE}",
        )
    return "local", f"no Slurm controller answers ({reason})"


def require_devices(run: RunConfig) -> None:
    """Local runs on GPUs need them here. Looks at device files, since no torch is loaded on this side.

    Raises:
        MissingPrerequisite: fewer GPUs than ranks.
    """
    if run.config.infra.device != "cuda":
        return
    found = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if found < run.ranks_per_node:
        raise MissingPrerequisite(
            f"infra.device=cuda with {run.ranks_per_node} ranks needs {run.ranks_per_node} GPUs on this machine",
            found=found,
            remedy="Lower --gpus-per-node, log in where the GPUs are, or run the tiny configuration, which needs none: "
            f"{HERE}",
        )


def require_text(run: RunConfig) -> None:
    """A corpus given as a path must exist and hold text, before anything is written.

    Raises:
        DataError: no such path, no text file in it, or only empty ones.
    """
    name = run.config.data.dataset_name
    path = Path(name).expanduser()
    if not (path.exists() or name.startswith(("/", "./", "../", "~")) or path.suffix in TEXT_SUFFIXES):
        return  # a hub data set, or the embedded default
    candidates = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    files = [file for file in candidates if file.suffix in TEXT_SUFFIXES and file.is_file()]
    if not any(has_text(file) for file in files):
        found = (
            "no such path" if not path.exists() else f"none in {len(files)} such files" if files else "no such files"
        )
        raise DataError(
            f"data.dataset_name={name} must hold {', '.join(TEXT_SUFFIXES)} files with text",
            found=found,
            remedy="Correct the path, or use python-stdlib, which is on every machine with Python",
        )


def has_text(file: Path) -> bool:
    """Whether anything but white space stands in ``file``."""
    if file.suffix == ".parquet":
        return file.stat().st_size > 0
    with file.open("rb") as stream:
        return any(line.strip() for line in stream)
