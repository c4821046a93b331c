"""The run whose report the tests look at."""

from __future__ import annotations

import math

from encdec.files import RunPaths
from encdec.gates import Evidence
from encdec.training.execution import TrainingPhase
from encdec.training.promotion import GateFile
from launchers.views.page import render
from launchers.views.retrospect import look_back
from tests.launchers.scripted_run import ZERO, ScriptedRun

NOW = ZERO + 1000


def write_run(paths: RunPaths, *, words: str = "loss 9.1 is twice the mean") -> ScriptedRun:
    """Three attempts, two alerts, 330 steps of which 30 were computed again, a gate that was passed."""
    run = ScriptedRun(paths)
    curves = {
        "loss": lambda step: 2 + 5 * math.exp(-step / 60) + (4.0 if step == 77 else 0.0),
        "grad_norm": lambda step: 1 + 40 * (step == 77),
        "learning_rate": lambda step: 1e-3 * min(step, 30) / 30,
        "memory_gb": lambda step: 60.0,
    }
    run.submitted(0)
    run.attempt(20)
    run.start(ready=22, met=24, imports=28, text=29, ranks=31, loaded=40)
    run.steps(range(1, 101), since=40, first=5, **curves)
    run.alert("loss_spike", 121, step=77, message=words)
    run.saved(100, 146, blocking=2)
    run.ended("signalled", 148, step=100, message=words, requeued=True)
    run.attempt(200)
    run.start(ready=202, met=204, imports=208, text=209, ranks=211, loaded=220)
    run.steps(range(101, 181), since=220, first=3, **curves)
    run.saved(150, 273, blocking=0.5, seconds=3)
    run.alert("throughput_drop", 290, step=168, message="200 tokens/s are half of the median")
    run.submitted(400)
    run.attempt(420, job="8")
    run.start(ready=422, met=424, imports=428, text=429, ranks=431, loaded=440)
    run.steps(range(151, 301), since=440, first=3, **curves)
    run.saved(300, 594, blocking=2)
    run.checkpoint(300)
    run.ended("complete", 600, step=300, message="all 300 steps done")
    GateFile(
        phase=TrainingPhase.SANITY_CHECK, passed=True, identity="x", step=300, checkpoint="step-300",
        weights_digest="ab", first_loss=7.0, last_loss=2.0, time=ZERO + 599,
        evidence=(
            Evidence("loss_decreasing", "loss_decrease", 5.0, 0.2, ">=", True, words, True),
            Evidence("perplexity", "perplexity", None, 1000, "<", False, "nobody measured it", False),
        ),
    ).write(paths)  # fmt: skip
    return run


def page_of(paths: RunPaths) -> str:
    return render(look_back(paths, now=NOW), now=NOW)
