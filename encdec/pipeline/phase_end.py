"""The gates of a phase that its training loop cannot measure: FULL, PRODUCTION, and one's own by an evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from encdec.files import RunPaths
from encdec.gates import GateReport, judge
from encdec.pipeline.evaluators import Evaluation, measure
from encdec.pipeline.scale_run import empty_model
from encdec.pipeline.validator import with_reasons
from encdec.training.build import evaluation_batches, make_collator
from encdec.training.origin import fill_from_checkpoint
from encdec.training.run_config import RunConfig


def judge_end(
    run: RunConfig, paths: RunPaths, tokenizer: Any, packed: Path, device: torch.device, checkpoint: Path
) -> GateReport:
    """The verdicts on a verified checkpoint, by the plain model on ``device``; in one process, however many ranks there
    are.

    Args:
        packed: folder of the packed text, whose held-out part is evaluated.

    Raises:
        DataError: a suite's file is not what it must be.
    """
    assert run.phase is not None
    gates, config = run.phase.gates_at_end, run.config
    model = empty_model(paths, config)
    fill_from_checkpoint(model, checkpoint)
    collator = make_collator(config, tokenizer, config.training.seed)
    evaluation = Evaluation(
        model.to(device), evaluation_batches(config, packed, collator, alone=True), tokenizer,
        config.data.eval_benchmarks, int(checkpoint.name.removeprefix("step-")),
        generations=config.training.eval_generations,
    )  # fmt: skip
    measured = measure([gate.metric_name for gate in gates], evaluation)
    return with_reasons(judge(gates, measured.values), measured.missing)
