"""The pipeline: preflight, training, gates, records, for one scale or from a small one upward until a gate stops it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from encdec.errors import ConfigError, GateNotPassed
from encdec.files import RunPaths, atomic_write_json
from encdec.gates import GATES, LOOP_METRICS, LOSS_DECREASING, GateLevel, GateReport, Measurement, ValidationGate, judge
from encdec.pipeline.config import GateConfig, Launch, PipelineConfig, PipelineTrainingConfig
from encdec.pipeline.evaluators import Batches, Evaluation, Evaluator, measure
from encdec.pipeline.facts import RunFacts
from encdec.pipeline.preflight import InfrastructureReport, inspect
from encdec.pipeline.results import ScaleResult, append_results
from encdec.pipeline.scale_run import (
    Ending,
    ModelFactory,
    TrainedModel,
    launch_with_torchrun,
    load_trained,
    model_maker,
    train_elsewhere,
    train_here,
)
from encdec.pipeline.scales import ModelScale, scales_between
from encdec.pipeline.validator import LEVELS, PipelineValidator, Verdict, asked_at
from encdec.training.build import evaluation_batches, make_collator
from encdec.training.execution import LoopGates
from encdec.training.phase_overrides import CustomGate
from encdec.training.run_config import RunConfig, read_run_config
from encdec.training.text import prepare_text

log = logging.getLogger("encdec.pipeline")


class PipelineRunner:
    """Trains scales and judges them. Everything lies under ``config.experiment_dir``:

        <scale>.yaml     configuration of the scale's run        results.jsonl   one line a scale and call
        <scale>/         its run directory; gates/pipeline-<level>.json has the evidence

    The same call again continues what is there, and judges what is complete anew.

    Args:
        config: what to train, and by which gates.
        model_factory: makes the model instead of the project's own; in this process only.
        launch: trains a run elsewhere (on Slurm: what the launcher hands in); it gets the YAML file of a FullConfig and
            the run directory, and returns an exit code once the run is over. Without one, a single rank trains in this
            process, and several are started by torchrun.
        evaluators: metric -> evaluator, besides those that are registered.

    Raises:
        ConfigError: a model factory, which no other process knows, with ranks elsewhere.
    """

    def __init__(
        self,
        config: PipelineConfig,
        model_factory: ModelFactory | None = None,
        launch: Launch | None = None,
        *,
        evaluators: Mapping[str, Evaluator] | None = None,
    ) -> None:
        self.config, self.model_factory = config, model_factory
        self.launch = launch or (launch_with_torchrun if config.training.num_gpus > 1 else None)
        if self.launch and model_factory:
            raise ConfigError(
                "A model factory is known to this process alone",
                found="one, with ranks in other processes",
                remedy="Leave launch out and training.num_gpus at 1",
            )
        self.validator = PipelineValidator(
            config.strict_validation, gates_by_level(config.training.validation_gates),
            benchmarks=config.eval_benchmarks, evaluators=evaluators, generations=config.eval_generations,
        )  # fmt: skip

    def validate_infrastructure(
        self, scales: Sequence[ModelScale] = (), levels: Iterable[GateLevel] = (GateLevel.STANDARD,)
    ) -> InfrastructureReport:
        """Named checks of place, text, model and gates; true where all passed. Makes the experiment's folder.

        Args:
            scales: to be trained; default: the configuration's.
            levels: gates that will be asked for at their end.
        """
        scales = scales or (self.config.training.model_scale,)
        return inspect(self.config, self.validator, launched=bool(self.launch), scales=scales, levels=levels)

    def run(self, through: GateLevel = GateLevel.STANDARD) -> ScaleResult:
        """Train the configuration's scale, and judge it by QUICK, STANDARD and the levels after it.

        Args:
            through: the last level that is asked for.

        Raises:
            MissingPrerequisite: a check of ``validate_infrastructure`` stands in the way.
            EncdecError: what a user can mend: storage that takes no more, an unreadable suite.
        """
        levels = LEVELS[LEVELS.index(GateLevel.STANDARD) : LEVELS.index(through) + 1]
        self.validate_infrastructure(levels=levels).require()
        return self._run_scale(self.config.training.model_scale, levels)

    def run_progressive(
        self,
        start_scale: ModelScale | str = ModelScale.TINY,
        end_scale: ModelScale | str = ModelScale.SMALL,
        validation_between_scales: bool = True,
    ) -> list[ScaleResult]:
        """One scale after the other, each from first weights of its own; the first failure is the last result.

        Args:
            validation_between_scales: ask for FULL before the next scale.

        Raises:
            ConfigError: ``end_scale`` comes before ``start_scale``.
            MissingPrerequisite, EncdecError: as ``run``; of all scales before the first is trained.
        """
        scales = scales_between(start_scale, end_scale)
        between = [GateLevel.FULL] if validation_between_scales else []
        self.validate_infrastructure(scales, [GateLevel.STANDARD, *(between if len(scales) > 1 else [])]).require()
        results: list[ScaleResult] = []
        for scale in scales:
            levels = [GateLevel.STANDARD, *(between if scale != scales[-1] else [])]
            results.append(self._run_scale(scale, levels))
            if not results[-1].success:
                break
        return results

    # ---- one scale

    def _run_scale(self, scale: ModelScale, levels: Sequence[GateLevel]) -> ScaleResult:
        training = self.config.training.at_scale(scale)
        paths = RunPaths(self.config.experiment_dir / scale)
        config_file = self.config.experiment_dir / f"{scale}.yaml"
        gates = self._gates_in_loop()
        full = training.full_config()
        for row in full.phases.values():  # a launcher trains one of them
            row.gates = [level.value for level in gates.levels]
            row.custom_gates = [CustomGate(**asdict(gate)) for gate in gates.custom]
        full.to_yaml(config_file)
        log.info("%s: training in %s", scale, paths.root)
        make_model = model_maker(self.model_factory, training.scale_config)
        if self.launch:
            ending = train_elsewhere(self.launch, config_file, paths)
        else:
            ending = train_here(config_file, paths, make_model, gates)
        result = self._judge(scale, paths, ending, levels)
        append_results(self.config.experiment_dir / "results.jsonl", [result])
        log.info("%s", result.summary())
        return result

    def _gates_in_loop(self) -> LoopGates:
        """QUICK with the user's own where such a gate ends the run; nothing where it is only reported."""
        if not self.config.strict_validation:
            return LoopGates(())
        own = [gate for gate in self.validator.gates(GateLevel.QUICK) if gate not in GATES[GateLevel.QUICK]]
        return LoopGates(custom=tuple(gate for gate in own if gate.metric_name in LOOP_METRICS))

    def _judge(self, scale: ModelScale, paths: RunPaths, ending: Ending, levels: Sequence[GateLevel]) -> ScaleResult:
        """From the run directory alone: the run may have been anywhere."""
        before, self.validator.model_name = len(self.validator.results), scale
        training, trained, facts = self.config.training.at_scale(scale), None, RunFacts({}, 1)
        vocabulary = training.train_tokenizer_vocab_size
        if paths.run_yaml.exists():
            run = read_run_config(paths)
            facts = RunFacts.read(paths, run.num_train_steps)
            stopped = not self._passes_quick(facts, ending) and self.config.strict_validation
            if ending.cause == "complete" and not stopped:
                trained = self._judge_trained(run, paths, facts, levels, training)
                vocabulary = len(self.validator.tokenizer)
        verdicts = self.validator.results[before:]
        failed = [item for verdict in verdicts for item in verdict.report.failures]
        cause = "gate" if failed and self.config.strict_validation else ending.cause
        if cause == "complete" and trained is None:
            cause, ending = "crash", Ending("crash", f"{ending.message}, but left no run to judge in {paths.root}")
        return ScaleResult(
            experiment=training.experiment_name, scale=scale, success=cause == "complete", cause=cause,
            reason="; ".join([ending.message, *(f"gate not passed: {item.line()}" for item in failed)]),
            final_loss=facts.final_loss, training_time_seconds=facts.seconds, step=facts.last_step,
            parameters=training.scale_config.num_parameters(*([vocabulary] if vocabulary else [])),
            run_dir=str(paths.root), checkpoint=trained.checkpoint if trained else None,
            gates={verdict.level: verdict.report for verdict in verdicts},
        )  # fmt: skip

    def _passes_quick(self, facts: RunFacts, ending: Ending) -> bool:
        """QUICK at each of its steps; the verdict kept is that of the first that fails, or of the last."""
        if facts.closed and ending.cause == "gate":
            self.validator.keep(GateLevel.QUICK, GateReport(facts.closed), facts.last_step)
            return False
        looks = list(facts.quick_looks())
        gates = self.validator.gates(GateLevel.QUICK)
        bad = [look for look in looks if not judge(gates, look[1]).passed]
        step, measured = (bad or looks or [(0, {})])[0 if bad else -1]
        if not looks:
            return True  # it ended before its first step: its ending says why
        return self._verdict(GateLevel.QUICK, None, measured, None, step)

    def _judge_trained(
        self,
        run: RunConfig,
        paths: RunPaths,
        facts: RunFacts,
        levels: Sequence[GateLevel],
        training: PipelineTrainingConfig,
    ) -> TrainedModel:
        """The levels in their order, up to the first that fails; their evidence goes to the run directory."""
        tokenizer, packed = prepare_text(run)
        made = model_maker(self.model_factory, training.scale_config) if self.model_factory else None
        trained = load_trained(paths, run.config, tokenizer, made)
        trained.model.to(torch.device(self.config.eval_device))
        self.validator.tokenizer = tokenizer
        batches = evaluation_batches(run.config, packed, make_collator(run.config, tokenizer, run.config.training.seed))
        measured = facts.measured()
        weights = measure(["nan_count"], Evaluation(trained.model, step=trained.step)).values["nan_count"]
        count = weights.value + facts.not_finite()
        source = f"{len(facts.steps):,} step records, {weights.source}"
        measured["nan_count"] = Measurement(count, source)
        for level in levels:
            passed = self._verdict(level, trained, measured, batches, trained.step)
            self._write_evidence(paths, self.validator.results[-1], trained)
            if not passed and self.config.strict_validation:
                break
        return trained

    def _verdict(
        self, level: GateLevel, trained: TrainedModel | None, measured: Mapping[str, Measurement],
        batches: Batches | None, step: int,
    ) -> bool:  # fmt: skip
        """Whether the required gates passed; the validator keeps the verdict."""
        try:
            model = trained.model if trained else None
            return self.validator.judge(level, model, measured, batches, step).passed
        except GateNotPassed as error:
            log.error("%s", error)
            return False

    @staticmethod
    def _write_evidence(paths: RunPaths, verdict: Verdict, trained: TrainedModel) -> Path:
        paths.gates.mkdir(exist_ok=True)
        path = paths.gates / f"pipeline-{verdict.level}.json"
        facts = {"level": verdict.level, "step": verdict.step, "checkpoint": trained.checkpoint, "time": time.time()}
        atomic_write_json(path, facts | verdict.report.to_json())
        return path


def gates_by_level(configured: Iterable[GateConfig]) -> dict[GateLevel, list[ValidationGate]]:
    """The user's gates where they are asked for, and at STANDARD that the loss must not have risen."""
    rows = list(configured)
    own = {
        level: [
            row.gate for row in rows if (asked_at(level, row.gate) if row.levels is None else level in row.levels)
        ]
        for level in LEVELS
    }  # fmt: skip
    own[GateLevel.STANDARD].insert(0, LOSS_DECREASING)
    return own
