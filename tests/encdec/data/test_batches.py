"""From packed shards to tensors: the same samples and the same noise for every way of loading them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from byte_tokenizer import ByteTokenizer

from encdec.data.collator import UL2DataCollator
from encdec.data.packing import open_packed
from encdec.data.sampler import GlobalBatchSampler
from encdec.data.ul2_dataset import EvaluationBatches, UL2Dataset, build_dataloader, create_ul2_dataset
from encdec.denoisers import UL2_DENOISERS, raw_sample_length
from encdec.errors import ConfigError

LENGTH = raw_sample_length(96, 96, 512, 100)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> UL2Dataset:
    root = tmp_path_factory.mktemp("data")
    lines = (json.dumps({"text": f"text number {number} " * 9}) + "\n" for number in range(400))
    (root / "text.jsonl").write_text("".join(lines))
    return create_ul2_dataset(
        str(root / "text.jsonl"), ByteTokenizer(), max_seq_length=LENGTH, packed_dir=root / "packed",
        validation_fraction=0.2,
    )  # fmt: skip


@pytest.fixture
def collator(tokenizer) -> UL2DataCollator:
    return UL2DataCollator(tokenizer, 96, 96)


def rows_of(batch: dict[str, torch.Tensor]) -> dict[int, tuple]:
    """Per sample id: the corrupted sample, without padding."""
    rows = zip(batch["sample_ids"], batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    return {int(i): (tuple(x[m.bool()].tolist()), tuple(y[y != -100].tolist())) for i, x, m, y in rows}


def take_steps(dataset, collator, world_size, micro_batch, workers, start, steps):
    """Per step, what all ranks together train on."""
    found = [{} for _ in range(steps)]
    for rank in range(world_size):
        sampler = GlobalBatchSampler(len(dataset), 24, micro_batch, rank, world_size, 1, start)
        batches = iter(build_dataloader(dataset, collator, sampler, num_workers=workers))
        for number, batch in enumerate(islice(batches, steps * sampler.accumulation_steps)):
            assert len(batch["input_ids"]) == micro_batch
            found[number // sampler.accumulation_steps].update(rows_of(batch))
    return found


def test_the_stream_is_the_same_however_it_is_loaded(dataset, collator):
    steps_per_epoch = len(dataset) // 24
    expected = take_steps(dataset, collator, 1, 24, 0, 0, steps_per_epoch + 2)
    assert all(len(step) == 24 for step in expected)
    for world_size, micro_batch, workers, first in (
        (1, 3, 0, 0), (2, 12, 0, 1), (2, 3, 1, 2), (3, 8, 0, 2), (4, 6, 0, 0), (8, 3, 0, steps_per_epoch), (1, 6, 2, 1),
    ):  # fmt: skip
        got = take_steps(dataset, collator, world_size, micro_batch, workers, first * 24, 2)
        assert got == expected[first : first + 2], (world_size, micro_batch, workers, first)


def test_a_persistent_loader_starts_again_at_the_samplers_position(dataset, collator):
    expected = take_steps(dataset, collator, 1, 24, 0, 0, 3)
    sampler = GlobalBatchSampler(len(dataset), 24, 24, 0, 1, 1)
    loader = build_dataloader(dataset, collator, sampler, num_workers=1)
    assert rows_of(next(iter(loader))) == expected[0]
    sampler.set_position(48)
    assert rows_of(next(iter(loader))) == expected[2]


def test_workers_leave_signals_to_the_rank(dataset, collator):
    sampler = GlobalBatchSampler(len(dataset), 24, 24, 0, 1, 1)
    batches = iter(build_dataloader(dataset, collator, sampler, num_workers=1))
    next(batches)
    (worker,) = batches._workers
    for number in (signal.SIGUSR2, signal.SIGINT):
        os.kill(worker.pid, number)
    stranger = os.fork()
    if stranger == 0:
        os.kill(worker.pid, signal.SIGTERM)
        os._exit(0)
    os.waitpid(stranger, 0)
    for _ in range(6):
        next(batches)
    assert worker.is_alive(), "SIGTERM of someone else is for the rank"
    with contextlib.suppress(RuntimeError):  # torch's SIGCHLD handler, which may run at any line from here on
        worker.terminate()
        worker.join(10)
    with contextlib.suppress(RuntimeError):
        worker.join(10)
    assert not worker.is_alive(), "SIGTERM of the rank ends the worker"


def test_an_epoch_shows_a_sample_with_other_noise(dataset, collator):
    tokens = dataset[0, 3]["tokens"]
    rows = [rows_of(collator([{"key": (epoch, 3), "tokens": tokens}]))[3] for epoch in range(20)]
    assert len(set(rows)) > 5, "half of the epochs draw the prefix task, which is always the same"


@pytest.mark.parametrize("pad", [0, 1])
def test_masks_come_from_lengths_even_where_padding_is_eos(dataset, pad):
    collator = UL2DataCollator(ByteTokenizer(pad_token_id=pad), 96, 96, pad_to_multiple_of=8)
    batch = collator(dataset.__getitems__([(0, sample_id) for sample_id in range(16)]))
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[1] % 8 == batch["labels"].shape[1] % 8 == 0
    last = batch["attention_mask"].sum(dim=1) - 1
    ends = batch["input_ids"].gather(1, last[:, None])
    assert (ends == 1).all(), "EOS is inside the mask"
    assert (batch["input_ids"][batch["attention_mask"] == 0] == pad).all()
    assert (torch.diff(batch["attention_mask"], dim=1) <= 0).all()
    for labels in batch["labels"]:
        kept = labels[labels != -100]
        assert kept[-1] == 1 and (labels[len(kept) :] == -100).all()


def test_a_sample_that_does_not_fit_is_refused_not_cut(dataset, tokenizer):
    samples = dataset.__getitems__([(0, sample_id) for sample_id in range(32)])
    with pytest.raises(ConfigError, match="fit 50 decoder tokens"):
        UL2DataCollator(tokenizer, 96, 50)(samples)
    with pytest.raises(ConfigError, match="fit 40 encoder tokens"):
        UL2DataCollator(tokenizer, 40, 96)(samples)
    tight = UL2DataCollator(tokenizer, 96, 96, pad_to_multiple_of=64)(samples)
    assert max(tight["input_ids"].shape[1], tight["labels"].shape[1]) <= 96, "rounding up never exceeds the limit"
    with pytest.raises(ConfigError, match="one length"):
        UL2DataCollator(tokenizer, 96, 96)([samples[0], {"key": (0, 1), "tokens": np.arange(5)}])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_gives_each_sample_once_and_each_rank_as_many_batches(dataset, collator, world_size):
    validation = open_packed(dataset.packed.directory, "validation")
    ranks = [
        list(EvaluationBatches(validation, collator, batch_size=4, max_samples=21, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {-(-21 // (4 * world_size))}
    ids = [int(i) for batches in ranks for batch in batches for i in batch["sample_ids"] if i >= 0]
    assert sorted(ids) == list(range(21))
    fillers = [b for batches in ranks for b in batches if (b["sample_ids"] < 0).any()]
    assert all((filler["labels"] == -100).all() and len(filler["labels"]) == 1 for filler in fillers)
    again = list(EvaluationBatches(validation, collator, batch_size=4, max_samples=21, world_size=world_size))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(again, ranks[0], strict=True))
    assert len(EvaluationBatches(open_packed(dataset.packed.directory, "validation"), collator, batch_size=4,
                                 max_samples=0)) == 0  # fmt: skip


def test_a_dataset_is_packed_once_per_what_it_was_made_from(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 500)
    options = {"tokenizer": ByteTokenizer(), "packed_dir": tmp_path / "packed", "validation_fraction": 0.0}
    for length in (32, 32, 64):
        dataset = create_ul2_dataset(str(tmp_path / "a.txt"), max_seq_length=length, **options)
        assert dataset[0, 0]["tokens"].size == length
    assert len([path for path in (tmp_path / "packed").iterdir() if path.is_dir()]) == 2


def test_mode_tokens_open_the_encoder_inputs_and_change_nothing_else(dataset):
    modes, samples = [301, 302, 303], [dataset[(0, index)] for index in range(40)]
    plain = UL2DataCollator(ByteTokenizer(), 96, 96, pad_to_multiple_of=1)
    opened = UL2DataCollator(ByteTokenizer(), 97, 96, pad_to_multiple_of=1, mode_token_ids=modes)
    without, batch = plain(samples), opened(samples)
    tasks = plain.corruptor.draw_tasks([sample["key"] for sample in samples])
    names = [UL2_DENOISERS[task].name[0] for task in tasks]
    assert set(names) == {"R", "S", "X"}
    assert batch["input_ids"][:, 0].tolist() == [modes["RSX".index(name)] for name in names]
    assert torch.equal(batch["input_ids"][:, 1:], without["input_ids"])
    assert torch.equal(batch["attention_mask"].sum(1), without["attention_mask"].sum(1) + 1)
    assert torch.equal(batch["labels"], without["labels"])
    longest = int(without["attention_mask"].sum(1).max())
    with pytest.raises(ConfigError, match=f"must fit {longest} encoder tokens"):
        UL2DataCollator(ByteTokenizer(), longest, 96, mode_token_ids=modes)(samples)
