"""``configs/clusters/NAME.yaml``: what a cluster wants to be told with every job. Strict, like the configuration tree.

It says where a run runs, not what it computes: it is no part of a run's identity. The command line wins over it.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator

import launchers
from encdec.errors import ConfigError
from encdec.flops import ACCELERATORS
from encdec.redaction import looks_secret
from encdec.training.config import NonNegativeFloat, PositiveFloat, Section
from encdec.training.config_errors import explain
from encdec.training.yaml_values import read_yaml
from launchers.arguments import BUILT_IN_CLUSTERS, SLURM_TIME
from launchers.planning.forecast import EXPECTED_MFU

FOLDERS = (Path("configs/clusters"), Path(launchers.__path__[0]).parent / "configs" / "clusters")
"""Where a NAME is looked for, in this order."""
DECIDED = frozenset(
    {
        "array", "comment", "dependency", "error", "export", "job-name", "nodes", "no-requeue", "ntasks",
        "ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "test-only", "wrap",
    }
)  # fmt: skip
"""sbatch flags that the launcher decides for every job."""
REMEDY = "Correct {path} in the file; text that YAML would take for a number goes in quotes"
ASSIGNED = re.compile(r"""\b([A-Za-z_]\w*)=(?!["']?(?:\$|\s|$))""")
"""A variable that a shell line sets to what stands there; $(...) is read elsewhere."""

Word = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
"""Printable, on one line."""


class ClusterFile(Section):
    """One cluster's file. Everything is optional."""

    partition: Word | None = None
    """Partition."""
    account: Word | None = None
    """Account."""
    qos: Word | None = None
    """Quality of service."""
    time: Word | None = None
    """Time limit of one job as sbatch's --time takes it, in quotes: "90" minutes, "4:00:00", "2-00" days and hours."""
    constraint: Word | None = None
    """Features that every node must have."""
    reservation: Word | None = None
    """Reservation."""
    exclude: Word | None = None
    """Nodes that must not be used: "n[1-3],n7"."""
    mem: Word | None = None
    """Memory of each node, with its unit: "500G"; "0" is all of it."""
    cpus_per_task: Annotated[int, Field(gt=0)] | None = None
    """CPUs of each node's one task; one a rank and one a data worker unless given."""
    gpu_flag: Annotated[str, Field(pattern=r"^([a-z][a-z-]*=.*\{n\}.*)?$")] = "gpus-per-node={n}"
    """sbatch flag that asks for a node's {n} GPUs: "gres=gpu:h100:{n}". Empty: Slurm does not count them here."""
    gpu: Word | None = None
    """Kind of the GPUs, one of encdec.flops.ACCELERATORS: "h100". It says how much memory and speed there is; unless
    given, it is looked for in ``gpu_flag`` and in Slurm's names."""
    gpu_memory_gb: PositiveFloat | None = None
    """Memory of one GPU, GB of 10**9 bytes: 80.0, where it is not that of ``gpu``. What a run needs is compared with it
    beforehand."""
    expected_mfu: Annotated[float, Field(gt=0, le=1)] = EXPECTED_MFU
    """Model FLOPs utilization with which hours are foreseen before a run has measured any."""
    failures_per_thousand_node_days: NonNegativeFloat | None = None
    """How often a node interrupts its job: 6.5. Unless given, a run's ``infra.mean_time_to_interrupt_hours`` counts."""
    sbatch_flags: dict[Word, Word | int | bool] = {}
    """Further sbatch flags by long name, without dashes; true for one without a value."""
    srun_args: list[Word] = []
    """Further arguments of srun, such as pyxis' --container-image."""
    setup: list[str] = []
    """Shell lines that run on the first node before srun: module load, source .../activate."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str | int] = {}
    """Variables of the job. No secrets."""
    network_interface: Word | None = None
    """Interface between the nodes, for Gloo and NCCL alike; unless given, the one on the route to the first node."""
    python: Word | None = None
    """Shell words that start Python on the nodes, a container's prefix included; this Python unless given."""

    @field_validator("time")
    @classmethod
    def _time_is_slurms(cls, value: str | None) -> str | None:
        if value is not None and not SLURM_TIME.fullmatch(value):
            raise ValueError(
                "minutes, minutes:seconds, hours:minutes:seconds, days-hours or days-hours:minutes:seconds"
            )
        return value

    @field_validator("gpu")
    @classmethod
    def _gpu_is_known(cls, value: str | None) -> str | None:
        if value is not None and value.lower() not in ACCELERATORS:
            raise ValueError(f"one of {', '.join(ACCELERATORS)}; give gpu_memory_gb of any other")
        return value.lower() if value else None

    @field_validator("sbatch_flags")
    @classmethod
    def _flags_are_free(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        named = {name.replace("-", "_") for name in value} & set(cls.model_fields)
        if named:
            raise ValueError(f"{min(named)} has a key of its own in this file")
        if DECIDED & set(value):
            raise ValueError(f"the launcher itself decides --{min(DECIDED & set(value))}")
        return value

    @property
    def flags(self) -> dict[str, str | bool]:
        """sbatch flags by long name; True for one without a value."""
        own = ("partition", "account", "qos", "time", "constraint", "reservation", "exclude", "mem", "cpus_per_task")
        given = {name.replace("_", "-"): getattr(self, name) for name in own} | self.sbatch_flags
        return {
            name: value if value is True else str(value) for name, value in given.items() if value not in (None, False)
        }

    @property
    def variables(self) -> dict[str, str]:
        """Environment of the job; a variable given by name goes before what ``network_interface`` says."""
        libraries = ("GLOO", "NCCL") if self.network_interface else ()
        interface = {f"{library}_SOCKET_IFNAME": str(self.network_interface) for library in libraries}
        return interface | {name: str(value) for name, value in self.environment.items()}


def read_cluster_file(asked: str) -> ClusterFile:
    """The file that ``--cluster`` names; one that says nothing for auto, slurm and local.

    Raises:
        ConfigError: there is none of that name, or it breaks a rule.
    """
    if asked in BUILT_IN_CLUSTERS:
        return ClusterFile()
    path = find_cluster_file(asked)
    try:
        read = ClusterFile.model_validate(read_yaml(path))
    except ValidationError as error:
        raise explain(error, str(path), tree=ClusterFile, remedy=REMEDY) from None
    require_no_secrets(read, path)
    return read


def find_cluster_file(asked: str) -> Path:
    """A path as it is; a name in one of FOLDERS."""
    if asked.endswith((".yaml", ".yml")) or "/" in asked:
        places = [Path(asked)]
    else:
        places = [folder / f"{asked}.yaml" for folder in FOLDERS]
    for path in places:
        if path.is_file():
            return path
    known = [*BUILT_IN_CLUSTERS, *sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})]
    near = difflib.get_close_matches(asked, known, n=1)
    raise ConfigError(
        f"--cluster is one of {', '.join(known)}, or a file",
        found=f"{asked!r}, and no {' or '.join(str(place.absolute()) for place in places)}",
        remedy=f"Did you mean {near[0]}"
        if near
        else "Write the file; configs/clusters/example.yaml explains every key",
    )


def require_no_secrets(read: ClusterFile, path: Path) -> None:
    """What stands in the file stands in every job's script, and in Slurm's records of it.

    Raises:
        ConfigError: naming the variable, never its value.
    """
    for name in [*read.environment, *(name for line in read.setup for name in ASSIGNED.findall(line))]:
        if looks_secret(name):
            raise ConfigError(
                f"{path}: a file that is shared and copied into job scripts holds no secrets",
                found=f"a value for {name}",
                remedy=f"Export {name} in the shell that submits and give --env-secret {name}, or let "
                "its tool read it from a file that only you can read, such as ~/.netrc for W&B",
            )
