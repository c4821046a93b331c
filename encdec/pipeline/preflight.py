"""Can the pipeline run here, and to its end? Named checks of place, text, model and gates before any training."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from encdec.data.corpus import open_corpus
from encdec.errors import EncdecError, MissingPrerequisite
from encdec.gates import GateLevel
from encdec.model_checks import Check, SanityReport
from encdec.pipeline.config import PipelineConfig
from encdec.pipeline.evaluators import EVALUATORS
from encdec.pipeline.scales import VOCABULARY, ModelScale, in_short
from encdec.pipeline.suites import SUITES, read_suite
from encdec.pipeline.validator import PipelineValidator
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training.config import FullConfig
from encdec.training.rules import check_rules
from encdec.training.tracking.login import wandb_login

log = logging.getLogger("encdec.pipeline")
BYTES_TRAINED = 16
"""Per parameter in training: fp32 weight, gradient and AdamW's two moments. Activations come on top."""
BYTES_SAVED = 12
"""Per parameter in a checkpoint: fp32 weight and two moments."""
ADVICE = frozenset({"gates"})
"""Checks whose failure is told and ends nothing: a gate that cannot be measured will not pass, and says so itself."""
FROM_RUN = frozenset({"loss", "grad_norm", "loss_decrease", "nan_count"})
"""Metrics that a run's own records measure."""


class InfrastructureReport(SanityReport):
    """All verdicts on a place; true where all passed."""

    def __bool__(self) -> bool:
        return self.passed

    @property
    def obstacles(self) -> list[Check]:
        """The failed checks with which nothing can begin."""
        return [check for check in self.checks if not check.passed and check.name not in ADVICE]

    def attempt(self, name: str, work: Callable[[], str]) -> None:
        """Add what ``work`` says of ``name``; an error meant for a user is the message of a failed check."""
        try:
            self.add(name, True, work())
        except EncdecError as error:
            self.add(name, False, str(error))
        except OSError as error:
            self.add(name, False, f"{error.strerror or error} ({error.filename})")

    def require(self) -> None:
        """Raises:
        MissingPrerequisite: something stands in the way; names all of it.
        """
        for check in self.checks:
            if not check.passed and check.name in ADVICE:
                log.warning("%s: %s", check.name, check.message)
        if self.obstacles:
            raise MissingPrerequisite(
                "Everything that the pipeline needs must be there before it begins",
                found="; ".join(f"{check.name}: {check.message.rstrip('.')}" for check in self.obstacles),
                remedy="Mend that; python -m encdec.pipeline validate repeats the checks",
            )


def inspect(
    config: PipelineConfig,
    validator: PipelineValidator,
    *,
    launched: bool,
    scales: Sequence[ModelScale],
    levels: Iterable[GateLevel],
) -> InfrastructureReport:
    """All checks.

    Args:
        launched: training happens elsewhere: its devices and their memory are that place's.
        scales: to be trained.
        levels: gates that will be asked for.
    """
    report = InfrastructureReport()
    report.attempt("process", lambda: _process(launched))
    report.attempt("checkpoint_dir", lambda: _writable(config.experiment_dir))
    report.attempt("device", lambda: _device(config, launched))
    report.attempt("tokenizer", lambda: _tokenizer(config))
    report.attempt("data", lambda: _data(config))
    report.attempt("suites", lambda: _suites(config))
    report.attempt("gates", lambda: _gates(config, validator, levels))
    report.attempt("wandb", lambda: _wandb(config))
    for scale in scales:
        _inspect_scale(report, config, scale, launched, suffix="" if len(scales) == 1 else f" {scale}")
    return report


def _inspect_scale(
    report: InfrastructureReport, config: PipelineConfig, scale: ModelScale, launched: bool, suffix: str
) -> None:
    training = config.training.at_scale(scale)

    def checked() -> str:
        full = training.full_config()
        check_rules(full)
        return f"{full.training.num_train_steps:,} steps of {full.training.global_batch_size} samples"

    report.attempt(f"configuration{suffix}", checked)
    if not report.checks[-1].passed:
        return  # its sizes cannot be counted
    full = training.full_config()
    parameters = training.scale_config.num_parameters(training.train_tokenizer_vocab_size or VOCABULARY)
    report.attempt(f"disk{suffix}", lambda: _disk(config.experiment_dir, full, parameters))
    report.attempt(f"memory{suffix}", lambda: _memory(config, parameters, launched))


def _needs(rule: str, found: object, remedy: str) -> MissingPrerequisite:
    return MissingPrerequisite(rule, found=found, remedy=remedy)


def _process(launched: bool) -> str:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1" or (dist.is_initialized() and not launched):
        raise _needs(
            "The pipeline is one process, which joins or starts the ranks of every run itself",
            f"WORLD_SIZE={world}, {'a' if dist.is_initialized() else 'no'} process group",
            "Start it without torchrun, and set training.num_gpus; end a process group of your own before",
        )
    return "training is launched" if launched else "trains in this process"


def _writable(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as stream:
        stream.write(b"\0" * 4096)
        stream.flush()
        os.fsync(stream.fileno())
    return f"{folder} takes files"


def _disk(folder: Path, full: FullConfig, parameters: int) -> str:
    kept = 1 + max(full.training.save_total_limit, full.training.average_last)
    needed, free = parameters * (BYTES_SAVED * kept + 4), shutil.disk_usage(folder).free
    facts = f"{gigabytes(needed)} for {kept} checkpoints and their average, {gigabytes(free)} free"
    if free < needed:
        raise _needs("The checkpoints must fit the disk", facts, "Free some, or lower training.save_total_limit")
    return facts


def _device(config: PipelineConfig, launched: bool) -> str:
    training, gpus = config.training, torch.cuda.device_count()
    needed = 0 if training.device == "cpu" or launched else training.num_gpus
    needed = max(needed, config.eval_device == "cuda")
    if gpus < needed:
        raise _needs("Every rank and the evaluation on cuda need a GPU", f"{gpus} for {needed}", "Set device: cpu")
    where = "the launched job's" if launched else f"{gpus} GPUs here" if training.device == "cuda" else "cpu"
    return f"{training.num_gpus} rank(s) on {where}, evaluation on {config.eval_device}"


def _memory(config: PipelineConfig, parameters: int, launched: bool) -> str:
    training = config.training
    ranks, size = training.num_gpus, in_short(parameters)
    if launched:
        return f"{size} parameters, {gigabytes(parameters * BYTES_TRAINED)} without activations, over the job's ranks"
    if training.device == "cuda" and not torch.cuda.is_available():
        raise _needs("The memory of a GPU must be known", "no GPU", "Set device: cpu")
    host = psutil.virtual_memory().available
    if training.device == "cpu":
        needed, free, where = parameters * BYTES_TRAINED, host, "this machine"
    else:
        needed, free, where = parameters * BYTES_TRAINED // ranks, torch.cuda.mem_get_info()[0], "a GPU"
        if 4 * parameters * ranks > host:
            facts = f"{gigabytes(4 * parameters * ranks)} for {ranks} rank(s), {gigabytes(host)} available"
            raise _needs("Every rank builds the whole model in fp32 on the host", facts, "Lower training.num_gpus")
    facts = f"{size} parameters, {gigabytes(needed)} without activations, {gigabytes(free)} free on {where}"
    if free < needed:
        raise _needs("Weights, gradients and moments must fit", facts, "Take more ranks or a smaller scale")
    return facts


def _tokenizer(config: PipelineConfig) -> str:
    training = config.training
    if training.train_tokenizer_vocab_size:
        return f"{training.train_tokenizer_vocab_size:,} entries, trained on the corpus"
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(
        training.tokenizer_name_or_path, num_sentinel_tokens=training.num_sentinel_tokens
    )
    return f"{len(tokenizer):,} entries, {training.tokenizer_name_or_path}"


def _data(config: PipelineConfig) -> str:
    data = config.training.data
    corpus = open_corpus(
        data.dataset_name, text_column=data.text_column, dataset_config=data.dataset_config,
        streaming=data.streaming, max_examples=data.max_examples,
    )  # fmt: skip
    first = next(corpus.documents())
    return f"{corpus.description}, first document of {len(first):,} letters"


def _suites(config: PipelineConfig) -> str:
    unknown = [metric for metric in config.eval_benchmarks if metric not in {**SUITES, **EVALUATORS}]
    if unknown:
        raise _needs(
            "eval_benchmarks maps a metric that has an evaluator to its file", unknown[0], f"Known: {', '.join(SUITES)}"
        )
    counts = [
        f"{metric} {len(read_suite(metric, path)):,} items"
        for metric, path in config.eval_benchmarks.items()
        if metric in SUITES
    ]
    return ", ".join(counts) or "none given"


def _gates(config: PipelineConfig, validator: PipelineValidator, levels: Iterable[GateLevel]) -> str:
    """Whether each required gate can be measured at all."""
    evaluators, lacking, count = {**EVALUATORS, **validator.evaluators}, [], 0
    for level in levels:
        for gate in validator.gates(level):
            count += 1
            metric = gate.metric_name
            if metric in FROM_RUN or not gate.required:
                continue
            if metric not in evaluators:
                lacking.append(f"{level}: no evaluator for {metric}")
            elif metric in SUITES and metric not in validator.evaluators and metric not in config.eval_benchmarks:
                lacking.append(f"{level}: eval_benchmarks.{metric} names no file")
    if lacking:
        raise _needs(
            "A required gate must be measured, or it does not pass", "; ".join(lacking),
            "Give the file, register an evaluator, or lay a gate of your own over it (training.validation_gates)",
        )  # fmt: skip
    return f"{count} gates, each can be measured"


def _wandb(config: PipelineConfig) -> str:
    if "wandb" not in config.training.full_config().training.report_to:
        return "not used"
    login = wandb_login(os.environ)
    if not login.there:
        raise _needs("use_wandb needs a login", login.words, "Run wandb login, or set WANDB_MODE=offline")
    return login.words


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
