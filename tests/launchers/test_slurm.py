"""What Slurm's commands print, as Slurm 22.05 printed it, and what we make of it. Scripts play the commands."""

from __future__ import annotations

import pytest

from encdec.errors import ConfigError, EncdecError, MissingPrerequisite
from encdec.records import Outcome
from launchers import slurm
from launchers.arguments import parse_submit
from launchers.nodes.allocation import address_towards, free_port, interface_of, read_allocation
from launchers.nodes.outcomes import Move, next_move
from launchers.slurm import Ending
from tests.launchers.conftest import UNREACHABLE, Play

FORGOTTEN = "slurm_load_jobs error: Invalid job id specified"


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [
        (("RUNNING\n", "", 0), ("", "", 0), "RUNNING"),
        (("CANCELLED\n", "", 0), ("", "", 0), "CANCELLED"),
        (("", FORGOTTEN, 1), ("CANCELLED by 0\n", "", 0), "CANCELLED"),
        (("", FORGOTTEN, 1), ("OUT_OF_MEMORY\n", "", 0), "OUT_OF_MEMORY"),
        (("", FORGOTTEN, 1), ("", "", 0), slurm.GONE),
        (("", FORGOTTEN, 1), ("RUNNING\n", "", 0), slurm.GONE),  # lost by a controller that crashed
        (("", FORGOTTEN, 1), ("", "Slurm accounting storage is disabled", 1), slurm.GONE),
        (("", UNREACHABLE, 1), ("COMPLETED\n", "", 0), "COMPLETED"),
        (("", UNREACHABLE, 1), ("PENDING\n", "", 0), slurm.UNKNOWN),
        (("", UNREACHABLE, 1), ("", "", 1), slurm.UNKNOWN),
    ],
)
def test_job_state_comes_from_the_controller_then_from_accounting(play: Play, squeue, sacct, state: str):
    play("squeue", *squeue)
    play("sacct", *sacct)
    assert slurm.job_state("12") == state
    assert play.calls("squeue") == ["--noheader --jobs=12 --states=all --format=%T"]


def test_nobody_to_ask_is_no_end():
    assert slurm.UNKNOWN not in slurm.END_STATES
    assert slurm.parse_state("CANCELLED+\n") == "CANCELLED"
    assert slurm.parse_state(" \n") is None


def test_controller_that_answers_and_one_that_does_not(play: Play):
    play("scontrol", "Slurmctld(primary) at ctl is UP\n")
    assert slurm.why_no_controller() is None
    play("scontrol", "Slurmctld(primary) at ctl is DOWN\n", code=1)
    assert slurm.why_no_controller() == "Slurmctld(primary) at ctl is DOWN"


def test_node_lists_are_expanded_by_scontrol(play: Play, monkeypatch: pytest.MonkeyPatch):
    play("scontrol", "n1\nn2\nn3\nn10\ngpu-a01\ngpu-a02\n")
    assert slurm.expand_nodelist("n[1-3,10],gpu-a[01-02]") == ["n1", "n2", "n3", "n10", "gpu-a01", "gpu-a02"]
    play("scontrol")
    with pytest.raises(EncdecError):
        slurm.expand_nodelist("")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingPrerequisite, match="no scontrol on PATH"):
        slurm.expand_nodelist("n[1-2]")


def test_users_own_filters_hide_no_job(play: Play, monkeypatch: pytest.MonkeyPatch):
    (play.folder / "squeue").write_text('#!/bin/sh\n[ -n "$SQUEUE_PARTITION$SLURM_TIME_FORMAT" ] || echo RUNNING\n')
    monkeypatch.setenv("SQUEUE_PARTITION", "another")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert slurm.job_state("12") == "RUNNING"


def test_gpus_asked_for_by_job_or_task_are_asked_for_again():
    assert slurm.flags_of({"TresPerJob": "gres:gpu:4", "NumNodes": "2"}) == {"nodes": "2", "gpus": "4"}
    assert slurm.flags_of({"TresPerTask": "gres/gpu=h100:2"}) == {"gpus-per-task": "h100:2"}


def test_requeue_is_tried_again_and_tells_why_not(play: Play):
    play("scontrol", err="Invalid job id specified for job 99999\n", code=1)
    assert slurm.requeue("99999") == "Invalid job id specified for job 99999"
    assert play.calls("scontrol") == ["requeue 99999"] * slurm.REQUEUE_TRIES
    play("scontrol")
    assert slurm.requeue("12") is None


ENDING = "JobId=1 JobState={} Reason=None Requeue=1 Restarts=0 StartTime={} EndTime=2026-11-25T21:05:31 PreemptTime={}"


@pytest.mark.parametrize(
    ("state", "started", "preempted", "ending"),
    [  # as scontrol showed it to a task that had just got SIGTERM, at 21:05:31
        ("COMPLETING", "2026-11-25T21:05:29", "2026-11-25T21:05:31", Ending.PREEMPTED),  # PreemptMode=CANCEL, no grace
        ("PREEMPTED", "2026-11-25T21:05:29", "2026-11-25T21:05:31", Ending.PREEMPTED),  # all but over
        ("COMPLETING", "2026-11-25T21:05:29", "None", Ending.CANCELLED),
        ("COMPLETING", "2026-11-25T21:05:29", "2026-11-25T20:58:00", Ending.CANCELLED),  # that was an earlier start
    ],
)
def test_preemption_that_cancels_is_no_scancel(play: Play, state: str, started: str, preempted: str, ending: Ending):
    play("scontrol", ENDING.format(state, started, preempted) + "\n")
    assert slurm.why_ending(slurm.job_facts("1"), restarts=0) is ending


@pytest.mark.parametrize("signal", ["SIGUSR2", "SIGTERM", None])
def test_what_a_preemption_cancelled_is_left_to_the_successor(signal: str | None):
    said = Outcome(cause="signalled", exit_code=75, step=9, checkpoint="step-9", message="warned")
    assert next_move(said, signal, Ending.PREEMPTED) is Move.LEAVE


def test_refusal_is_one_line():
    said = "sbatch: error: invalid partition specified: nope\n"
    said += "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    words = "invalid partition specified: nope; Batch job submission failed: Invalid partition name specified"
    assert slurm.refusal(said) == words
    assert slurm.refusal("") == "no reason given"


def test_flags_that_ask_for_what_a_job_has():
    facts = {
        "NumNodes": "2", "Partition": "main", "Account": "research", "QOS": "normal", "TimeLimit": "1-00:00:00",
        "Features": "(null)", "ExcNodeList": "n[3-4]", "CPUs/Task": "24", "MinMemoryCPU": "2000M",
        "TresPerNode": "gres:gpu:h100:8", "Licenses": "(null)", "JobName": "x", "OverSubscribe": "NO",
    }  # fmt: skip
    assert slurm.flags_of(facts) == {
        "nodes": "2", "partition": "main", "account": "research", "qos": "normal", "time": "1-00:00:00",
        "exclude": "n[3-4]", "cpus-per-task": "24", "mem-per-cpu": "2000M", "gres": "gpu:h100:8", "exclusive": True,
    }  # fmt: skip
    assert slurm.flags_of({"TresPerNode": "gres/gpu:4,gres/shard:2"}) == {"gres": "gpu:4,shard:2"}  # Slurm 24
    assert slurm.flags_of({}) == {}


TASK = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_JOB_NUM_NODES": "3", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_NODELIST": "n[1-3]",
}  # fmt: skip


def test_each_start_of_a_job_has_its_own_name():
    first, second = read_allocation(TASK), read_allocation(TASK | {"SLURM_RESTART_COUNT": "1"})
    assert first and second
    assert (first.start, second.start) == ("12.0.0", "12.1.0")
    assert (first.nodes, first.node_rank, first.nodelist) == (2, 1, "n[1-2]")


def test_local_attempt_inside_a_slurm_job_stays_local():
    assert read_allocation(TASK | {"SUBMITIT_EXECUTOR": "local"}) is None
    assert read_allocation({"SLURM_JOB_ID": "12"}) is None


def test_loopback_is_no_meeting_place():
    with pytest.raises(EncdecError, match="GLOO_SOCKET_IFNAME"):
        interface_of(address_towards("localhost"))


def test_jobs_of_one_node_look_at_different_ports():
    assert free_port(12) != free_port(13)


def test_slurm_flags_are_passed_on_and_ask_for_slurm():
    arguments = parse_submit(["--phase", "medium", "--time", "1-12:30", "--qos", "long"])
    assert arguments.sbatch == {"time": "1-12:30", "qos": "long"}
    assert arguments.cluster == "slurm"
    assert parse_submit(["--phase", "medium"]).wait is None
    for wrong in (["--time", "soon"], ["--cpus-per-task", "0"], ["--cluster", "local", "--partition", "main"]):
        with pytest.raises(ConfigError):
            parse_submit(["--phase", "medium", *wrong])
