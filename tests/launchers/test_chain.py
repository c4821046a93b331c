"""Chains without a cluster: which phases are asked for, what a gate opens, and what a job says and does at one."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from encdec.errors import ConfigError, ExitCode, GateNotPassed
from encdec.files import RunPaths, atomic_write_json
from encdec.gates import Evidence
from encdec.records import JobRecord, JsonLinesWriter, Outcome, read_json_lines
from encdec.training.execution import StartingPoint, TrainingPhase
from encdec.training.promotion import GateFile, Origin, gate_path, require_passed
from encdec.training.run_config import RunConfig
from launchers import slurm
from launchers.arguments import parse_submit
from launchers.chain import Asked, asked
from launchers.chain_file import label, later_phases, runs_of, write_chain
from launchers.control import cancel
from launchers.names import find_run, find_runs, runs_under
from launchers.nodes.allocation import Allocation
from launchers.nodes.chain import next_phase_here, take_along
from launchers.nodes.continuation import Continuation
from launchers.nodes.outcomes import DEADLINE
from launchers.ready import Start
from launchers.start import note_chain, take_back
from launchers.views import show
from launchers.views.overview import look
from tests.conftest import MICRO
from tests.launchers.conftest import Play

SANITY, VALIDATION, MEDIUM, FULL = TrainingPhase


def ask(*flags: str) -> Asked:
    return asked(parse_submit(["--config", str(MICRO), *flags]))


# (flags, phases in order)
PHASES = {
    "the first alone": (["--phase", "sanity_check"], [SANITY]),
    "a later one: those before it first": (["--phase", "medium"], [SANITY, VALIDATION, MEDIUM]),
    "through": (["--phase", "validation", "--through", "full"], [SANITY, VALIDATION, MEDIUM, FULL]),
    "through itself": (["--phase", "validation", "--through", "validation"], [SANITY, VALIDATION]),
    "from weights": (["--phase", "medium", "--from-weights", "owner/name"], [MEDIUM]),
    "from weights, through": (
        ["--phase", "medium", "--through", "full", "--from-weights", "owner/name"],
        [MEDIUM, FULL],
    ),
}


@pytest.mark.parametrize("case", PHASES)
def test_phases_that_are_asked_for(case: str):
    flags, phases = PHASES[case]
    wanted = ask(*flags)
    assert [link.phase for link in wanted.links] == phases
    assert (wanted.root is None) == (len(phases) == 1)
    for before, link in zip(wanted.links, wanted.links[1:], strict=False):
        assert link.run.starts_from == StartingPoint("gate", str(before.paths.root), before.run.identity)
        assert link.paths.root == (wanted.root or Path()) / link.phase


def test_plan_of_a_scale_of_the_pipeline_names_no_bounds_that_nobody_set(capsys: pytest.CaptureFixture[str]):
    plan = ask("--phase", "sanity_check").links[0].plan("local", "asked for")
    show.plan(plan, continues=False)
    usual = capsys.readouterr().out
    assert "the loss falls by at least 0.2" in usual and "would allow" in usual
    show.plan(replace(plan, min_loss_decrease=-1e9, max_loss_after_warmup=1e9, steps_by_tokens=2**50), continues=False)
    out = capsys.readouterr().out
    assert "all steps are done; gates" in out and "tokens set no bound" in out


def test_through_names_a_later_phase():
    with pytest.raises(ConfigError, match="--phase medium --through validation"):
        ask("--phase", "medium", "--through", "validation")


def test_name_and_directory_are_the_chains(tmp_path: Path):
    wanted = ask("--phase", "validation", "--name", "big", "--run-dir", str(tmp_path / "x"))
    assert [link.run.name for link in wanted.links] == ["big.sanity_check", "big.validation"]
    assert wanted.root == tmp_path / "x"
    alone = ask("--phase", "sanity_check", "--name", "big").links[0]
    assert (alone.run.name, alone.paths.root.name) == ("big", "big")


def test_one_phases_numbers_are_none_of_the_others_identity():
    usual, other = (ask("--phase", "medium", *extra) for extra in ([], ["--set", "phases.validation.save_steps=7"]))
    same = [a.run.identity == b.run.identity for a, b in zip(usual.links, other.links, strict=True)]
    assert same == [True, False, False]  # medium starts from another validation


def test_number_of_nodes_is_no_part_of_the_evidence_where_the_global_batch_is_given():
    one, four = (ask("--phase", "validation", "--nodes", nodes) for nodes in ("1", "4"))
    assert [link.run.identity for link in one.links] == [link.run.identity for link in four.links]
    assert one.root == four.root


def test_each_phase_has_an_order_of_samples_of_its_own():
    seeds = [link.run.data_seed for link in ask("--phase", "full").links]
    assert len(set(seeds)) == 4 and seeds[0] == ask("--phase", "sanity_check").links[0].run.config.training.seed


# ---- weights that a person gives


def test_weights_may_be_a_checkpoint_a_run_a_model_directory_or_a_hub_id(tmp_path: Path):
    folder = tmp_path / "run" / "checkpoints" / "step-20"
    (folder.parent / "step-3").mkdir(parents=True)
    folder.mkdir()
    atomic_write_json(folder / "manifest.json", {"digest": "ab"})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for word, source, identity in (
        (str(folder), str(folder), "checkpoint ab"),
        (str(tmp_path / "run"), str(folder), "checkpoint ab"),
        (str(tmp_path / "model"), str(tmp_path / "model"), str(tmp_path / "model")),
        ("owner/name", "owner/name", "owner/name"),
    ):
        run = ask("--phase", "medium", "--from-weights", word).links[0].run
        assert run.starts_from == StartingPoint("weights", source, identity)


def test_checkpoint_to_resume_is_a_folder_or_a_runs_newest_one(tmp_path: Path):
    folder = tmp_path / "run" / "checkpoints" / "step-20"
    folder.mkdir(parents=True)
    atomic_write_json(folder / "manifest.json", {"step": 20, "digest": "ab"})
    for word in (folder, tmp_path / "run"):
        wanted = ask("--phase", "validation", "--resume", str(word))
        assert [link.phase for link in wanted.links] == [VALIDATION]
        assert wanted.links[0].run.starts_from == StartingPoint("checkpoint", str(folder), "checkpoint ab")


# (flags after --resume, words of the refusal)
NOT_RESUMED = {
    "nothing": (["nowhere"], "--resume must be auto, never, or name"),
    "a model": (["model"], "--resume must be auto, never, or name"),
    "a damaged manifest": (["damaged"], "manifest must be readable"),
    "the end": (["end"], "step 40 of 40"),
    "weights, too": (["end", "--from-weights", "owner/name"], "Leave one of them out"),
}


@pytest.mark.parametrize("case", NOT_RESUMED)
def test_other_checkpoints_are_not_resumed(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, file, content in (
        ("model", "config.json", "{}"),
        ("damaged", "manifest.json", "{"),
        ("end", "manifest.json", '{"step": 40, "digest": "ab"}'),
    ):
        Path(name).mkdir()
        Path(name, file).write_text(content)
    flags, words = NOT_RESUMED[case]
    with pytest.raises(ConfigError, match=words):
        ask("--phase", "validation", "--resume", *flags)


@pytest.mark.parametrize("word", ["nowhere", "/nowhere/at/all", ".", "runs/mistyped"])
def test_other_weights_are_refused(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(ConfigError, match="--from-weights must name"):
        ask("--phase", "medium", "--from-weights", word)


# ---- a chain on disk


def gate(run: RunConfig, *, passed: bool = True) -> GateFile:
    assert run.phase is not None
    fall = Evidence("loss_decreasing", "loss_decrease", 0.1, 0.5, ">=", True, "means", passed)
    return GateFile(
        phase=run.phase.phase, passed=passed, identity=run.identity, step=60, checkpoint="step-60",
        weights_digest="cd" * 32, first_loss=7.0, last_loss=5.0, time=time.time(), evidence=[fall],
    )  # fmt: skip


@pytest.fixture
def chain(tmp_path: Path) -> Asked:
    """sanity_check -> validation -> medium, made and not started."""
    wanted = ask("--phase", "medium", "--run-dir", str(tmp_path / "runs" / "c1"))
    for link in wanted.links:
        link.paths.make()
        link.paths.submitit.mkdir()
        link.run.write(link.paths.run_yaml)
    write_chain(
        tmp_path / "runs" / "c1", {link.phase: link.paths.root for link in wanted.links}, in_one_allocation=False
    )
    return wanted


def test_chain_is_found_by_name_and_by_phase(chain: Asked, tmp_path: Path):
    root = tmp_path / "runs"
    sanity, validation, medium = (link.paths for link in chain.links)
    assert [label(paths) for paths in runs_under(root)] == ["c1/sanity_check", "c1/validation", "c1/medium"]
    assert find_runs("c1", root) == [sanity, validation, medium]
    assert find_runs("c1/validation", root) == [validation]
    assert find_runs("c1/v", root) == [validation]
    assert find_runs(str(root / "c1"), Path("elsewhere")) == [sanity, validation, medium]
    assert find_run("c1", root) == sanity
    validation.claim_attempt()
    assert find_run("c1", root) == validation
    assert later_phases(sanity) == {VALIDATION: validation, MEDIUM: medium} and later_phases(medium) == {}


def test_later_submission_adds_phases_and_forgets_none(chain: Asked):
    assert chain.root is not None
    RunPaths(chain.root / "full").make()
    write_chain(chain.root, {FULL: chain.root / "full"}, in_one_allocation=True)
    assert list(runs_of(chain.root)) == [SANITY, VALIDATION, MEDIUM, FULL]


def test_damage_in_another_run_proves_nothing_and_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    alone = ask("--phase", "sanity_check").links[0]
    alone.paths.make()
    gate(alone.run).write(alone.paths)
    file = gate_path(alone.paths, SANITY)
    file.write_text("{")
    other = ask("--phase", "validation").links[0]
    assert other.paths.root != alone.paths.root
    file.unlink()
    file.mkdir()
    assert ask("--phase", "validation").links[0].paths.root == other.paths.root
    healthy = tmp_path / "runs" / "chain-zz" / "sanity_check"
    RunPaths(healthy).make()
    gate(alone.run).write(RunPaths(healthy))
    assert ask("--phase", "validation").links[0].paths.root == healthy


def test_first_phase_that_was_run_alone_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    alone = ask("--phase", "sanity_check").links[0]
    alone.paths.make()
    gate(alone.run, passed=False).write(alone.paths)
    assert ask("--phase", "validation").links[0].paths.root != alone.paths.root
    gate(alone.run).write(alone.paths)
    wanted = ask("--phase", "validation")
    assert [link.passed for link in wanted.links] == [True, False]
    assert wanted.links[0].paths.root == alone.paths.root
    assert wanted.links[1].run.starts_from == StartingPoint("gate", str(alone.paths.root), alone.run.identity)


# what happened to the evidence -> words of the refusal; None: it opens
EVIDENCE = {
    "passed": (lambda file: file, None),
    "none": (lambda file: None, "no verdict"),
    "of another configuration": (lambda file: replace(file, identity="ff"), "another configuration"),
    "closed": (lambda file: replace(file, passed=False), "closed by loss_decreasing: loss_decrease 0.1"),
    "without a checkpoint": (lambda file: replace(file, checkpoint=None), "closed by"),
    "without a digest": (lambda file: replace(file, weights_digest=None), "closed by"),
}


@pytest.mark.parametrize("case", EVIDENCE)
def test_phase_starts_only_on_evidence(case: str, chain: Asked):
    change, words = EVIDENCE[case]
    first, second = chain.links[:2]
    file = change(gate(first.run, passed=case != "closed"))
    if file:
        file.write(first.paths)
    start = second.run.starts_from
    assert start is not None
    if words is None:
        assert require_passed(start, second.phase).checkpoint == "step-60"
        return
    with pytest.raises(GateNotPassed, match=words) as caught:
        require_passed(start, second.phase)
    assert caught.value.exit_code == ExitCode.GATE_NOT_PASSED
    assert "validation starts only from weights that have passed the gate of sanity_check" in str(caught.value)


# ---- its jobs


def queued(link_paths: RunPaths, job: str) -> None:
    atomic_write_json(link_paths.job, JobRecord(submission="ab", job=job, submitted=1000.0).to_json())
    (link_paths.submitit / f"{job}_submitted.pkl").write_bytes(b"carried")
    link_paths.sbatch.write_text("#!/bin/bash\n")


def start_of(job: str, paths: RunPaths) -> Continuation:
    return Continuation(paths, Allocation(job=job, restarts=0, start=f"{job}.0.0", nodes=1, node_rank=0, nodelist="n1"))


def test_job_that_begins_at_a_closed_gate_ends_the_chain(chain: Asked, play: Play):
    sanity, validation, medium = (link.paths for link in chain.links)
    for paths, job in ((sanity, "11"), (validation, "12"), (medium, "13")):
        queued(paths, job)
    gate(chain.links[0].run, passed=False).write(sanity)
    play("squeue", "11|COMPLETED|None|N/A\n13|PENDING|Dependency|N/A\n")
    play("scancel")
    declined = start_of("12", validation).decline()
    assert declined is not None and declined.exit_code == ExitCode.GATE_NOT_PASSED
    assert "the gate of sanity_check: closed by loss_decreasing" in declined.reason
    assert play.calls("scancel") == ["13"]
    [word] = [record["why"] for record in read_json_lines(medium.events)]
    assert "validation ended before it" in word and "loss_decreasing" in word


def test_job_that_begins_too_early_waits_for_the_job_that_goes_on(chain: Asked, play: Play):
    """The phase before is continued by a job that this one did not wait for."""
    sanity, validation = (link.paths for link in chain.links[:2])
    queued(sanity, "11")
    queued(validation, "12")
    atomic_write_json(sanity.continuation, {"job": "11", "successor": "15"})
    play("squeue", "11|TIMEOUT|None|N/A\n15|RUNNING|None|N/A\n")
    play("sbatch", "16\n")
    declined = start_of("12", validation).decline()
    assert declined is not None and (declined.exit_code, declined.reason) == (0, "job 16 begins after 15")
    [call] = play.calls("sbatch")
    assert "--dependency=afterany:15" in call
    assert '"job": "16"' in validation.job.read_text()
    assert (validation.submitit / "16_submitted.pkl").read_bytes() == b"carried"


def test_phase_that_has_begun_asks_for_no_gate_again(chain: Asked, play: Play):
    validation = chain.links[1].paths
    queued(validation, "12")
    origin = Origin(kind="gate", source="x", proved=True, weights_digest="ab", first_loss=7.0)
    atomic_write_json(validation.origin, origin.to_json())
    assert start_of("12", validation).decline() is None


def test_next_phase_waits_for_a_successor_too(chain: Asked, play: Play):
    sanity, validation = (link.paths for link in chain.links[:2])
    queued(sanity, "11")
    queued(validation, "12")
    play("sbatch", "15\n")
    play("scontrol", "JobId=11 JobState=RUNNING\n")
    number = sanity.claim_attempt()
    with JsonLinesWriter(sanity.attempt(number).events("node-0")) as ledger:
        start_of("11", sanity).warned("SIGUSR2", ledger)
    assert "update jobid=12 dependency=afterany:11:15" in play.calls("scontrol")


@pytest.mark.parametrize(
    ("cause", "code", "ends"), [("gate", 3, True), ("crash", 1, True), ("refused", 78, True), ("complete", 0, False)]
)
def test_attempt_that_nothing_follows_takes_the_later_phases_out_of_the_queue(
    cause: str, code: int, ends: bool, chain: Asked, play: Play
):
    sanity, validation, medium = (link.paths for link in chain.links)
    for paths, job in ((sanity, "11"), (validation, "12"), (medium, "13")):
        queued(paths, job)
    play("squeue", "12|PENDING|Dependency|N/A\n13|PENDING|Dependency|N/A\n")
    play("scancel")
    number = sanity.claim_attempt()
    outcome = Outcome(cause=cause, exit_code=code, step=3, checkpoint=None, message="said so")
    with JsonLinesWriter(sanity.attempt(number).events("node-0")) as ledger:
        start_of("11", sanity).end(outcome, None, ledger)
    assert play.calls("scancel") == (["13", "12"] if ends else [])


def test_status_says_what_a_phase_waits_for_and_why_it_never_started(chain: Asked, play: Play):
    sanity, validation, medium = (link.paths for link in chain.links)
    queued(validation, "12")
    queued(medium, "11")
    play("squeue", "11|RUNNING|None|N/A\n12|PENDING|Dependency|N/A\n")
    words = [view.standing.words for view in look([sanity, validation, medium], forgiving=False)]
    assert words == [
        "not started",
        "job 12 is PENDING (Dependency), after sanity_check",
        "waits for validation in job 11, which is RUNNING",  # one job for the whole chain
    ]
    play("squeue", "12|CANCELLED|None|N/A\n")
    with JsonLinesWriter(validation.events) as ledger:
        ledger.write({"event": "not_started", "time": 2000.0, "why": "sanity_check ended before it: bad"})
    [view] = look([validation], forgiving=False)
    assert (view.standing.state, view.standing.words) == ("blocked", "not started: sanity_check ended before it: bad")


def test_chain_that_lives_is_extended_and_stays_as_it_was_cut(chain: Asked, play: Play):
    assert chain.root is not None
    (chain.root / "chain.json").unlink()
    *first, last = chain.links
    write_chain(chain.root, {link.phase: link.paths.root for link in first}, in_one_allocation=True)
    queued(chain.links[0].paths, "11")
    play("squeue", "RUNNING\n")
    starts = [Start(link.paths, link.run, link.plan("slurm", ""), fresh=link is last) for link in chain.links]
    assert note_chain(starts, starts, chain.root, in_one=False) is True
    assert list(runs_of(chain.root)) == [SANITY, VALIDATION, MEDIUM]
    play("squeue", "COMPLETED\n")
    assert note_chain(starts, starts, chain.root, in_one=False) is False


def test_phase_whose_job_runs_an_earlier_one_is_cancelled_without_that_job(chain: Asked, play: Play):
    """The job may be in the middle of a save."""
    assert chain.root is not None
    sanity, _, medium = (link.paths for link in chain.links)
    write_chain(chain.root, {}, in_one_allocation=True)
    for link in chain.links:
        queued(link.paths, "11")
    play("squeue", "11|RUNNING|None|N/A\n")
    play("scancel")
    sanity.claim_attempt()
    [said] = cancel(medium, now=False)
    assert "the job that runs c1/sanity_check comes to it no more" in said
    assert medium.stop_request.exists() and play.calls("scancel") == []


def test_successor_takes_the_later_phases_along_in_a_chain_that_is_one_job(chain: Asked, play: Play):
    assert chain.root is not None
    sanity, validation, medium = (link.paths for link in chain.links)
    write_chain(chain.root, {}, in_one_allocation=True)
    for paths in (sanity, validation, medium):
        queued(paths, "11")
    take_along(sanity, "15")
    assert [json.loads(paths.job.read_text())["job"] for paths in (sanity, validation, medium)] == ["11", "15", "15"]


RUNNING = "JobState=RUNNING Restarts=0 StartTime=2026-01-01T00:00:00 EndTime=2026-01-01T01:00:00"
CANCELLED = RUNNING.replace("RUNNING", "CANCELLED")
# (what the agent of the phase before heard, what Slurm says of the job) -> (the next phase begins, the job is requeued)
ASKED_TO_STOP = {
    "not": (None, RUNNING, True, False),
    "warned": ("SIGUSR2", RUNNING, False, True),
    "the time is up": (DEADLINE, RUNNING, False, True),
    "cancelled": ("SIGTERM", CANCELLED, False, False),
    "requeued by somebody": ("SIGTERM", RUNNING.replace("Restarts=0", "Restarts=1"), False, False),
    "Ctrl-C": ("SIGINT", RUNNING, False, False),
}


@pytest.mark.parametrize("case", ASKED_TO_STOP)
def test_phase_that_ends_as_its_job_is_asked_to_stop_is_followed_by_none(
    case: str, chain: Asked, play: Play, monkeypatch: pytest.MonkeyPatch
):
    stop_signal, facts, begins, requeued = ASKED_TO_STOP[case]
    assert chain.root is not None
    sanity, validation = (link.paths for link in chain.links[:2])
    write_chain(chain.root, {}, in_one_allocation=True)
    for link in chain.links:
        queued(link.paths, "11")
    number = sanity.claim_attempt()
    outcome = Outcome(cause="complete", exit_code=0, step=60, checkpoint="step-60", message="done")
    atomic_write_json(sanity.attempt(number).outcome, outcome.to_json())
    gate(chain.links[0].run).write(sanity)
    play("scontrol", f"JobId=11 {facts}\n")
    with JsonLinesWriter(sanity.attempt(number).events("node-0")) as ledger:
        start_of("11", sanity).end(outcome, stop_signal, ledger)
    for name, value in {"SLURM_PROCID": "1", "SLURM_JOB_ID": "11", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)  # any node of this start
    assert next_phase_here(sanity) == (validation if begins else None)
    assert any(call.startswith("requeue") for call in play.calls("scontrol")) == requeued
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the job's next start
    assert next_phase_here(sanity) == validation


def test_run_that_is_given_up_ends_the_chain(chain: Asked, play: Play):
    sanity, validation, medium = (link.paths for link in chain.links)
    for paths, job in ((sanity, "11"), (validation, "12"), (medium, "13")):
        queued(paths, job)
    for _ in range(5):
        number = sanity.claim_attempt()
        outcome = Outcome(cause="crash", exit_code=1, step=0, checkpoint=None, message="died")
        atomic_write_json(sanity.attempt(number).outcome, outcome.to_json())
    play("squeue", "12|PENDING|Dependency|N/A\n13|PENDING|Dependency|N/A\n")
    play("scancel")
    declined = start_of("11", sanity).decline()
    assert declined is not None and declined.exit_code == ExitCode.CRASHED
    assert play.calls("scancel") == ["13", "12"]


def test_job_that_cannot_queue_another_looks_again_itself(chain: Asked, play: Play):
    """Slurm takes no job just now: that closes no gate, and nobody is taken out of the queue."""
    sanity, validation = (link.paths for link in chain.links[:2])
    queued(sanity, "11")
    queued(validation, "12")
    play("squeue", "11|RUNNING|None|N/A\n")
    play("sbatch", err="sbatch: error: QOSMaxSubmitJobPerUserLimit", code=1)
    play("scontrol")
    play("scancel")
    declined = start_of("12", validation).decline()
    assert declined is not None and declined.exit_code == ExitCode.COMPLETE
    assert play.calls("scontrol")[-1] == "requeue 12" and play.calls("scancel") == []
    assert len(play.calls("sbatch")) == slurm.REQUEUE_TRIES


def test_damaged_chain_is_a_line_and_an_empty_one_is_refused(chain: Asked, tmp_path: Path):
    assert chain.root is not None
    (chain.root / "chain.json").write_text('{"phases": ')
    root = tmp_path / "runs"
    [view] = look(runs_under(root), forgiving=True)
    assert view.standing.state == "damaged"
    (chain.root / "chain.json").write_text('{"phases": {}}')
    with pytest.raises(ConfigError, match="A run must be one of those"):
        find_runs("c1", root)


def test_directory_of_a_run_is_no_chains(chain: Asked, tmp_path: Path):
    with pytest.raises(ConfigError, match="which is a run itself"):
        ask("--phase", "validation", "--run-dir", str(chain.links[0].paths.root))


def test_refused_submission_leaves_no_piece_of_a_chain(chain: Asked, play: Play):
    assert chain.root is not None
    starts = [Start(link.paths, link.run, link.plan("slurm", ""), fresh=True) for link in chain.links]
    take_back(starts)
    assert not chain.root.exists()
