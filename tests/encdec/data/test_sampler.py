"""The global order: a bijection, the same for every world size, resumable from one integer."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.data.sampler import GlobalBatchSampler, sample_ids
from encdec.errors import ConfigError


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 97, 100, 255, 256, 257, 1009, 4096, 65_537, 100_003])
def test_an_epoch_is_a_permutation(n):
    assert np.array_equal(np.sort(sample_ids(42, 3, 0, n, n)), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**63), 2**63), epoch=st.integers(0, 2**40), data=st.data())
def test_any_part_is_the_part_of_the_whole(n, seed, epoch, data):
    whole = sample_ids(seed, epoch, 0, n, n)
    assert len(set(whole.tolist())) == n
    start = data.draw(st.integers(0, n))
    count = data.draw(st.integers(0, n - start))
    assert np.array_equal(sample_ids(seed, epoch, start, count, n), whole[start : start + count])


@pytest.mark.parametrize("n", [10**8, 2**32, 2**32 + 15, 10**12, 2**47 + 1])
def test_large_epochs_stay_in_range_and_do_not_repeat(n):
    ids = sample_ids(0, 0, n - 50_000, 50_000, n)
    assert ids.min() >= 0 and ids.max() < n
    assert len(np.unique(ids)) == 50_000


def test_the_order_looks_random():
    n = 10**6
    ids = sample_ids(7, 0, 0, 100_000, n)
    counts = np.bincount(ids // 10_000, minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160, "chi-square, 99 degrees of freedom, p about 1e-4"
    # Distances of neighbours, of both parities and at a lag: a weak mixer shows here first.
    for lag in (1, 2, 64, 1024):
        assert abs(np.corrcoef(ids[:-lag], ids[lag:])[0, 1]) < 0.02
    assert abs((ids % 2).mean() - 0.5) < 0.01
    other = sample_ids(7, 1, 0, 100_000, n)
    assert (ids == other).mean() < 1e-3, "epochs differ"
    assert abs(np.corrcoef(ids, other)[0, 1]) < 0.02
    assert (sample_ids(8, 0, 0, 100_000, n) == ids).mean() < 1e-3, "seeds differ"


def test_small_epochs_reach_many_orders():
    orders = {tuple(sample_ids(0, epoch, 0, 5, 5).tolist()) for epoch in range(2000)}
    assert len(orders) > 100, "of 120"


def test_positions_outside_are_refused():
    with pytest.raises(IndexError):
        sample_ids(0, 0, 5, 6, 10)


def steps_of(world_size, micro_batch, *, count, start=0, num_samples=101, global_batch=24, seed=5):
    """Each step's keys in global order, gathered from all ranks."""
    samplers = [
        GlobalBatchSampler(num_samples, global_batch, micro_batch, rank, world_size, seed, start)
        for rank in range(world_size)
    ]
    accumulation = samplers[0].accumulation_steps
    streams = [list(islice(sampler, count * accumulation)) for sampler in samplers]
    return [
        [key for micro in range(accumulation) for stream in streams for key in stream[step * accumulation + micro]]
        for step in range(count)
    ]


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 1), (1, 8), (2, 3), (2, 12), (3, 1), (3, 4), (4, 2), (8, 1), (8, 3)]
)
def test_global_batches_do_not_depend_on_the_world(world_size, micro_batch):
    expected = steps_of(1, 24, count=10)  # crosses two epochs of 4 steps
    assert steps_of(world_size, micro_batch, count=10) == expected
    for consumed in (24, 3 * 24, 4 * 24, 7 * 24):
        assert steps_of(world_size, micro_batch, count=3, start=consumed) == expected[consumed // 24 :][:3]


def test_a_step_is_a_contiguous_piece_of_the_order():
    for step, keys in enumerate(steps_of(2, 3, count=9)):
        epoch, place = divmod(step, 4)
        assert keys == [(epoch, int(i)) for i in sample_ids(5, epoch, place * 24, 24, 101)]


def test_an_epoch_gives_each_sample_at_most_once_and_drops_the_rest():
    first_epoch = [key for keys in steps_of(1, 24, count=4) for key in keys]
    assert len(set(first_epoch)) == 96 and {epoch for epoch, _ in first_epoch} == {0}


def test_set_position_moves_the_next_iterator_only():
    sampler = GlobalBatchSampler(101, 24, 24, 0, 1, seed=5)
    running = iter(sampler)
    first = next(running)
    sampler.set_position(48)
    assert next(iter(sampler)) == steps_of(1, 24, count=3)[2]
    assert next(running) == steps_of(1, 24, count=2)[1] != first
    assert sampler.samples_consumed == 48 and sampler.epoch_at(96) == 1


def test_long_runs_look_ahead_without_changing_the_order():
    assert steps_of(2, 2, count=3000, num_samples=50_000, global_batch=8)[2999] == [
        (0, int(i)) for i in sample_ids(5, 0, 2999 * 8, 8, 50_000)
    ]


def test_impossible_batches_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="found 24 for 5 x 2"):
        GlobalBatchSampler(100, 24, 5, 0, 2, seed=0)
    with pytest.raises(ConfigError, match="found 100 samples for a global batch of 128"):
        GlobalBatchSampler(100, 128, 4, 0, 2, seed=0)
    with pytest.raises(ConfigError, match="multiple of the global batch size, 8, found 12"):
        GlobalBatchSampler(100, 8, 4, 0, 2, seed=0, samples_consumed=12)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        GlobalBatchSampler(100, 8, 4, 2, 2, seed=0)
