"""Gates in the training loop: which is judged when, on what, and what a closed one comes to."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from encdec.errors import ConfigError
from encdec.files import RunPaths
from encdec.gates import LOOP_METRICS, GateLevel, ValidationGate
from encdec.records import read_json_lines
from encdec.training.config import FullConfig
from encdec.training.execution import TrainingPhase
from encdec.training.gatekeeper import Gatekeeper, not_finite
from encdec.training.run_config import read_run_config, resolve_run
from encdec.training.state import LossHistory
from tests.conftest import MICRO, Lab
from tests.encdec.training.engine_lab import Made
from tests.encdec.training.poison_lab import SIGNAL, Run

QUICK, STANDARD = GateLevel.QUICK, GateLevel.STANDARD
BOTH = (QUICK, STANDARD)


def keeper(levels=BOTH, *custom: ValidationGate, warmup_steps: int = 10) -> Gatekeeper:
    return Gatekeeper(levels, custom, every=100, warmup_steps=warmup_steps)


def losses(*values: float) -> LossHistory:
    history = LossHistory(1000)
    for value in values:
        history.add(value)
    return history


@pytest.mark.parametrize(
    ("levels", "step", "checkpoint", "owed"),
    [
        (BOTH, 100, False, [QUICK]),
        (BOTH, 99, False, []),
        (BOTH, 50, True, [STANDARD]),
        (BOTH, 200, True, [QUICK, STANDARD]),
        (BOTH, 0, True, []),
        (BOTH, 10, True, []),  # the last step of warm-up
        (BOTH, 11, True, [STANDARD]),
        ((QUICK,), 50, True, []),
        ((STANDARD,), 100, False, []),
        ((), 100, True, []),
    ],
)
def test_what_is_owed(levels, step: int, checkpoint: bool, owed: list[GateLevel]):
    assert keeper(levels).owed(step, checkpoint=checkpoint) == owed


def test_a_step_owes_its_gates_until_they_have_passed_also_after_a_restart():
    made = keeper()
    assert made.owed(100, checkpoint=True) == [QUICK, STANDARD]
    again = keeper()
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again.owed(100, checkpoint=True) == [QUICK, STANDARD]
    again.passed(100, BOTH)
    third = keeper()
    third.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert third.owed(100, checkpoint=True) == []
    assert third.last_passed == 100


# gate -> what is measured, with a near miss: (losses, gradient norms, evaluation), passed
CASES: list[tuple[GateLevel, str, list[float], list[float], dict[str, float], bool]] = [
    (QUICK, "loss_reasonable", [99.9] * 60, [], {}, True),
    (QUICK, "loss_reasonable", [100.0] * 60, [], {}, False),
    (QUICK, "loss_reasonable", [4.0] * 59 + [4000.0], [], {}, True),  # one batch is no verdict
    (QUICK, "loss_reasonable", [4.0] * 59 + [5000.0], [], {}, False),
    (STANDARD, "loss_reasonable", [9.9] * 60, [1.0], {}, True),
    (STANDARD, "loss_reasonable", [10.0] * 60, [1.0], {}, False),
    (STANDARD, "gradient_norm", [4.0], [199.0, 0.5], {}, True),
    (STANDARD, "gradient_norm", [4.0], [199.0, 1.0], {}, False),
    (STANDARD, "gradient_norm", [4.0], [], {}, False),  # nobody measured it
    (STANDARD, "perplexity", [math.log(999.0)] * 60, [1.0], {}, True),
    (STANDARD, "perplexity", [math.log(1001.0)] * 60, [1.0], {}, False),
    (STANDARD, "perplexity", [9.0] * 60, [1.0], {"loss": 6.0, "perplexity": 403.0}, True),  # the evaluation counts
    (STANDARD, "perplexity", [4.0] * 60, [1.0], {"loss": 7.0, "perplexity": 1096.0}, False),
]


@pytest.mark.parametrize(("level", "gate", "values", "norms", "evaluation", "passed"), CASES)
def test_verdicts(level, gate: str, values, norms, evaluation, passed: bool):
    made = keeper()
    for norm in norms:
        made.after_step(50, norm, 1e3)
    report = made.judge(level, 100, losses(*values), evaluation)
    assert {item.gate: item.passed for item in report.evidence}[gate] is passed
    if gate == "perplexity":
        source = next(item.measured for item in report.evidence if item.gate == gate)
        assert source.startswith("evaluation at step 100" if evaluation else "exp of the mean training loss")


def test_gradient_norms_count_from_the_last_check_and_from_the_end_of_warm_up():
    made = keeper()
    made.after_step(10, 1e6, 1e3)
    made.after_step(11, 3.0, 1e3)
    made.after_step(12, 5.0, 1e3)

    def norm(step: int) -> float | None:
        report = made.judge(STANDARD, step, losses(4.0), {})
        return next(item.value for item in report.evidence if item.gate == "gradient_norm")

    assert norm(12) == 4.0
    made.passed(12, [QUICK])
    assert norm(12) == 4.0
    made.passed(12, [STANDARD])
    made.after_step(13, 7.0, 1e3)
    assert norm(13) == 7.0


def test_numbers_that_are_none_close_no_nan_whatever_is_configured():
    report = not_finite(1, "loss inf at step 7")
    assert [item.line() for item in report.failures] == ["no_nan: nan_count 1, must be <= 0"]
    assert report.failures[0].measured == "loss inf at step 7"


def test_custom_gate_takes_the_place_of_a_row_after_warm_up():
    made = keeper(BOTH, ValidationGate("loss_reasonable", "loss", 5.0))
    assert made.judge(QUICK, 10, losses(6.0), {}).passed
    assert [f.gate for f in made.judge(QUICK, 11, losses(6.0), {}).failures] == ["loss_reasonable"]
    standard = made.judge(STANDARD, 11, losses(6.0), {}).evidence
    assert [(item.gate, item.threshold) for item in standard if item.metric == "loss"] == [("loss_reasonable", 5.0)]


def test_custom_gates_are_judged_at_checkpoints_also_where_standard_ones_are_not():
    made = keeper((QUICK,), ValidationGate("fast", "tokens_per_second", 500.0, ">"))
    assert made.owed(50, checkpoint=True) == [STANDARD]
    assert made.judge(STANDARD, 50, losses(4.0), {}).evidence == ()  # at a start: no step has been timed in this place
    for speed in (600.0, 100.0, 550.0):
        made.after_step(49, 1.0, speed)
    assert made.judge(STANDARD, 50, losses(4.0), {}).passed
    assert keeper((QUICK,)).owed(50, checkpoint=True) == []
    in_place = keeper((QUICK,), ValidationGate("loss_reasonable", "loss", 5.0))
    assert in_place.owed(50, checkpoint=True) == []
    assert not in_place.judge(QUICK, 100, losses(6.0), {}).passed


def test_gate_that_is_not_required_closes_nothing():
    made = keeper((QUICK,), ValidationGate("wish", "eval_loss", 1.0, required=False))
    report = made.judge(STANDARD, 50, losses(4.0), {"loss": 3.0, "perplexity": 20.0})
    assert (report.passed, [item.passed for item in report.evidence]) == (True, [False])


@pytest.mark.parametrize("metric", LOOP_METRICS)
def test_every_metric_of_the_loop_is_measured(metric: str):
    made = keeper((), ValidationGate("own", metric, -1e9, ">"))
    made.after_step(50, 1.0, 1e3)
    assert made.judge(STANDARD, 50, losses(4.0, 3.0), {"loss": 3.0, "perplexity": 20.0}).passed


# ---- the configuration


def phases(**overrides: Any) -> dict[str, Any]:
    return {"phases": {"validation": overrides}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"custom_gates": [{"name": "a", "metric_name": "bleu", "threshold": 1.0}]},
            r"metric_name .*eval_loss.*'bleu'",
        ),
        ({"custom_gates": [{"name": "a", "metric_name": "loss", "threshold": 1.0, "comparison": "=="}]}, "comparison"),
        ({"custom_gates": [{"name": "a", "metric_name": "loss"}]}, "threshold"),
        ({"custom_gates": [{"name": "a", "metric_name": "loss", "threshold": 1.0}] * 2}, "different names"),
        (
            {"custom_gates": [{"name": "a", "metric_name": "loss", "threshold": 1.0, "compare": ">"}]},
            r"custom_gates\.0\.compare\. Write comparison instead",
        ),
        ({"gates": ["fast"]}, "gates"),
    ],
)
def test_gates_that_cannot_be_judged_are_refused_when_the_file_is_read(overrides, words: str):
    with pytest.raises(ConfigError, match=words):
        FullConfig.from_mapping(phases(**overrides), source="test")


def test_phases_ask_for_their_gates_and_the_file_may_change_that(tmp_path: Path):
    rows = {str(p): resolve_run(p, config_file=MICRO).phase for p in TrainingPhase}
    assert {name: row.gates for name, row in rows.items()} == {
        "sanity_check": (QUICK,), "validation": BOTH, "medium": BOTH, "full": BOTH,
    }  # fmt: skip
    gate = {"name": "perplexity", "metric_name": "perplexity", "threshold": 300.0}
    setting = f"phases.validation={json.dumps({'gates': ['standard'], 'custom_gates': [gate], 'num_tokens': 10**6})}"
    run = resolve_run(TrainingPhase.VALIDATION, config_file=MICRO, settings=[setting])
    assert run.phase.gates == (STANDARD,)
    assert run.phase.custom_gates == (ValidationGate("perplexity", "perplexity", 300.0),)
    paths = RunPaths(tmp_path)
    run.write(paths.run_yaml)
    assert read_run_config(paths) == run


# ---- in a run


@pytest.fixture(scope="module")
def closed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that a gate at its second checkpoint ends."""
    gates = (ValidationGate("perplexity", "perplexity", 10.0),)
    run = Run(made, tmp_path_factory.mktemp("closed"), {"save_steps": 8, "eval_steps": 8}, custom_gates=gates)
    run.result = run.train()  # type: ignore[attr-defined]
    return run


def test_closed_gate_ends_training_after_a_checkpoint_by_its_name(closed: Run):
    result = closed.result  # type: ignore[attr-defined]
    assert (result.cause, result.step, result.checkpoint) == ("gate", 16, "step-16")  # step 8 is one of warm-up
    assert result.message.startswith("gate not passed: perplexity ")
    assert result.message.endswith(", must be < 10")
    assert [item.measured for item in result.gates.failures] == ["evaluation at step 16"]
    assert closed.checkpoint(16).exists()
    [told] = closed.story.of("gate_not_passed")
    assert (told["step"], told["gates"]) == (16, ["perplexity"])


def test_same_command_again_comes_to_the_same_verdict_without_a_step(closed: Run):
    again = Run(closed.made, closed.root, closed.settings, custom_gates=closed.custom_gates)
    assert asdict(again.train()) == asdict(closed.result)  # type: ignore[attr-defined]
    assert again.story.losses == []


def test_run_told_to_stop_at_the_gate_meets_it_at_its_next_start(made: Made, tmp_path: Path, closed: Run):
    run = Run(made, tmp_path, closed.settings, custom_gates=closed.custom_gates)
    assert run.train({16: SIGNAL}).cause == "signalled"
    assert asdict(run.train()) == asdict(closed.result)  # type: ignore[attr-defined]
    assert [step for step, _ in run.story.losses] == list(range(1, 17))


def test_passed_gates_leave_their_evidence(made: Made, tmp_path: Path):
    run = Run(made, tmp_path, {"num_train_steps": 20, "warmup_steps": 2}, gates=BOTH)
    result = run.train()
    assert result.cause == "complete"
    quick = ["loss_reasonable", "no_nan"]  # at the end, however short the run
    assert [item.gate for item in result.gates.evidence] == [*quick, *quick, "gradient_norm", "perplexity"]
    assert run.train() == result
    stopped = Run(made, tmp_path / "stopped", run.settings, gates=BOTH)
    stopped.train({10: SIGNAL})
    assert stopped.train({20: SIGNAL}) == result
    assert stopped.state(20) == run.state(20)


def test_absurd_learning_rate_is_stopped_by_a_named_gate(lab: Lab, tmp_path: Path):
    settings = ["--set", "training.learning_rate=10", "--set", "training.gate_steps=20"]
    code, output = lab.submit(tmp_path / "run", *settings)
    assert code == 3, output
    assert "gate not passed: loss_reasonable: loss" in " ".join(output.replace("│", " ").split())
    paths = RunPaths(tmp_path / "run")
    verdict = json.loads((paths.gates / "sanity_check.json").read_text())
    failed = [item for item in verdict["evidence"] if not item["passed"]]
    assert (verdict["passed"], [item["gate"] for item in failed]) == (False, ["loss_reasonable"])
    assert failed[0]["value"] > failed[0]["threshold"] == 100
    assert (paths.checkpoints / verdict["checkpoint"]).exists()
    events = [record["event"] for record in read_json_lines(paths.attempt(0).events("rank-0"))]
    assert "gate_not_passed" in events
