"""Verdicts: the sanity check before a phase's first step, the phase's own bounds after its last, and what follows."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from encdec import distributed
from encdec.checkpoints.manifest import read_manifest
from encdec.checkpoints.payload import open_weights
from encdec.checkpoints.weights import digest_weights
from encdec.errors import CheckpointError, TrainingDiverged
from encdec.files import RunPaths, atomic_write_json
from encdec.gates import LOSS_DECREASING, GateReport, Measurement, ValidationGate, judge
from encdec.model_checks import check_model
from encdec.training.execution import PhaseConfig
from encdec.training.final_average import average_last
from encdec.training.promotion import GateFile, read_origin
from encdec.training.run_config import RunConfig
from encdec.training.state import TrainResult
from encdec.training.trainer import Qwen3EncoderDecoderTrainer

log = logging.getLogger("encdec.train")
READ_BACK = ValidationGate("checkpoint", "checkpoint_verified", 1, ">=", description="The weights can be handed on")
EndJudge = Callable[[Path], GateReport]
"""A verified checkpoint's folder -> the verdicts of the gates at the end of a phase."""


def check_sanity(make_model: Callable[[], nn.Module], tokenizer: Any, paths: RunPaths) -> None:
    """The sanity check on the unsharded model, on rank 0; its report goes to the run directory, once in a run's life.

    All ranks take part, whatever each of them sees there: one that comes late finds the report already.

    Args:
        make_model: the whole model on the host; called on rank 0 alone, where there is no report yet.

    Raises:
        TrainingDiverged: a check failed; on every rank.
    """

    def check() -> None:
        if paths.sanity_report.exists():
            return
        report = check_model(make_model(), tokenizer)
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


def finish(
    run: RunConfig,
    paths: RunPaths,
    result: TrainResult,
    trainer: Qwen3EncoderDecoderTrainer,
    judge_end: EndJudge | None = None,
) -> dict[str, Any]:
    """Read the last checkpoint back, judge a finished phase, average the last checkpoints of one that is complete; say
    how it ended (the facts of an Outcome).

    Args:
        judge_end: measures what the phase's gates at its end ask for; without one they count as not measured.
    """
    verified = distributed.on_rank_zero(lambda: read_back(trainer, result.checkpoint))
    cause, message, first_loss = result.cause, result.message, result.first_loss
    if run.phase and cause in ("complete", "gate"):
        first_loss = loss_of_the_chain(paths, result)
        verdict = verdict_on(run.phase, result, first_loss, verified=verified)
        if cause == "complete" and verdict.passed and run.phase.gates_at_end:
            at_end = verdict_at_end(run.phase, trainer, result, judge_end if verified else None)
            verdict = GateReport(verdict.evidence + at_end.evidence)
        distributed.on_rank_zero(trainer.checkpoints.fence)  # a node that was cut off may not pass the gate for others
        distributed.on_rank_zero_however_long(
            lambda: write_gate(run, paths, result, first_loss, verdict, trainer, verified=verified)
        )
        if cause == "complete" and not verdict.passed:
            cause = "gate"
            message += "; gate not passed: " + "; ".join(item.line() for item in verdict.failures)
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
        "first_loss": finite(first_loss),
        "last_loss": finite(result.last_loss),
        "message": message,
    }


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


def loss_of_the_chain(paths: RunPaths, result: TrainResult) -> float:
    """From which the fall of the loss is measured, nats: the first steps of the first phase of the chain, or a later
    phase would have to repeat the falls of those before it. The same on all ranks.
    """
    origin = distributed.on_rank_zero(lambda: read_origin(paths))
    return result.first_loss if origin is None or origin.first_loss is None else origin.first_loss


def verdict_on(phase: PhaseConfig, result: TrainResult, first_loss: float, *, verified: bool) -> GateReport:
    """The gates in the loop as they were judged last, after those of a phase that has come to its end: its own bounds,
    and that its last checkpoint can be read back.
    """
    in_the_loop = result.gates.evidence if result.gates else ()
    if result.cause != "complete":
        return GateReport(in_the_loop)
    read = judge(
        (READ_BACK,), {READ_BACK.metric_name: Measurement(float(verified), f"{result.checkpoint}, by digests")}
    )
    return GateReport(judge_phase(phase, first_loss, result.last_loss).evidence + read.evidence + in_the_loop)


def verdict_at_end(
    phase: PhaseConfig, trainer: Qwen3EncoderDecoderTrainer, result: TrainResult, judge_end: EndJudge | None
) -> GateReport:
    """The gates that are judged on the plain model: by rank 0, however long it takes; the others wait."""
    if judge_end is None or result.checkpoint is None:
        return judge(phase.gates_at_end, {})
    checkpoint = trainer.checkpoints.output_dir / result.checkpoint
    return distributed.on_rank_zero_however_long(lambda: judge_end(checkpoint))


def judge_phase(phase: PhaseConfig, first_loss: float, last_loss: float) -> GateReport:
    """The phase's own two bounds, over means of several steps.

    Args:
        first_loss: mean over the first steps of the chain, nats.
        last_loss: mean over the last steps of the phase, nats.
    """
    gates = (
        replace(LOSS_DECREASING, threshold=phase.min_loss_decrease),
        ValidationGate("loss_reasonable", "loss_after_warmup", phase.max_loss_after_warmup, "<="),
    )
    return judge(
        gates,
        {
            "loss_decrease": Measurement(
                first_loss - last_loss, "mean of the chain's first steps minus mean of the last"
            ),
            "loss_after_warmup": Measurement(last_loss, "mean of the last steps"),
        },
    )


def write_gate(
    run: RunConfig, paths: RunPaths, result: TrainResult, first_loss: float, verdict: GateReport,
    trainer: Qwen3EncoderDecoderTrainer, *, verified: bool,
) -> None:  # fmt: skip
    """``gates/<phase>.json``: the verdict, the evidence, and which weights it is about."""
    assert run.phase is not None
    digest = None
    if result.checkpoint is not None and verified:
        folder = trainer.checkpoints.output_dir / result.checkpoint
        digest = digest_weights(open_weights(folder, read_manifest(folder)))
    GateFile(
        phase=run.phase.phase, passed=verdict.passed and digest is not None, identity=run.identity, step=result.step,
        checkpoint=result.checkpoint, weights_digest=digest, first_loss=finite(first_loss),
        last_loss=finite(result.last_loss), time=time.time(), evidence=verdict.evidence,
    ).write(paths)  # fmt: skip


def finite(value: float) -> float | None:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None
