"""Where everything of a sandbox lies and what it is called: its shape, its paths, its addresses."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from encdec.errors import ConfigError, MissingPrerequisite

SITE, CONTROLLER = "site", "ctl"
SLURMCTLD_PORT, SLURMD_PORT, SLURMDBD_PORT = 6817, 6818, 6819
MAX_NODES = 64
MAX_GPUS = 16
MAX_ROOT = 64
"""Characters: a Unix socket path ends at 107, and slurmstepd appends up to 43 to the directory."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How many nodes, and how many fake GPUs in each."""

    nodes: int = 4
    gpus: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MAX_NODES:
            raise ConfigError(f"A sandbox has 1 to {MAX_NODES} nodes", found=self.nodes, remedy="Change --nodes")
        if not 0 <= self.gpus <= MAX_GPUS:
            raise ConfigError(f"A sandbox node has 0 to {MAX_GPUS} GPUs", found=self.gpus, remedy="Change --gpus")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"n{i + 1}" for i in range(self.nodes))

    def __str__(self) -> str:
        return f"{_count(self.nodes, 'node')} with {_count(self.gpus, 'GPU')} each"


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What `up` decided; the only thing a node reads when it boots.

    Args:
        subnet: the first three numbers of the sandbox's own /24, as "10.77.5".
    """

    shape: Shape
    subnet: str

    @property
    def machines(self) -> tuple[str, ...]:
        """Everything that is booted, in the order in which it is booted."""
        return (SITE, CONTROLLER, *self.shape.names)

    def address(self, name: str) -> str:
        if name == "login":
            return f"{self.subnet}.254"
        return f"{self.subnet}.{1 if name == CONTROLLER else 10 + int(name.removeprefix('n'))}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Blueprint:
        fields = json.loads(text)
        return cls(shape=Shape(**fields["shape"]), subnet=fields["subnet"])


@dataclass(frozen=True)
class Layout:
    """Every path of a sandbox. All of them lie below `root`; `OWNED` is what `down` may remove."""

    root: Path

    OWNED = ("etc", "run", "log", "state", "spool", "database", "devices", "sandbox.json")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w./+-]+", str(self.root), re.ASCII) or len(str(self.root)) > MAX_ROOT:
            rule = f"The sandbox's full path has at most {MAX_ROOT} characters, out of letters, digits and ._/+-"
            raise ConfigError(rule, found=self.root, remedy="Choose another --dir, for example --dir /var/tmp/sandbox")

    blueprint_file = property(lambda self: self.root / "sandbox.json")
    etc = property(lambda self: self.root / "etc")
    run = property(lambda self: self.root / "run")
    log = property(lambda self: self.root / "log")
    devices = property(lambda self: self.root / "devices")
    database = property(lambda self: self.root / "database")
    slurm_conf = property(lambda self: self.etc / "slurm.conf")
    slurmdbd_conf = property(lambda self: self.etc / "slurmdbd.conf")
    accounting = property(lambda self: self.etc / "accounting.txt")
    accounting_done = property(lambda self: self.root / "state" / "accounting.done")
    hosts = property(lambda self: self.etc / "hosts")
    munge_key = property(lambda self: self.etc / "munge.key")
    munge_socket = property(lambda self: self.run / "munge.socket")
    database_socket = property(lambda self: self.run / "database.socket")

    def folders(self, blueprint: Blueprint) -> list[Path]:
        """Every folder to make, parents first."""
        names = ("etc", "run", "log", "state", "devices", "spool")
        return [self.root / name for name in names] + [self.root / "spool" / name for name in blueprint.shape.names]

    def gpus(self, blueprint: Blueprint) -> list[Path]:
        """The device files that play the GPUs; all nodes share them."""
        return [self.devices / f"gpu{i}" for i in range(blueprint.shape.gpus)]

    def hostname(self, name: str) -> Path:
        return self.etc / f"hostname.{name}"

    def identity(self, name: str) -> Path:
        """Which process is the node's PID 1, as this machine numbers it."""
        return self.run / f"{name}.json"

    def started(self, name: str, step: str) -> Path:
        return self.run / f"{name}.{step}.started"

    @property
    def complete(self) -> Path:
        """Exists once `up` has succeeded; a sandbox without it is the remains of one that was interrupted."""
        return self.run / "complete"

    def failed(self, name: str) -> Path:
        """One line that says which step of a node failed and how; absent while all is well."""
        return self.run / f"{name}.failed"

    def log_of(self, name: str, step: str) -> Path:
        return self.log / f"{name}.{step}.log"

    @property
    def host_link(self) -> str:
        """This machine's network interface into the sandbox: recognisable, and its own for every directory."""
        return "sbx-" + hashlib.sha256(str(self.root).encode()).hexdigest()[:8]

    @property
    def exists(self) -> bool:
        return self.blueprint_file.exists()

    def blueprint(self) -> Blueprint:
        try:
            return Blueprint.from_json(self.blueprint_file.read_text())
        except FileNotFoundError:
            remedy = "Start one: python -m launchers.sandbox up, or name its directory with --dir"
            raise MissingPrerequisite("A sandbox must be up", found=f"none at {self.root}", remedy=remedy) from None

    def unreachable_parent(self) -> Path | None:
        """The first directory on the way to the sandbox that other users may not enter, or None."""
        on_the_way = reversed([self.root, *self.root.parents])
        return next((folder for folder in on_the_way if folder.exists() and not os.stat(folder).st_mode & 0o001), None)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
