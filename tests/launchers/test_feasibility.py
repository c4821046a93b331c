"""What cannot work is refused, what is bad is said: tables of cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from encdec.errors import ConfigError
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import RunConfig, resolve_run
from launchers.launch_options import LaunchOptions
from launchers.planning.feasibility import (
    Finding,
    bad_choices,
    clock,
    job_limit_seconds,
    refused_by,
    require_feasible,
)
from launchers.planning.forecast import Forecast, Place, foresee
from launchers.planning.plan import Plan, make_plan, sharding_of
from launchers.planning.slurm_limits import Limits, Node, Partition, Qos
from tests.conftest import REPOSITORY

DEFAULT = REPOSITORY / "configs" / "training_config.yaml"
MAIN = Partition(
    name="main", default=True, state="UP", max_seconds=86_400, default_seconds=3600, max_nodes=None, total_nodes=4,
    qos=None,
)  # fmt: skip
NODES = [
    Node(name=f"n{i}", usable=i != 4, cpus=32, memory_bytes=250 * 2**30, gpus=8, gres="gpu:h100:8") for i in range(1, 5)
]
LIMITS = Limits(partitions=[MAIN], partition=MAIN, nodes=NODES)
PLACE = Place(on_slurm=True, gpu="h100", gpu_memory_gb=80.0, limit_seconds=86_400.0)


def run_of(*settings: str, nodes: int = 2) -> RunConfig:
    return resolve_run(TrainingPhase("full"), config_file=DEFAULT, settings=settings, nodes=nodes)


def plan_of(run: RunConfig) -> Plan:
    return make_plan(run, run_dir="runs/x", cluster="slurm", why_cluster="")


def found_by_limits(limits: Limits, nodes: int = 2, cpus: int = 24, gpus: int = 8, **flags: Any) -> list[Finding]:
    return refused_by(limits, plan_of(run_of(nodes=nodes)), flags, cpus=cpus, gpus=gpus)


def test_job_that_fits_is_not_mentioned():
    assert found_by_limits(LIMITS, time="1-00", partition="main", mem="200G") == []
    assert found_by_limits(Limits(), time="9-00", partition="anything") == []  # Slurm did not say


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"time": "1-00:00:01"}, "partition main allows 24 h"),
        ({"nodes": 5}, "Node count 5, and partition main allows 4"),
        ({"gpus": 9}, "2 node(s) with 24 CPUs, 9 GPUs each, and partition main has 0 of them"),
        ({"cpus": 33}, "33 CPUs"),
        ({"mem": "300G"}, "300G of memory"),
    ],
)
def test_more_than_a_partition_has_is_refused(asked: dict[str, Any], words: str):
    [finding] = found_by_limits(LIMITS, **asked)
    assert finding.refuses and words in finding.found
    with pytest.raises(ConfigError, match="Slurm must accept the job"):
        require_feasible([finding])


def test_partition_that_is_not_there_or_down_is_refused():
    [finding] = found_by_limits(replace(LIMITS, partition=None), partition="nowhere")
    assert finding.refuses and "nowhere" in finding.found and "main" in finding.remedy
    [finding] = found_by_limits(replace(LIMITS, partition=replace(MAIN, state="DRAIN")))
    assert finding.refuses and "DRAIN" in finding.found
    [finding] = found_by_limits(replace(LIMITS, partition=replace(MAIN, state="DOWN")))
    assert not finding.refuses and "waits" in finding.remedy
    allowed = replace(MAIN, allowed_qos=("normal",), allowed_accounts=("research",))
    findings = found_by_limits(replace(LIMITS, partition=allowed), qos="urgent", account="teaching")
    assert [finding.refuses for finding in findings] == [True, True]
    assert found_by_limits(replace(LIMITS, partition=allowed), qos="Normal", account="RESEARCH") == []
    [finding] = found_by_limits(replace(LIMITS, certain=False), time="9-00")
    assert not finding.refuses


def test_nodes_that_are_down_are_waited_for():
    [finding] = found_by_limits(LIMITS, nodes=4)
    assert not finding.refuses and "3 of 4 fitting nodes" in finding.found
    require_feasible([finding])


def test_limits_of_the_quality_of_service():
    qos = Qos(name="short", max_seconds=3600, max_resources={"node": 2, "gres/gpu": 8})
    findings = found_by_limits(replace(LIMITS, qos=[qos], known_qos=("short",)), time="2:00:00", qos="short")
    assert [
        next(words for words in ("QOS short allows 60 min", "16 of gres/gpu") if words in finding.found)
        for finding in findings
    ] == ["QOS short allows 60 min", "16 of gres/gpu"]
    [finding] = found_by_limits(replace(LIMITS, known_qos=("normal",)), qos="nope")
    assert finding.refuses and "normal" in finding.remedy


def test_limit_of_a_job_is_what_it_asks_for_or_the_partitions():
    assert job_limit_seconds(LIMITS, {"time": "90"}) == 5400
    assert job_limit_seconds(LIMITS, {}) == 3600
    assert job_limit_seconds(replace(LIMITS, partition=replace(MAIN, default_seconds=None)), {}) == 86_400
    assert job_limit_seconds(Limits(), {}) is None


def choices(run: RunConfig, place: Place = PLACE, *, certain: bool = True, **options: Any) -> list[Finding]:
    chosen = LaunchOptions(**options)
    forecast: Forecast = foresee(run, place, chosen, sharding=sharding_of(run))
    return bad_choices(run, plan_of(run), forecast, chosen, memory_is_certain=certain)


def test_sound_choices_are_not_mentioned():
    assert choices(run_of("training.save_every=auto")) == []


def test_memory_that_cannot_suffice_is_refused_where_the_gpu_is_named():
    run = run_of("training.save_every=auto")
    small = replace(PLACE, gpu_memory_gb=6.0)
    [refused] = choices(run, small)
    assert refused.refuses and "on a device of 6.0 GB" in refused.found
    [guessed] = choices(run, small, certain=False)
    assert not guessed.refuses
    [tight] = choices(run, replace(PLACE, gpu_memory_gb=8.5))
    assert not tight.refuses


def test_interval_that_loses_much_is_named_with_a_better_one():
    run = run_of(nodes=64)
    flaky = replace(PLACE, failures_per_thousand_node_days=65.0)
    found = [finding for finding in choices(run, flaky) if "a checkpoint every 10,000 steps" in finding.found]
    assert len(found) == 1 and "training.save_every=auto" in found[0].remedy and not found[0].refuses


def test_mean_time_that_the_clock_does_not_know_is_named():
    flaky = replace(PLACE, failures_per_thousand_node_days=60.0)
    [finding] = [
        f for f in choices(run_of("training.save_every=auto", nodes=64), flaky) if "reckons with 24 h" in f.found
    ]
    assert "infra.mean_time_to_interrupt_hours=6.2" in finding.remedy


def test_time_limits_that_leave_nothing_are_named():
    [finding] = [f for f in choices(run_of(), replace(PLACE, limit_seconds=60.0)) if "no step is left" in f.found]
    assert not finding.refuses
    many = [
        f for f in choices(run_of(), replace(PLACE, limit_seconds=600.0), max_attempts=3) if "--max-attempts" in f.found
    ]
    assert len(many) == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.3, "0.3 s"), (90, "90 s"), (300, "5 min"), (5400, "90 min"), (86_400, "24 h"), (864_000, "10.0 days"),
     (None, "?")],
)  # fmt: skip
def test_durations_in_words(seconds: float | None, words: str):
    assert clock(seconds) == words
