"""Where a run can run: which cluster answers, and whether this machine has what the configuration asks for."""

from __future__ import annotations

from pathlib import Path

from encdec.data.corpus import open_corpus
from encdec.errors import ConfigError, MissingPrerequisite
from encdec.training.notifications import require_notifications
from encdec.training.rules import require_deepspeed, require_peft
from encdec.training.run_config import RunConfig
from launchers.slurm import why_no_controller

HERE = "python -m launchers.submit --phase sanity_check --config configs/tiny.yaml"
SANDBOX = "python -m launchers.sandbox up"


def choose_cluster(asked: str, run: RunConfig) -> tuple[str, str]:
    """("local" or "slurm", why).

    Raises:
        MissingPrerequisite: several nodes, --cluster slurm or a cluster's file, and no Slurm controller answers.
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
        return "slurm", f"asked for with --cluster {asked}" if asked != "auto" else "a Slurm controller answers"
    if asked != "auto" or run.nodes > 1:
        wanted = f"{run.nodes} nodes of {run.ranks_per_node} {run.config.infra.device} ranks"
        raise MissingPrerequisite(
            f"{wanted} need a Slurm controller that answers from here",
            found=f"none ({reason})",
            remedy="Log in to a cluster's login node and give the same command; or start a small Slurm on this machine "
            f"with: {SANDBOX}; or run the tiny configuration here, without Slurm, GPU or hub, with: {HERE}",
        )
    return "local", f"no Slurm controller answers ({reason})"


def require_devices(run: RunConfig) -> None:
    """Local runs need their GPUs, their engine and what notifies people here. Looks at files: no torch is loaded here.

    Raises:
        MissingPrerequisite: fewer GPUs than ranks, no DeepSpeed or peft, or no means of notification.
    """
    if run.config.infra.distributed_type == "deepspeed":
        require_deepspeed()
    if run.config.model.lora is not None:
        require_peft()
    require_notifications(run.config.infra.notify_env, run.config.infra.notify_file)
    if run.config.infra.device != "cuda":
        return
    found = count_gpus()
    if found < run.ranks_per_node:
        raise MissingPrerequisite(
            f"infra.device=cuda with {run.ranks_per_node} ranks needs {run.ranks_per_node} GPUs on this machine",
            found=found,
            remedy="Lower --gpus-per-node, log in where the GPUs are, or run the tiny configuration, which needs none: "
            f"{HERE}",
        )


def count_gpus() -> int:
    """NVIDIA GPUs of this machine, by their device files."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def require_text(run: RunConfig) -> bool:
    """A corpus on this machine must hold text, before anything is written. One on a hub is not asked for from here.

    Returns whether it is on this machine.

    Raises:
        DataError: no such path, or no document with text.
    """
    data = run.config.data
    corpus = open_corpus(data.dataset_name, text_column=data.text_column, max_examples=1)
    if corpus.is_local:
        next(iter(corpus.documents()))
    return corpus.is_local
