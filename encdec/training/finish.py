"""Verdicts: the sanity check before a phase's first step, the phase's own bounds after its last, and what follows."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from encdec import distributed
from encdec.errors import CheckpointError, TrainingDiverged
from encdec.files import RunPaths, atomic_write_json
from encdec.sanity_check import check_model
from encdec.training.execution import PhaseConfig
from encdec.training.final_average import average_last
from encdec.training.run_config import RunConfig
from encdec.training.state import TrainResult
from encdec.training.trainer import Qwen3EncoderDecoderTrainer

log = logging.getLogger("encdec.train")


@dataclass(frozen=True)
class Evidence:
    """One measured fact against its bound."""

    metric: str
    value: float
    threshold: float
    comparison: str
    """How the value must compare with the threshold: >= or <=."""
    measured: str
    """Where the value comes from."""
    passed: bool


def check_sanity(model: nn.Module, tokenizer: Any, paths: RunPaths) -> None:
    """The sanity check on the unsharded model, on rank 0; its report goes to the run directory, once in a run's life.

    All ranks take part, whatever each of them sees there: one that comes late finds the report already.

    Raises:
        TrainingDiverged: a check failed; on every rank.
    """

    def check() -> None:
        if paths.sanity_report.exists():
            return
        report = check_model(model, tokenizer)
        for line in report.lines():
            log.info("sanity check: %s", line)
        if not report.passed:
            failed = [f"{check.name} ({check.message})" for check in report.checks if not check.passed]
            raise TrainingDiverged(
                "Every sanity check must pass before the first step",
                found="; ".join(failed),
                remedy="Mend the model or its configuration; python -m encdec.sanity_check repeats the checks",
            )
        atomic_write_json(paths.sanity_report, report.to_json())

    distributed.on_rank_zero(check)


def finish(run: RunConfig, paths: RunPaths, result: TrainResult, trainer: Qwen3EncoderDecoderTrainer) -> dict[str, Any]:
    """Read the last checkpoint back, judge a finished phase, average the last checkpoints of one that is complete; say
    how it ended (the facts of an Outcome).
    """
    verified = distributed.on_rank_zero(lambda: read_back(trainer, result.checkpoint))
    cause, message = result.cause, result.message
    if cause == "complete" and run.phase:
        evidence = judge_phase(run.phase, result)
        distributed.on_rank_zero(trainer.checkpoints.fence)  # a node that was cut off may not pass the gate for others
        distributed.on_rank_zero(lambda: write_gate(paths, run.phase, result, evidence))
        failed = [item for item in evidence if not item.passed]
        if failed:
            cause = "gate"
            message += "; gate not passed: " + "; ".join(
                f"{item.metric} {item.value:.4f}, must be {item.comparison} {item.threshold:g}" for item in failed
            )
    elif cause == "gate" and run.phase:
        distributed.on_rank_zero(trainer.checkpoints.fence)
        distributed.on_rank_zero(lambda: write_gate(paths, run.phase, result, []))
    if cause == "complete":
        average_last(
            trainer.checkpoints, run.config.training.average_last, result.step,
            scheduled=-(-result.step // run.config.training.save_steps), stop_asked=trainer.requests.stop_asked,
        )  # fmt: skip
    log.info("%s: %s", cause, message)
    return {
        "cause": cause,
        "step": result.step,
        "checkpoint": result.checkpoint,
        "checkpoint_verified": verified,
        "first_loss": _number(result.first_loss),
        "last_loss": _number(result.last_loss),
        "message": message,
    }


def _number(value: float) -> float | None:
    """JSON has no nan, which is the loss of a run that ended before its first step was done."""
    return value if math.isfinite(value) else None


def read_back(trainer: Qwen3EncoderDecoderTrainer, name: str | None) -> bool:
    """Whether the checkpoint, read again from storage, matches its manifest."""
    if name is None:
        return False
    try:
        trainer.checkpoints.validate(name)
    except CheckpointError as error:
        log.error("%s", error)
        return False
    return True


def judge_phase(phase: PhaseConfig, result: TrainResult) -> list[Evidence]:
    """The phase's two bounds. A loss that is no number compares false, so it fails both."""
    fall = result.first_loss - result.last_loss
    return [
        Evidence(
            "loss_decrease", fall, phase.min_loss_decrease, ">=", "mean of the first steps minus mean of the last",
            fall >= phase.min_loss_decrease,
        ),
        Evidence(
            "loss_after_warmup", result.last_loss, phase.max_loss_after_warmup, "<=", "mean of the last steps",
            result.last_loss <= phase.max_loss_after_warmup,
        ),
    ]  # fmt: skip


def write_gate(paths: RunPaths, phase: PhaseConfig | None, result: TrainResult, evidence: list[Evidence]) -> None:
    """``gates/<phase>.json``: the evidence and the verdict, with that of the gates in the loop."""
    assert phase is not None
    paths.gates.mkdir(exist_ok=True)
    verdict = {
        "phase": str(phase.phase),
        "passed": all(item.passed for item in evidence) and not (result.gates and result.gates.failures),
        "step": result.step,
        "checkpoint": result.checkpoint,
        "time": time.time(),
        "evidence": [
            *(asdict(item) for item in evidence),
            *(item.to_json() for item in (result.gates.evidence if result.gates else ())),
        ],
    }
    atomic_write_json(paths.gates / f"{phase.phase}.json", verdict)
