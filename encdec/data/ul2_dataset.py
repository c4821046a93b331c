"""From a corpus's name to batches: the packed dataset, its loader, and the evaluation batches."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from blake3 import blake3
from torch.utils.data import DataLoader, Dataset

from encdec.data.collator import Sample, UL2DataCollator
from encdec.data.corpus import open_corpus
from encdec.data.packed import TRAIN, PackedDataset
from encdec.data.packing import TextTokenizer, ensure_packed, open_packed
from encdec.data.sampler import GlobalBatchSampler
from encdec.data.ul2_corruption import IGNORED_LABEL, SampleKey

logger = logging.getLogger(__name__)


class UL2Dataset(Dataset):
    """Packed samples, addressed by (epoch, sample id) as GlobalBatchSampler yields them.

    The epoch does not change the tokens; it goes along because the corruption depends on it.
    """

    def __init__(self, packed: PackedDataset) -> None:
        self.packed = packed

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.packed)

    def __getitem__(self, key: SampleKey) -> Sample:
        """One sample.

        Raises:
            IndexError: no such sample.
        """
        return Sample(key=key, tokens=self.packed[key[1]])

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Sample]:
        """A micro-batch of samples, in the order of the keys."""
        return [self[key] for key in keys]


def create_ul2_dataset(
    dataset_name: str,
    tokenizer: TextTokenizer,
    streaming: bool = True,
    max_seq_length: int = 2728,
    *,
    split: str = TRAIN,
    packed_dir: Path | str = "data",
    text_column: str = "text",
    dataset_config: str | None = None,
    max_examples: int | None = None,
    validation_fraction: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> UL2Dataset:
    """Packs a corpus once and opens a split of it.

    Args:
        dataset_name: "python-stdlib", a path, or a name on the Hugging Face hub (see `open_corpus`).
        tokenizer: turns text into ids.
        streaming: whether a hub dataset is streamed while it is packed, or downloaded first.
        max_seq_length: L, raw tokens per sample. Take it from `raw_sample_length`, so that every task fits; the
            default fits encoder and decoder limits of 4096 and 2048 tokens.
        split: "train" or "validation".
        packed_dir: packed data of all corpora go here, each in a directory named by what it was made from.
        text_column, dataset_config, max_examples: see `open_corpus`.
        validation_fraction: share of documents held out.
        progress: see `pack_corpus`.

    Raises:
        DataError: see `pack_corpus`.
        MissingPrerequisite: a hub dataset cannot be reached, and it has not been packed before.
    """
    corpus = open_corpus(
        dataset_name,
        text_column=text_column,
        dataset_config=dataset_config,
        streaming=streaming,
        max_examples=max_examples,
    )
    made_from = f"{corpus.fingerprint()} {tokenizer.fingerprint()} {max_seq_length} {validation_fraction}"
    name = re.sub(r"[^\w.-]+", "-", dataset_name).strip("-.")[-60:] or "corpus"
    directory = Path(packed_dir) / f"{name}-{blake3(made_from.encode()).hexdigest(8)}"
    ensure_packed(
        corpus,
        tokenizer,
        directory,
        sample_length=max_seq_length,
        validation_fraction=validation_fraction,
        progress=progress,
    )
    return UL2Dataset(open_packed(directory, split))


def build_dataloader(
    dataset: UL2Dataset,
    collator: UL2DataCollator,
    sampler: GlobalBatchSampler,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of this rank's micro-batches in the sampler's order, whatever the number of workers.

    It never ends. Each `iter()` starts at the sampler's position; workers stay alive between iterators.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_the_rank if num_workers else None,
    )


def _leave_signals_to_the_rank(worker: int) -> None:
    """Lets only the rank process answer a cluster's or a terminal's signals, which reach all processes of a job.

    A worker that dies of one takes the rank down before it has saved. SIGTERM from the rank itself must still end the
    worker, or the interpreter could not exit: so it is received by a thread that looks at who sent it.
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    rank_process = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def end_when_the_rank_says_so() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in {rank_process, os.getpid()}:
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end_when_the_rank_says_so, daemon=True).start()


class EvaluationBatches:
    """The first samples of the validation split, in fixed order with fixed noise, shared among the ranks.

    Every rank gets the same number of batches, because under FSDP each forward pass is collective. No sample is
    given twice: where a rank has none left it gets a filler batch, one sample with all labels -100 and sample id -1.
    Batches may differ in size, so sum losses over label tokens and divide by the tokens of all ranks; the mean loss of
    a filler batch is 0 / 0.

    Args:
        packed: the validation split.
        collator: as in training; corruption uses epoch 0 at every evaluation.
        batch_size: samples per rank and batch.
        max_samples: N, over all ranks; fewer where the split is smaller.
        rank, world_size: this rank and their number.
    """

    def __init__(
        self,
        packed: PackedDataset,
        collator: UL2DataCollator,
        *,
        batch_size: int,
        max_samples: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset, self.collator, self.batch_size = UL2Dataset(packed), collator, batch_size
        self.rank, self.world_size = rank, world_size
        self.num_samples = min(max_samples, len(packed))

    def __len__(self) -> int:
        """Batches per rank; 0 where the split is empty."""
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for turn in range(len(self)):
            first = (turn * self.world_size + self.rank) * self.batch_size
            keys = [(0, sample_id) for sample_id in range(first, min(first + self.batch_size, self.num_samples))]
            yield self.collator(self.dataset.__getitems__(keys)) if keys else self._filler()

    def _filler(self) -> dict[str, torch.Tensor]:
        batch = self.collator([self.dataset[0, 0]])
        batch["labels"].fill_(IGNORED_LABEL)
        batch["sample_ids"].fill_(-1)
        return batch
