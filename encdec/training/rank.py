"""One rank from its start to its end: text, process group, model, resume, training, verdict."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import encdec
from encdec import distributed
from encdec.checkpoints.model_files import keep_model_files
from encdec.checkpoints.training_facts import TrainingFacts
from encdec.errors import EncdecError, ShardingError
from encdec.files import RunPaths, atomic_write_json
from encdec.gates import GateReport
from encdec.initialization.streams import Stream, fill, is_empty
from encdec.records import RankResult
from encdec.redaction import Redacting, redact
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training import sharding, storage
from encdec.training.alerts import ending_of
from encdec.training.build import build_trainer, empty_model, plan_model, whole_copy
from encdec.training.config import FullConfig
from encdec.training.execution import LoopGates, TrainingPhase
from encdec.training.finish import check_sanity, finish
from encdec.training.origin import Opening, has_checkpoint, require_origin, require_weights
from encdec.training.run_config import RunConfig, read_run_config
from encdec.training.signals import Requests
from encdec.training.start_up import StartUp
from encdec.training.text import prepare_text
from encdec.training.trainer import Qwen3EncoderDecoderTrainer

log = logging.getLogger("encdec.train")
EndOfPhase = Callable[[RunConfig, RunPaths, Any, Path, torch.device, Path], GateReport]
"""(run, its directory, tokenizer, packed text, device, a verified checkpoint) -> the verdicts at the end of a phase."""
ModelMaker = Callable[[FullConfig, Qwen3EncoderDecoderTokenizer], Any]
"""Makes the unsharded model on the host, fp32, the same on every rank; it has ``transformer_layers()``."""


def run_rank_of_attempt(run_dir: str, attempt: int, judge_end: EndOfPhase | None = None) -> None:
    """Train as one rank of an attempt that the launcher has claimed; rank 0 writes result.json when it is done.

    An error that is meant for a user is written to the attempt's error.json and ends the process with its exit code.
    """
    paths = RunPaths(Path(run_dir))
    start_log()
    try:
        run = read_run_config(paths)
        outcome = run_rank(run, paths, attempt=attempt, expected_world_size=run.world_size, judge_end=judge_end)
        if os.environ.get("RANK", "0") == "0":
            with storage.explained("The run directory must take the result", paths.root):
                atomic_write_json(paths.attempt(attempt).result, RankResult(**outcome).to_json())
    except EncdecError as error:
        refuse(paths, attempt, error)


def run_rank(
    run: RunConfig,
    paths: RunPaths,
    *,
    attempt: int | None = None,
    expected_world_size: int | None = None,
    resume_from: Path | None = None,
    make_model: ModelMaker | None = None,
    gates: LoopGates | None = None,
    judge_end: EndOfPhase | None = None,
) -> dict[str, Any]:
    """Build, resume, train, judge; the facts of the outcome.

    Args:
        attempt: number claimed by the launcher; None: rank 0 claims the next one for all.
        expected_world_size: ranks asked for; None: ``infra.num_gpus`` on each node that takes part.
        resume_from: a checkpoint folder; None: the newest valid one of the run directory, if there is one.
        make_model: builds the model; None: the one that the configuration describes.
        gates: judged while training goes on; None: those of the phase, QUICK where there is none.
        judge_end: measures what a phase's gates at its end ask for.

    Raises:
        EncdecError: what a user can mend, storage that takes no more among it.
    """
    sharding.require_ranks(run.config.infra, expected_world_size)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a warning that comes this early is sent again by the agent
    marks = StartUp(None if attempt is None else paths.attempt(attempt).events("rank-0"))
    marks.done("imports")
    sharding.use_even_threads()
    store = sharding.open_store()
    packed_dir = Path(run.config.data.packed_dir)
    with storage.explained("The text must be readable, and data.packed_dir must take it", packed_dir):
        tokenizer, packed = prepare_text(run)
    marks.done("load")
    device = sharding.start_process_group(run.config.infra)
    marks.done("rendezvous")
    del store  # the process group has its own reference now
    with storage.explained("The run directory must take checkpoints and records", paths.root):
        return _train(run, paths, attempt, resume_from, tokenizer, packed, device, make_model, gates, judge_end, marks)


def _train(
    run: RunConfig,
    paths: RunPaths,
    attempt: int | None,
    resume_from: Path | None,
    tokenizer: Qwen3EncoderDecoderTokenizer,
    packed: Path,
    device: torch.device,
    make_model: ModelMaker | None,
    gates: LoopGates | None,
    judge_end: EndOfPhase | None,
    marks: StartUp,
) -> dict[str, Any]:
    """What a rank does once it has text and a process group."""
    if attempt is None:
        attempt = distributed.on_rank_zero(paths.claim_attempt)
        marks.tell(paths.attempt(attempt).events("rank-0"))
    require_one_attempt(attempt)
    with storage.explained("The model must be readable", Path(run.config.model.model_name_or_path)):
        model, read = begin_model(run, tokenizer, make_model)
    goes_on = resume_from is not None or (run.starts_from is not None and has_checkpoint(paths))
    opening = None
    if run.starts_from and not goes_on:
        with storage.explained("The weights to start from must be readable", Path(run.starts_from.source)):
            opening = Opening(run, paths)
        resume_from, read = opening.resume_from, functools.partial(opening.stream, model)
        if not is_empty(model):
            fill(model, read())
    elif resume_from is None:
        require_origin(run, paths)
    if run.phase and run.phase.phase == TrainingPhase.SANITY_CHECK and (read or not is_empty(model)):
        check_sanity(lambda: whole_copy(model, run.config, read), tokenizer, paths)
    distributed.on_rank_zero(lambda: keep_model_files(model, tokenizer, paths.model, TrainingFacts.of_run(run)))
    requests = Requests(paths)
    trainer = build_trainer(
        run, paths, attempt=attempt, restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        tokenizer=tokenizer, packed=packed, model=model, read=read, device=device, requests=requests, gates=gates,
    )  # fmt: skip
    try:
        if opening:
            opening.record()
        trainer.start_from(resume_from)
        require_weights(run, goes_on=goes_on, step=trainer.state.global_step)
        requests.listen()  # not before: until now there is nothing to save, and SIGTERM should simply end this rank
        marks.done("load")
        judge = functools.partial(judge_end, run, paths, tokenizer, packed, device) if judge_end else None
        result = finish(run, paths, trainer.train(), trainer, judge)
        trainer.checkpoints.close(hurried=result["cause"] == "signalled")
        tell_end(trainer, result)
        return result
    except Exception as error:
        tell_end(trainer, ending_of(error, trainer.state.global_step))
        raise
    finally:
        trainer.saving.abandon()
        for observer in trainer.observers:
            observer.close()
        dist.destroy_process_group()


def begin_model(
    run: RunConfig, tokenizer: Qwen3EncoderDecoderTokenizer, make_model: ModelMaker | None
) -> tuple[Any, Callable[[], Stream] | None]:
    """A run's model, and what opens the stream of its values: whole and None from ``make_model``; else with its
    parameters on the meta device, and None where the values come from other weights than the configured ones."""
    if make_model:
        return make_model(run.config, tokenizer), None
    if run.starts_from:
        return empty_model(run.config, tokenizer), None
    plan = plan_model(run.config, tokenizer)
    return plan.model, plan.weights.stream


def tell_end(trainer: Qwen3EncoderDecoderTrainer, ending: dict[str, Any]) -> None:
    """Tell the observers how the attempt ended: ``cause, step, message``."""
    for observer in trainer.observers:
        observer.on_end(ending)


def require_one_attempt(attempt: int) -> None:
    """Ranks of two attempts would write their parts of a checkpoint into two folders.

    Raises:
        ShardingError: they are not all of one.
    """
    attempts = sorted(set(distributed.gather(attempt)))
    if len(attempts) > 1:
        raise ShardingError(
            "All ranks must run the same attempt",
            found=f"attempts {attempts}",
            remedy="Cancel the run's jobs and give the submit command again",
        )


def refuse(paths: RunPaths, attempt: int, error: EncdecError) -> NoReturn:
    """Leave the error where the agent finds it, and end this rank at once: the others may wait in a collective.

    On a full disk there may be no room for that, nor for the log, which lies there too: nothing here may raise.
    """
    report = {"message": redact(str(error)), "exit_code": int(error.exit_code)}
    with contextlib.suppress(OSError):
        log.error("%s", error)
        sys.stderr.flush()
    for make_room in (lambda: None, lambda: drop_unfinished(paths, attempt)):
        with contextlib.suppress(OSError):
            make_room()
            atomic_write_json(paths.attempt(attempt).error, report)
            break
    os._exit(error.exit_code)


def drop_unfinished(paths: RunPaths, attempt: int) -> None:
    """Remove the checkpoint that this attempt could not finish; the next one would remove it anyway."""
    for folder in paths.checkpoints.glob(f"*.tmp-{attempt}"):
        shutil.rmtree(folder, ignore_errors=True)


def start_log() -> None:
    """Rank 0 tells the story; the others speak up for warnings."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    log.info("code: %s", Path(encdec.__file__).parent)
