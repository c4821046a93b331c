"""Chains on this machine, for real: weights are handed on, a phase is continued, a closed gate ends the chain."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from encdec.checkpoints.manifest import manifest_digest, verify
from encdec.checkpoints.payload import open_weights
from encdec.checkpoints.weights import digest_weights
from encdec.errors import CheckpointError
from encdec.files import RunPaths
from encdec.records import read_json_lines
from encdec.training.execution import StartingPoint, TrainingPhase
from encdec.training.origin import require_sound
from encdec.training.promotion import GateFile, Origin, read_gate, read_origin
from tests.conftest import Lab, kill_everything, losses, wait_for_step, wait_until

CHAIN = ("--phase", "sanity_check", "--through", "validation", "--cluster", "local")


def submit_chain(lab: Lab, root: Path, *extra: str) -> tuple[int, str]:
    return lab.run("launchers.submit", *CHAIN, "--run-dir", str(root), *lab.arguments(*extra))


def plain(output: str) -> str:
    """What was printed, without boxes and line ends."""
    return " ".join(output.replace("│", " ").split())


def verdict(root: Path, phase: str) -> GateFile:
    gate = read_gate(RunPaths(root / phase), TrainingPhase(phase))
    assert gate is not None
    return gate


def origin_of(root: Path) -> Origin:
    origin = read_origin(RunPaths(root))
    assert origin is not None
    return origin


@pytest.fixture(scope="module")
def chain(session_folder: Path) -> Path:
    """sanity_check -> validation, undisturbed."""
    root = session_folder / "chain"
    code, output = submit_chain(Lab(session_folder, session_folder / "packed"), root)
    assert code == 0, output
    return root


def test_weights_that_passed_the_gate_are_handed_on(chain: Path, lab: Lab):
    before, after = verdict(chain, "sanity_check"), verdict(chain, "validation")
    folder = chain / "sanity_check" / "checkpoints" / str(before.checkpoint)
    judged = open_weights(folder, verify(folder))
    origin = origin_of(chain / "validation")
    assert before.weights_digest == digest_weights(judged) == origin.weights_digest != after.weights_digest
    assert (origin.proved, origin.source) == (True, str(folder))
    # the loss falls from the chain's first steps on, and goes on where the phase before ended
    assert before.first_loss == after.first_loss == origin.first_loss
    [fall] = [item for item in after.evidence if item.metric == "loss_decrease"]
    assert fall.value == pytest.approx((after.first_loss or 0) - (after.last_loss or 0))
    first = losses(RunPaths(chain / "validation"))[1]
    assert abs(first - (before.last_loss or 0)) < 0.5 < (before.first_loss or 0) - first
    code, output = submit_chain(lab, chain)
    assert code == 0 and "nothing left to do" in output
    assert RunPaths(chain / "validation").attempt_numbers() == [0]


def test_phase_killed_at_any_time_ends_as_the_undisturbed_one(chain: Path, lab: Lab):
    root = lab.root / "chain"
    process = lab.start("launchers.submit", *CHAIN, "--run-dir", str(root), *lab.arguments())
    paths = RunPaths(root / "validation")
    wait_until(lambda: paths.attempt(0).steps.exists(), "the second phase begins")
    wait_for_step(paths, 15)
    kill_everything(paths)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 3)
    code, output = submit_chain(lab, root)
    assert code == 0, output
    twin = RunPaths(chain / "validation")
    assert losses(paths) == losses(twin)
    assert verdict(root, "validation").weights_digest == verdict(chain, "validation").weights_digest
    assert lab.digest(paths.checkpoints / "step-40") == lab.digest(twin.checkpoints / "step-40")


def test_closed_gate_ends_the_chain_and_the_same_command_says_so_again(lab: Lab):
    root = lab.root / "chain"
    strict = ("--set", "phases.sanity_check.min_loss_decrease=9")
    for _ in range(2):
        code, output = submit_chain(lab, root, *strict)
        assert code == 3, output
        assert "gate not passed: loss_decreasing: loss_decrease" in plain(output)
        assert RunPaths(root / "validation").attempt_numbers() == []
    closed = verdict(root, "sanity_check")
    assert not closed.passed and [item.gate for item in closed.failures] == ["loss_decreasing"]
    code, output = lab.run("launchers.status", "--root", str(lab.root), "chain")
    assert code == 0
    assert "closed: loss_decreasing" in output and "not started" in output


def test_chain_in_the_background_is_one_job(lab: Lab, chain: Path):
    root = lab.root / "chain"
    code, output = submit_chain(lab, root, "--no-wait")
    assert code == 0, output
    last = RunPaths(root / "validation")
    wait_until(lambda: last.attempt(0).outcome.exists(), "the last phase has ended")
    assert json.loads(last.attempt(0).outcome.read_text())["cause"] == "complete"
    assert losses(last) == losses(RunPaths(chain / "validation"))
    pids = {
        json.loads(RunPaths(root / p).attempt(0).process.read_text())["pid"] for p in ("sanity_check", "validation")
    }
    assert len(pids) == 1


def test_given_weights_start_a_phase_without_proof(lab: Lab, chain: Path):
    """A checkpoint, and the same weights as a model directory."""
    checkpoint = chain / "sanity_check" / "checkpoints" / "step-60"
    model = lab.root / "model"
    code, output = lab.run("encdec.checkpoints", "export", str(checkpoint), str(model))
    assert code == 0, output
    first = {}
    for source in (checkpoint, model):
        root = lab.root / f"from-{source.name}"
        arguments = ("--phase", "medium", "--cluster", "local", "--run-dir", str(root), "--from-weights", str(source))
        code, output = lab.run("launchers.submit", *arguments, *lab.arguments("--set", "training.num_train_steps=10"))
        assert code == 3, output  # so few steps do not make the loss fall as the phase asks
        assert "unproved" in output
        assert not origin_of(root).proved
        assert any(record["event"] == "unproved" for record in read_json_lines(RunPaths(root).events))
        first[source] = losses(RunPaths(root))[1]
    assert first[checkpoint] == first[model]
    assert origin_of(lab.root / "from-step-60").weights_digest == origin_of(lab.root / "from-model").weights_digest


def test_other_checkpoint_under_the_same_name_starts_nothing(chain: Path):
    folder = chain / "sanity_check" / "checkpoints" / "step-60"
    start = StartingPoint.at_checkpoint("weights", folder, manifest_digest(folder))
    require_sound(folder, None, start)
    with pytest.raises(CheckpointError, match=r"another one in .*step-60 now"):
        require_sound(folder, None, replace(start, identity="checkpoint 00"))


def test_run_continues_from_a_checkpoint_of_another_one(lab: Lab, chain: Path):
    """With its weights, optimizer, step and place in the data: the same losses as that one's own."""
    source, root = chain / "sanity_check", lab.root / "resumed"
    first = min(source.glob("checkpoints/step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))
    begin = int(first.name.removeprefix("step-"))
    where = ("--phase", "sanity_check", "--cluster", "local", "--run-dir", str(root), "--resume", str(first))
    code, output = lab.run("launchers.submit", *where, *lab.arguments())
    assert code == 0, output
    assert "unproved" in output
    expected = losses(RunPaths(source))
    assert begin < 60 and losses(RunPaths(root)) == {step: expected[step] for step in range(begin + 1, 61)}
    assert (origin_of(root).kind, origin_of(root).proved) == ("checkpoint", False)
    digests = [
        json.loads((each / "gates" / "sanity_check.json").read_text())["weights_digest"] for each in (source, root)
    ]
    assert digests[0] == digests[1]
    code, output = lab.run("launchers.submit", *where, *lab.arguments("--set", f"training.num_train_steps={begin}"))
    assert code == 78 and f"step {begin} of {begin}" in plain(output)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"weights_digest": "00" * 32}, 78, "starts from the weights that were judged"),
        ({"identity": "00" * 32}, 3, "a verdict on another configuration"),
    ],
)
def test_weights_other_than_those_that_were_judged_start_nothing(change, code: int, words: str, lab: Lab, chain: Path):
    root = lab.root / "chain"
    shutil.copytree(chain / "sanity_check", root / "sanity_check")
    file = root / "sanity_check" / "gates" / "sanity_check.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    arguments = ("--phase", "validation", "--cluster", "local", "--run-dir", str(root))
    ended, output = lab.run("launchers.submit", *arguments, *lab.arguments())
    assert (ended, words in plain(output)) == (code, True), output
    assert losses(RunPaths(root / "validation")) == {}


def test_lost_weights_are_made_again_as_the_refusal_says(lab: Lab, chain: Path):
    root = lab.root / "chain"
    shutil.copytree(chain / "sanity_check", root / "sanity_check")
    first = RunPaths(root / "sanity_check")
    shutil.rmtree(first.checkpoints / "step-60")
    code, output = submit_chain(lab, root)
    assert code == 78, output
    assert "The weights that passed the gate of sanity_check must be there" in plain(output)
    (first.gates / "sanity_check.json").unlink()
    code, output = submit_chain(lab, root)
    assert code == 0, output
    assert verdict(root, "validation").weights_digest == verdict(chain, "validation").weights_digest
    assert len(first.attempt_numbers()) == 2  # the second from its newest checkpoint
