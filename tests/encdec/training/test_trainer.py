"""The trainer in one process: what it computes, against the plainest loop that computes the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from encdec.checkpoints import CheckpointManager, Saved
from encdec.data.collator import UL2DataCollator
from encdec.data.corpus import open_corpus
from encdec.data.packing import ensure_packed, open_packed
from encdec.data.sampler import GlobalBatchSampler
from encdec.data.ul2_dataset import EvaluationBatches, UL2Dataset, build_dataloader
from encdec.records import StepRecord, read_json_lines
from encdec.sanity_check import check_model
from encdec.sanity_check import main as sanity_main
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.training.build import build_model
from encdec.training.observers import Records, TextLog
from encdec.training.optimizer import make_optimizer
from encdec.training.run_config import RunConfig, resolve_run
from encdec.training.trainer import Qwen3EncoderDecoderTrainer

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    packed = tmp_path_factory.mktemp("packed")
    settings = [
        f"data.packed_dir={packed}",
        "training.num_train_steps=6",
        "training.save_steps=3",
        "training.eval_steps=3",
    ]
    return resolve_run(None, config_file=REPOSITORY / "tests" / "micro.yaml", settings=settings, ranks_per_node=1)


@pytest.fixture(scope="module")
def tokenizer(run: RunConfig) -> Qwen3EncoderDecoderTokenizer:
    corpus = open_corpus("python-stdlib", max_examples=30)
    return Qwen3EncoderDecoderTokenizer.train_from_texts(corpus.documents(), 512, 16)


@pytest.fixture(scope="module")
def packed(run: RunConfig, tokenizer) -> Path:
    folder = Path(run.config.data.packed_dir) / "p"
    corpus = open_corpus("python-stdlib", max_examples=30)
    ensure_packed(corpus, tokenizer, folder, sample_length=run.sample_length, validation_fraction=0.1)
    return folder


class Kit:
    """Everything for one trainer."""

    def __init__(self, run: RunConfig, tokenizer, packed: Path, root: Path, micro: int = 4) -> None:
        config = run.config.model_copy(deep=True)
        config.training.per_device_train_batch_size = micro
        self.config, self.model = config, build_model(config, tokenizer)
        self.collator = UL2DataCollator(tokenizer, 64, 64, seed=42)
        dataset = UL2Dataset(open_packed(packed, "train"))
        self.loader = build_dataloader(dataset, self.collator, GlobalBatchSampler(len(dataset), 8, micro, 0, 1, 42))
        self.evaluation = EvaluationBatches(
            open_packed(packed, "validation"), self.collator, batch_size=4, max_samples=10
        )
        self.trainer = Qwen3EncoderDecoderTrainer(
            self.model, tokenizer, config, self.loader, self.evaluation,
            checkpoints=CheckpointManager(root / "checkpoints"), sample_length=run.sample_length,
        )  # fmt: skip


@pytest.fixture
def kit(run, tokenizer, packed, tmp_path) -> Kit:
    return Kit(run, tokenizer, packed, tmp_path)


def test_equals_the_plain_loop(run, tokenizer, packed, kit: Kit):
    """Loss per target token of the global batch, clipped at the global norm, AdamW: written out without any trainer."""
    model = build_model(kit.config, tokenizer)
    optimizer = make_optimizer(model, kit.config)
    sampler = GlobalBatchSampler(len(kit.loader.dataset), 8, 8, 0, 1, 42)  # the whole batch at once
    batches = iter(build_dataloader(kit.loader.dataset, kit.collator, sampler))
    expected = []
    for step in range(6):
        batch = next(batches)
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"],
            return_logits=True,
        ).logits  # fmt: skip
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), kit.config.training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = kit.trainer.schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item()))
    records: list[StepRecord] = []
    kit.trainer.observers.append(Listener(records))
    result = kit.trainer.train()
    assert (result.cause, result.step) == ("complete", 6)
    for record, (loss, norm) in zip(records, expected, strict=True):
        assert record.loss == pytest.approx(loss, abs=1e-5)
        assert record.grad_norm == pytest.approx(norm, rel=1e-4)


class Listener:
    """Keeps what a trainer tells."""

    def __init__(self, records: list[StepRecord]) -> None:
        self.records = records
        self.evaluations: list[int] = []
        self.saved: list[int] = []
        self.alerts: list[dict] = []
        self.events: list[str] = []

    def on_step(self, record, moving_loss):
        self.records.append(record)

    def on_evaluation(self, step, metrics):
        self.evaluations.append(step)

    def on_save(self, saved):
        assert 0 < saved.blocking_seconds <= saved.seconds
        self.saved.append(saved.step)

    def on_save_failed(self, step, reason, last):
        pytest.fail(reason)

    def on_alert(self, alert):
        self.alerts.append(alert)

    def on_event(self, kind, facts):
        self.events.append(kind)

    def close(self):
        self.records.clear()


def test_tokens_and_samples_are_counted_without_padding(run, kit: Kit):
    records: list[StepRecord] = []
    listener = Listener(records)
    kit.trainer.observers.append(listener)
    kit.trainer.train()
    assert [r.samples_consumed for r in records] == [8 * step for step in range(1, 7)]
    assert [r.tokens_seen for r in records] == [8 * run.sample_length * step for step in range(1, 7)]
    assert listener.evaluations == [3, 6]
    assert listener.saved == [3, 6]
    assert [info.step for info in kit.trainer.checkpoints.list_checkpoints()] == [3, 6]


def test_evaluation_is_the_mean_over_all_target_tokens(kit: Kit):
    measured = kit.trainer.evaluate()
    total = tokens = 0.0
    for batch in kit.evaluation:
        labels = batch["labels"]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        logits = kit.model(**inputs, return_logits=True).logits
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        tokens += int((labels != -100).sum())
    assert measured["loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert kit.model.training


def test_resumed_trainer_goes_on_exactly(run, tokenizer, packed, tmp_path):
    whole = Kit(run, tokenizer, packed, tmp_path / "whole")
    whole.trainer.train()
    again = Kit(run, tokenizer, packed, tmp_path / "again")
    again.trainer.load_checkpoint(tmp_path / "whole" / "checkpoints" / "step-3")
    assert again.trainer.state.global_step == 3
    again.trainer.train()
    assert again.trainer.losses.state_dict() == whole.trainer.losses.state_dict()
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_loss_that_is_no_number_stops_the_run(kit: Kit):
    listener = Listener([])
    kit.trainer.observers.append(listener)
    with torch.no_grad():
        kit.model.shared.weight.fill_(float("nan"))
    result = kit.trainer.train()
    assert (result.cause, result.step, result.checkpoint) == ("gate", 0, None)
    assert result.message == "gate not passed: no_nan: nan_count 2, must be <= 0"
    assert [item.measured for item in result.gates.failures] == ["loss nan, squared gradient norm nan at step 1"]
    assert not kit.trainer.checkpoints.list_checkpoints()
    assert [(alert["type"], alert["step"]) for alert in listener.alerts] == [("nan", 1)]
    assert listener.events == ["gate_not_passed"]


def test_weight_decay_spares_norms(kit: Kit):
    decayed, spared = kit.trainer.optimizer.param_groups
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0
    assert {id(p) for g in (decayed, spared) for p in g["params"]} == {id(p) for p in kit.model.parameters()}


def a_record(step: int) -> StepRecord:
    return StepRecord(
        step=step, loss=2.0, grad_norm=1.0, learning_rate=1e-3, tokens_seen=10 * step, tokens_per_second=5.0,
        step_seconds=2.0, data_seconds=0.1, samples_consumed=step, memory_gb=1.0 + step, attempt=0, restart=0,
    )  # fmt: skip


def test_records_survive_a_torn_line(tmp_path: Path):
    steps, events = tmp_path / "steps.jsonl", tmp_path / "events.jsonl"
    records = Records(steps, events)
    records.on_step(a_record(1), 2.0)
    records.close()
    with steps.open("a") as stream:
        stream.write('{"step": 2, "lo')  # a killed writer
    records = Records(steps, events)
    records.on_step(a_record(3), 2.0)
    records.on_save(Saved(step=3, checkpoint_id="step-3", seconds=0.5, blocking_seconds=0.1))
    records.on_save_failed(4, "No space left on device", "step-3")
    records.close()
    assert [record["step"] for record in read_json_lines(steps)] == [1, 3]
    assert [record["event"] for record in read_json_lines(events)] == ["saved", "save_failed"]


def test_text_log_says_where_it_stands(caplog):
    caplog.set_level("INFO", logger="encdec.train")
    text = TextLog(total_steps=20, logging_steps=2)
    for step in (1, 2):
        text.on_step(a_record(step), 2.5)
    text.close()
    assert "step 2/20" in caplog.text
    assert "ETA 36 s" in caplog.text  # 18 steps of 2 s


def test_sanity_check_passes_a_good_model_and_leaves_it_as_it_was(kit: Kit, tokenizer):
    before = blake3(b"".join(p.detach().numpy().tobytes() for p in kit.model.parameters())).hexdigest()
    report = check_model(kit.model, tokenizer)
    assert report.passed, report.lines()
    assert [check.name for check in report.checks] == [
        "forward", "loss_in_range", "backward", "encoder_gradients", "decoder_gradients", "gradient_norm",
        "tied_embeddings", "generation",
    ]  # fmt: skip
    after = blake3(b"".join(p.detach().numpy().tobytes() for p in kit.model.parameters())).hexdigest()
    assert after == before
    assert all(p.grad is None for p in kit.model.parameters())


def failed(report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def test_sanity_check_finds_what_is_broken(kit: Kit, tokenizer):
    for parameter in kit.model.encoder.layers[0].mlp.parameters():
        parameter.requires_grad_(False)
    assert failed(check_model(kit.model, tokenizer)) == {"encoder_gradients"}
    kit.model.decoder.embed_tokens = torch.nn.Embedding.from_pretrained(kit.model.shared.weight.detach().clone())
    assert "tied_embeddings" in failed(check_model(kit.model, tokenizer))
    with torch.no_grad():
        kit.model.shared.weight.mul_(1e4)
    assert "loss_in_range" in failed(check_model(kit.model, tokenizer))


def test_sanity_check_command(kit: Kit, tokenizer, tmp_path: Path, capsys):
    kit.model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert sanity_main(["--model-path", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert out.count("pass  ") == 10
    assert sanity_main(["--model-path", str(tmp_path / "nowhere")]) == 1
    assert "FAIL  model_loads" in capsys.readouterr().out
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(
        json.dumps(config | {"sentinel_start_id": config["sentinel_start_id"] - 1})
    )
    assert sanity_main(["--model-path", str(tmp_path / "m")]) == 1
