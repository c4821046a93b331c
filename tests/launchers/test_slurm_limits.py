"""What Slurm says of its limits, as Slurm 22.05 printed it, and what we make of it. Scripts play the commands."""

from __future__ import annotations

import pytest

from launchers.planning import slurm_limits
from launchers.planning.slurm_limits import (
    ask_start,
    count_gpus,
    memory_bytes,
    parse_nodes,
    parse_partitions,
    parse_qos,
)
from launchers.planning.slurm_limits import read_limits as read
from tests.launchers.conftest import Play

PARTITIONS = (
    "PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A "
    "DefaultTime=01:00:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED "
    "MaxTime=1-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-4] PriorityJobFactor=1 PriorityTier=10 "
    "RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=128 TotalNodes=4 "
    "SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED "
    "TRES=cpu=128,mem=1000G,node=4,billing=128,gres/gpu=32\n"
    "PartitionName=debug AllowGroups=ALL AllowAccounts=research,teaching AllowQos=normal AllocNodes=ALL Default=NO "
    "QoS=short DefaultTime=NONE MaxNodes=2 MaxTime=00:05:00 State=DOWN TotalCPUs=128 TotalNodes=4\n"
)
NODES = (
    "n1|idle|gpu:h100:8|256000|32\nn2|mixed|gpu:h100:8(S:0-1)|256000|32\nn3|drained*|gpu:h100:8|256000|32\n"
    "n4|down*|(null)|128000|16\n"
)
QOS = (
    "normal||||\nshort|04:00:00|node=2,cpu=64|gres/gpu=8|DenyOnLimit\n"
    "long|7-00:00:00||cpu=128,node=16|PartitionTimeLimit,OverPartQOS\n"
)
CONFIG = (
    "AccountingStorageEnforce = associations,limits,qos\nJobSubmitPlugins        = (null)\n"
    "KillWait                = 30 sec\n"
)


def test_partitions():
    main, debug = parse_partitions(PARTITIONS)
    assert (main.name, main.default, main.state, main.qos) == ("main", True, "UP", None)
    assert (main.max_seconds, main.default_seconds) == (86_400, 3600)
    assert (main.max_nodes, main.total_nodes, main.allowed_qos, main.allowed_accounts) == (None, 4, (), ())
    assert (debug.default, debug.state, debug.qos, debug.max_seconds, debug.default_seconds) == (
        False, "DOWN", "short", 300, None,
    )  # fmt: skip
    assert (debug.max_nodes, debug.allowed_qos, debug.allowed_accounts) == (2, ("normal",), ("research", "teaching"))
    assert parse_partitions("slurm_load_partitions error: Unable to contact slurm controller\n") == []


def test_nodes():
    nodes = parse_nodes(NODES)
    assert [node.usable for node in nodes] == [True, True, False, False]
    assert [node.gpus for node in nodes] == [8, 8, 8, 0]
    assert nodes[0].memory_bytes == 256_000 * 2**20 and nodes[3].cpus == 16


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("gpu:h100:8(S:0-1),nvme:2", 8), ("gpu:4", 4), ("gpu:a100:2,gpu:v100:1", 3), ("(null)", 0), ("shard:9", 0)],
)
def test_gpus_of_a_gres_list(gres: str, gpus: int):
    assert count_gpus(gres) == gpus


def test_qos():
    normal, short, long = parse_qos(QOS)
    assert normal.max_seconds is None and not normal.max_resources
    assert short.max_seconds == 4 * 3600 and short.max_resources == {"node": 2, "cpu": 64, "gres/gpu": 8}
    assert long.max_seconds == 7 * 86_400 and long.max_resources == {"cpu": 128, "node": 16}


@pytest.mark.parametrize(
    ("text", "nbytes"), [("500G", 500 * 2**30), ("4000", 4000 * 2**20), ("2T", 2**41), ("0", None), ("", None)]
)
def test_memory(text: str, nbytes: float | None):
    assert memory_bytes(text) == nbytes


def test_limits_of_a_job(play: Play):
    (play.folder / "scontrol").write_text(
        f"#!/bin/sh\ncase \"$*\" in *partition*) cat <<'.'\n{PARTITIONS}.\n;; *) cat <<'.'\n{CONFIG}.\nesac\n"
    )
    (play.folder / "scontrol").chmod(0o755)
    play("sinfo", NODES)
    play("sacctmgr", QOS)
    limits = read({"qos": "long"})
    assert limits.partition and limits.partition.name == "main"
    assert [node.name for node in limits.nodes or ()] == ["n1", "n2", "n3", "n4"]
    assert [qos.name for qos in limits.qos] == ["long"] and limits.known_qos == ("normal", "short", "long")
    assert play.calls("sinfo") == ["--noheader --Node --partition=main --format=%N|%T|%G|%m|%c"]
    assert [qos.name for qos in read({"partition": "debug"}).qos] == ["short"]  # the partition's own
    unknown = read({"partition": "nowhere"})
    assert unknown.partition is None and [p.name for p in unknown.partitions or ()] == ["main", "debug"]


# sbatch's flags, the site's plugins -> whether the partition's limits are the job's
CERTAIN: list[tuple[dict[str, str], str, bool]] = [
    ({}, "(null)", True),
    ({}, "lua", False),
    ({"partition": "main"}, "lua", True),
    ({"partition": "debug,main"}, "(null)", True),  # no partition is judged
    ({"partition": "debug", "qos": "Short"}, "(null)", True),
    ({"partition": "debug", "qos": "long"}, "(null)", False),
    ({"partition": "debug", "qos": "nobody-knows"}, "(null)", False),
]


@pytest.mark.parametrize(("flags", "plugins", "certain"), CERTAIN)
def test_limits_refuse_only_where_they_are_the_jobs(flags: dict[str, str], plugins: str, certain: bool, play: Play):
    config = CONFIG.replace("(null)", plugins)
    (play.folder / "scontrol").write_text(
        f"#!/bin/sh\ncase \"$*\" in *partition*) cat <<'.'\n{PARTITIONS}.\n;; *) cat <<'.'\n{config}.\nesac\n"
    )
    (play.folder / "scontrol").chmod(0o755)
    play("sinfo", NODES)
    play("sacctmgr", QOS)
    limits = read(flags)
    assert limits.certain == certain
    assert (limits.partition is None) == ("," in flags.get("partition", ""))
    of_partition = limits.partition is not None and limits.partition.name == "debug" and flags.get("qos") != "long"
    assert ("short" in [qos.name for qos in limits.qos]) == of_partition  # which its own QOS may lift


@pytest.mark.parametrize(
    ("problem", "passes"),
    [
        ("Requested node configuration is not available", True),
        ("Requested nodes are busy", True),
        ("Invalid time specified", True),
        ("Node count specification invalid", False),
        ("Invalid partition name specified", False),
        ("Invalid feature specification", False),
        (None, False),
    ],
)
def test_what_a_test_says_of_this_moment_alone_refuses_nothing(problem: str | None, passes: bool):
    assert slurm_limits.StartTest(None, problem).passes == passes


def test_limits_that_are_not_enforced_are_none(play: Play):
    play("scontrol", PARTITIONS + CONFIG.replace("limits,qos", ""))
    play("sacctmgr", QOS)
    play("sinfo", NODES)
    assert read({"qos": "short"}).qos == []
    assert play.calls("sacctmgr") == []


def test_controller_that_is_away_limits_nothing(play: Play):
    limits = read({"partition": "main"})
    assert limits.partitions is None and limits.partition is None and limits.nodes is None


@pytest.mark.parametrize(
    ("err", "code", "start", "problem"),
    [
        ("sbatch: Job 1 to start at 2026-11-26T07:16:12 using 2 processors on nodes n[1-2] in partition main\n", 0,
         "2026-11-26T07:16:12", None),
        ("allocation failure: Node count specification invalid\n", 1, None, "Node count specification invalid"),
        ("sbatch: error: invalid partition specified: nowhere\nallocation failure: Invalid partition name specified\n",
         1, None, "invalid partition specified: nowhere; Invalid partition name specified"),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n", 1, None,
         None),
    ],
)  # fmt: skip
def test_start_that_slurm_estimates(play: Play, err: str, code: int, start: str | None, problem: str | None):
    play("sbatch", err=err, code=code)
    assert ask_start("#!/bin/bash\n") == slurm_limits.StartTest(start, problem)
    assert play.calls("sbatch") == ["--test-only"]
