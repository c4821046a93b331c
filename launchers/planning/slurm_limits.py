"""What a cluster allows, asked of Slurm: partitions, their nodes, quality of service, and when a job would start.

``launchers.slurm`` asks; this module knows the formats of these answers. A question that Slurm does not answer leaves
None: then nothing is refused for it here, and sbatch itself has the last word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launchers.launch_options import limit_seconds
from launchers.slurm import ask, outside_any_job, refusal

NO_LIMIT = frozenset({"", "UNLIMITED", "INFINITE", "NONE", "N/A", "(null)"})
UNUSABLE = ("down", "drain", "fail", "maint", "planned_down", "power_down", "reboot", "unknown", "inval", "future")
"""What the state of a node begins with where no job can start for a while; ``drain`` covers draining and drained."""
SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
QOS_FIELDS = "Name,MaxWall,MaxTRES,MaxTRESPU,Flags"
PASSING = re.compile(
    r"node configuration is not available|nodes? (are |is )?(busy|not available|down|drained)|invalid time specified|"
    r"reserv",
    re.IGNORECASE,
)
"""What sbatch --test-only, which looks at this moment alone, says of jobs that sbatch queues: nodes that are down, a
reservation that has not begun.
"""
STARTS = re.compile(r"to start at (\S+)")
"""In what sbatch --test-only says."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node has, by Slurm's configuration."""

    name: str
    usable: bool
    """Whether jobs can start there, now or when others have ended."""
    cpus: int
    memory_bytes: float
    gpus: int
    gres: str
    """As Slurm says it: "gpu:h100:8(S:0-1)"."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What a partition allows."""

    name: str
    default: bool
    state: str
    """UP, DOWN (jobs wait), DRAIN (none is taken) or INACTIVE."""
    max_seconds: float | None
    """Longest time limit of a job; None: none."""
    default_seconds: float | None
    """Time limit of a job that asks for none."""
    max_nodes: int | None
    total_nodes: int
    qos: str | None
    """Quality of service whose limits hold for all of its jobs."""
    allowed_qos: tuple[str, ...] = ()
    """Empty: all."""
    allowed_accounts: tuple[str, ...] = ()
    """Empty: all."""


@dataclass(frozen=True, kw_only=True)
class Qos:
    """What a quality of service allows one job; None: no limit."""

    name: str
    max_seconds: float | None = None
    max_resources: Mapping[str, int] = field(default_factory=dict)
    """Of a job or of a user, the smaller: node, cpu, gres/gpu -> how many."""
    flags: frozenset[str] = frozenset()

    @property
    def over_partition(self) -> bool:
        """Whether it lifts limits of the partition (PartitionTimeLimit, PartitionMaxNodes)."""
        return any(flag.startswith("Partition") for flag in self.flags)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """All that Slurm says; None where it does not."""

    partitions: Sequence[Partition] | None = None
    partition: Partition | None = None
    """The one that the job asks for, or the default."""
    nodes: Sequence[Node] | None = None
    """Of that partition."""
    qos: Sequence[Qos] = ()
    """Those that hold for the job, where accounting enforces limits."""
    known_qos: tuple[str, ...] | None = None
    """Names of all of them."""
    certain: bool = True
    """Whether the partition's own limits are the job's: it is the one that is asked for, or no plugin of the site may
    choose another; and no quality of service lifts them.
    """


def read_limits(flags: Mapping[str, str | bool]) -> Limits:
    """Ask Slurm about what a job with these sbatch flags meets."""
    partitions = parse_partitions(ask("scontrol", "--oneliner", "show", "partition").out) or None
    asked = str(flags.get("partition", ""))  # of several Slurm takes one in which the job can run
    partition = next((p for p in partitions or () if p.name == asked or (not asked and p.default)), None)
    nodes = None
    if partition:
        answer = ask("sinfo", "--noheader", "--Node", f"--partition={partition.name}", "--format=%N|%T|%G|%m|%c")
        nodes = parse_nodes(answer.out) if answer.ok else None
    own, config = str(flags.get("qos", "")).lower(), ask("scontrol", "show", "config").out
    known, all_qos = None, {}
    if (own or (partition and partition.qos)) and enforces_limits(config):
        answer = ask("sacctmgr", "--noheader", "--parsable2", "show", "qos", f"format={QOS_FIELDS}")
        if answer.ok:
            all_qos = {qos.name.lower(): qos for qos in parse_qos(answer.out)}
            known = tuple(all_qos)
    job_qos = all_qos.get(own)
    names = [own]
    if partition and partition.qos and not (job_qos and "OverPartQOS" in job_qos.flags):
        names.append(partition.qos.lower())
    return Limits(
        partitions=partitions, partition=partition, nodes=nodes,
        qos=[all_qos[name] for name in names if name in all_qos], known_qos=known,
        certain=bool(asked or not may_choose_partition(config))
        and (not own or (job_qos is not None and not job_qos.over_partition)),
    )  # fmt: skip


def may_choose_partition(config: str) -> bool:
    """Whether a plugin of the site may send a job that names no partition elsewhere than to the default one."""
    found = re.search(r"^JobSubmitPlugins\s*=\s*(.*)$", config, re.MULTILINE)
    return found is None or found.group(1).strip() not in NO_LIMIT


def enforces_limits(config: str) -> bool:
    """Whether a controller with this configuration holds jobs to the limits of accounting."""
    found = re.search(r"^AccountingStorageEnforce\s*=\s*(.*)$", config, re.MULTILINE)
    return bool(found) and "limits" in found.group(1)  # type: ignore[union-attr]


def parse_partitions(text: str) -> list[Partition]:
    """``scontrol --oneliner show partition``."""
    found = []
    for line in text.splitlines():
        facts = dict(word.partition("=")[::2] for word in line.split())
        if "PartitionName" not in facts:
            continue
        found.append(
            Partition(
                name=facts["PartitionName"],
                default=facts.get("Default") == "YES",
                state=facts.get("State", "UP"),
                max_seconds=_seconds(facts.get("MaxTime", "")),
                default_seconds=_seconds(facts.get("DefaultTime", "")),
                max_nodes=_count(facts.get("MaxNodes", "")),
                total_nodes=int(facts.get("TotalNodes", "0")),
                qos=None if facts.get("QoS", "") in NO_LIMIT else facts["QoS"],
                allowed_qos=_names(facts.get("AllowQos", "ALL")),
                allowed_accounts=_names(facts.get("AllowAccounts", "ALL")),
            )
        )
    return found


def parse_nodes(text: str) -> list[Node]:
    """``sinfo --Node --format=%N|%T|%G|%m|%c``: name, state, GRES, memory in MiB, CPUs."""
    found = {}
    for row in (line.split("|") for line in text.splitlines()):
        if len(row) != 5:
            continue
        name, state, gres, memory, cpus = row
        found[name] = Node(
            name=name, usable=not state.startswith(UNUSABLE), cpus=int(cpus.rstrip("+")),
            memory_bytes=int(memory.rstrip("+")) * SIZES["M"], gpus=count_gpus(gres), gres=gres,
        )  # fmt: skip
    return list(found.values())


def count_gpus(gres: str) -> int:
    """GPUs of a GRES list: "gpu:h100:8(S:0-1),nvme:1" has 8."""
    plain = re.sub(r"\([^)]*\)", "", gres)
    entries = (entry.split(":") for entry in plain.split(","))
    return sum(int(entry[-1]) for entry in entries if entry[0] == "gpu" and entry[-1].isdecimal())


def parse_qos(text: str) -> list[Qos]:
    """``sacctmgr --parsable2 show qos`` with QOS_FIELDS."""
    found = []
    for row in (line.split("|") for line in text.splitlines()):
        if len(row) != len(QOS_FIELDS.split(",")):
            continue
        name, wall, a_job, a_user, qos_flags = row
        resources: dict[str, int] = {}
        for pair in (*a_job.split(","), *a_user.split(",")):
            what, _, count = pair.partition("=")
            if count.isdecimal():
                resources[what] = min(int(count), resources.get(what, int(count)))
        found.append(
            Qos(name=name, max_seconds=_seconds(wall), max_resources=resources, flags=frozenset(qos_flags.split(",")))
        )
    return found


def memory_bytes(text: str) -> float | None:
    """sbatch's --mem in bytes, MiB without a unit; None where it is no size, or 0, which is all of it."""
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip().upper())
    return int(found.group(1)) * SIZES[found.group(2) or "M"] or None if found else None


@dataclass(frozen=True)
class StartTest:
    """What sbatch --test-only says of a script."""

    start: str | None
    """Local time, as Slurm writes it; None: it does not say."""
    problem: str | None
    """Why it would not start; None: it would, or nobody knows."""

    @property
    def passes(self) -> bool:
        """Whether the problem is one of this moment."""
        return self.problem is not None and PASSING.search(self.problem) is not None


def ask_start(script: str) -> StartTest:
    """Ask when a job with this script would start; nothing is queued. A controller that is away refuses nothing."""
    answer = ask("sbatch", "--test-only", environment=outside_any_job(os.environ), script=script)
    if answer.ok:
        found = STARTS.search(answer.said)
        return StartTest(found.group(1) if found else None, None)
    if not answer.said or "contact" in answer.said.lower() or "timed out" in answer.said.lower():
        return StartTest(None, None)
    return StartTest(None, refusal(answer.said.replace("allocation failure: ", "")))


def _seconds(text: str) -> float | None:
    try:
        return None if text in NO_LIMIT else limit_seconds(text)
    except ValueError:
        return None


def _count(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _names(text: str) -> tuple[str, ...]:
    return () if text in ("ALL", *NO_LIMIT) else tuple(text.split(","))
