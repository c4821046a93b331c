"""Speed of the data path on one core, each figure beside a peer measured in the same run.

The peer collator is a stand-in: the classic per-example T5 collator (nanoT5, Hugging Face's Flax T5 script and their
descendants), written here anew after the published algorithm, with the same task mixture and lengths as ours.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from encdec.data.collator import UL2DataCollator
from encdec.data.corpus import open_corpus
from encdec.data.packing import pack_corpus
from encdec.data.sampler import sample_ids
from encdec.denoisers import UL2_DENOISERS

EOS, PAD, FIRST_SENTINEL = 1, 0, 151_700


class BenchmarkTokenizer:
    """Stands in for the trained one: sentinels, and one id per four bytes of text at no cost worth mentioning."""

    eos_token_id, pad_token_id = EOS, PAD
    sentinel_ids = list(range(FIRST_SENTINEL, FIRST_SENTINEL + 100))

    def __len__(self) -> int:
        return 151_936

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        return [[2 + byte for byte in text.encode()[::4]] for text in texts]

    def fingerprint(self) -> str:
        return "benchmark"


def random_spans_noise_mask(length: int, rate: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """[L] bool: the mask of T5's `random_spans_noise_mask`, as ported to numpy by its users."""
    noise = min(max(round(length * rate), 1), length - 1)
    spans = max(1, round(noise / mean_span))

    def random_segmentation(items: int, segments: int) -> np.ndarray:
        first_in_segment = np.arange(items - 1) < segments - 1
        rng.shuffle(first_in_segment)
        segment_ids = np.cumsum(np.pad(first_in_segment, [[1, 0]]))
        return np.unique(segment_ids, return_counts=True)[1]

    interleaved = np.stack([random_segmentation(length - noise, spans), random_segmentation(noise, spans)], axis=1)
    starts = np.cumsum(interleaved.reshape(-1))[:-1]
    indicator = np.zeros(length, dtype=np.int8)
    indicator[starts] = True
    return np.cumsum(indicator) % 2 == 1


def sentinel_ids_of(mask: np.ndarray) -> np.ndarray:
    """[1, L] int: a sentinel where a span starts, -1 inside a span, 0 elsewhere."""
    starts = mask - np.roll(mask, 1, axis=-1) * mask
    starts[:, 0] = mask[:, 0]
    sentinels = np.where(starts != 0, np.cumsum(starts, axis=-1), starts)
    return np.where(sentinels != 0, FIRST_SENTINEL - 1 + sentinels, 0) - (mask - starts)


def filtered(tokens: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """[n + 1] int: tokens with each span as its sentinel, and EOS."""
    full = np.where(sentinels != 0, sentinels, tokens)
    return np.concatenate([full[full >= 0], [EOS]])


def classic_collator(examples: list[dict], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """One example at a time: draw a task and a mask, build both sides by masks, then pad."""
    cumulative = np.cumsum([denoiser.weight for denoiser in UL2_DENOISERS])
    rows = []
    for example in examples:
        tokens = example["tokens"].astype(np.int64)
        denoiser = UL2_DENOISERS[np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")]
        if denoiser.mean_span < 1:  # prefix LM: given the short cut that our own code takes
            prefix = len(tokens) - round(len(tokens) * denoiser.noise_rate)
            encoder = np.concatenate([tokens[:prefix], [FIRST_SENTINEL, EOS]])
            decoder = np.concatenate([[FIRST_SENTINEL], tokens[prefix:], [EOS]])
        else:
            mask = random_spans_noise_mask(len(tokens), denoiser.noise_rate, denoiser.mean_span, rng)[None]
            encoder = filtered(tokens[None], sentinel_ids_of(mask.astype(np.int8)))
            decoder = filtered(tokens[None], sentinel_ids_of((~mask).astype(np.int8)))
        rows.append((torch.from_numpy(encoder), torch.from_numpy(decoder)))
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad([encoder for encoder, _ in rows], batch_first=True, padding_value=PAD)
    labels = pad([decoder for _, decoder in rows], batch_first=True, padding_value=-100)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": labels}


def best_seconds(work: Callable[[], object], budget: float) -> float:
    """Seconds of CPU of the fastest call, repeated for `budget` seconds (CPU time: neighbours do not count)."""
    work()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def measure_collation(batch_size: int, seconds: float) -> dict:
    """M raw tokens/s of both collators for L = 512, 1024, 2048."""
    rng, results = np.random.default_rng(0), {}
    ours = UL2DataCollator(BenchmarkTokenizer(), 4096, 4096)
    for length in (512, 1024, 2048):
        tokens = rng.integers(2, 150_000, (8, batch_size, length)).astype(np.uint32)
        batches = [
            [{"key": (epoch, row), "tokens": sample} for row, sample in enumerate(batch)]
            for epoch, batch in enumerate(tokens)
        ]
        count = tokens.size / 1e6
        our_rate = count / best_seconds(lambda batches=batches: [ours(batch) for batch in batches], seconds)
        rate = count / best_seconds(lambda batches=batches: [classic_collator(b, rng) for b in batches], seconds)
        results[length] = {"ours": our_rate, "classic": rate, "ratio": our_rate / rate}
    return results


def measure_packing(documents: int) -> dict:
    """M tokens/s of packing without the tokenizer's own time, which is subtracted."""
    corpus, tokenizer = open_corpus("python-stdlib", max_examples=documents), BenchmarkTokenizer()
    start = time.process_time()
    for text in corpus.documents():
        tokenizer.encode_documents([text])
    reading = time.process_time() - start
    with tempfile.TemporaryDirectory() as directory:
        start = time.process_time()
        index = pack_corpus(corpus, tokenizer, Path(directory, "packed"), sample_length=1024)
        packing = time.process_time() - start - reading
    return {"packing": sum(split.tokens for split in index.splits.values()) / 1e6 / max(packing, 1e-9)}


def measure_shuffle(samples: int, seconds: float) -> dict:
    """ns per index of our order, in chunks of 65,536, and of numpy's permutation of all."""
    chunk, chunks = 65_536, 8
    ours = best_seconds(lambda: [sample_ids(1, 0, c * chunk, chunk, samples) for c in range(chunks)], seconds)
    rng = np.random.default_rng(0)
    start = time.process_time()
    rng.permutation(samples)
    theirs = (time.process_time() - start) / samples * 1e9
    ours *= 1e9 / (chunk * chunks)
    return {"ours": ours, "permutation": theirs, "ratio": ours / theirs}


def main() -> None:
    """Measures and prints; --json for programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per batch for the collators")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per measured figure")
    parser.add_argument("--documents", type=int, default=200, help="documents of the standard library to pack")
    parser.add_argument("--shuffle-samples", type=int, default=10**7,
                        help="samples of the epoch to shuffle; 100000000 takes about 10 s and 0.9 GB")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, whatever numpy or torch would like
    torch.set_num_threads(1)
    results = {
        "collation": measure_collation(arguments.batch_size, arguments.seconds),
        "packing": measure_packing(arguments.documents),
        "shuffle": measure_shuffle(arguments.shuffle_samples, arguments.seconds),
    }
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    print(f"corruption + collation, batch {arguments.batch_size}, M raw tokens/s on one core")
    for length, row in results["collation"].items():
        print(f"  L {length:5d}   ours {row['ours']:6.1f}   classic {row['classic']:6.2f}   ratio {row['ratio']:5.1f}")
    print(f"packing beside the tokenizer, M tokens/s on one core   {results['packing']['packing']:.1f}")
    row = results["shuffle"]
    print(f"shuffle of {arguments.shuffle_samples:,}, ns/index   ours {row['ours']:.1f}"
          f"   permutation {row['permutation']:.1f}   ratio {row['ratio']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
