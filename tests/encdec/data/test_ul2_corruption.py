"""Every known way of getting span corruption wrong, as a property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec.data.ul2_corruption import UL2Corruptor
from encdec.denoisers import UL2_DENOISERS, raw_sample_length
from encdec.errors import ConfigError, DataError

EOS = 1
SENTINELS = list(range(100_000, 100_100))


def only(task: int) -> list[int]:
    return [int(index == task) for index in range(len(UL2_DENOISERS))]


def reconstruct(encoder: np.ndarray, decoder: np.ndarray, sentinels: list[int]) -> np.ndarray:
    """The raw tokens, read back by nothing but the sentinels: what a model can infer from a perfect answer."""
    known, spans, current = set(sentinels), {}, None
    for token in decoder[:-1].tolist():
        if token in known:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return np.array([raw for token in encoder[:-1].tolist() for raw in (spans[token] if token in known else [token])])


samples = st.tuples(
    st.integers(2, 700),  # L
    st.integers(0, 4),  # task
    st.integers(-(2**40), 2**40),  # seed
    st.integers(0, 2**31),  # epoch
    st.integers(0, 2**47),  # sample id
    st.integers(1, 100),  # sentinels
)


@settings(max_examples=300, deadline=None)
@given(samples)
def test_both_sides_tell_the_whole_sample(case):
    length, task, seed, epoch, sample_id, num_sentinels = case
    sentinels = SENTINELS[:num_sentinels]
    tokens = np.arange(10, 10 + length)  # all different, so that a swap would show
    encoder, decoder = UL2Corruptor(sentinels, EOS, only(task), seed).corrupt(tokens, epoch, sample_id)
    noise, spans = UL2_DENOISERS[task].counts(length, num_sentinels)

    assert np.array_equal(reconstruct(encoder, decoder, sentinels), tokens)
    assert encoder[-1] == decoder[-1] == EOS
    assert (encoder == EOS).sum() == (decoder == EOS).sum() == 1
    used = [token for token in encoder.tolist() if token >= SENTINELS[0]]
    assert used == sentinels[:spans], "each sentinel once, in order, on the encoder side"
    assert [token for token in decoder.tolist() if token >= SENTINELS[0]] == used, "the same on the decoder side"
    assert len(decoder) == noise + spans + 1, "the noise count is exact"
    assert len(encoder) == length - noise + spans + 1
    assert encoder[0] == tokens[0], "keep first"
    assert encoder[-2] == used[-1], "noise last: the last token can be masked"
    at = np.flatnonzero(encoder[:-1] >= SENTINELS[0])
    assert (np.diff(np.concatenate([[-1], at])) > 1).all(), "no empty kept segment"
    assert (np.diff(np.append(np.flatnonzero(decoder >= SENTINELS[0]), len(decoder) - 1)) > 1).all(), "no empty span"


@pytest.mark.parametrize(("length", "task", "counts"), [
    (512, 0, (77, 26)), (512, 1, (256, 21)), (512, 2, (77, 2)), (512, 3, (256, 8)), (512, 4, (384, 1)),
    (2010, 0, (302, 100)), (4000, 0, (600, 100)),  # sentinels run out: spans are capped, the noise count stays
    (2, 0, (1, 1)), (3, 4, (2, 1)), (8192, 4, (6144, 1)),
])  # fmt: skip
def test_counts_follow_the_table(length, task, counts):
    assert UL2_DENOISERS[task].counts(length, 100) == counts


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 300), size=st.integers(1, 40), seed=st.integers(0, 99), first=st.integers(0, 10**9))
def test_a_batch_is_its_samples_one_by_one(length, size, seed, first):
    corruptor = UL2Corruptor(SENTINELS, EOS, seed=seed)
    keys = [(row % 3, first + row) for row in range(size)]
    tokens = np.random.default_rng(seed).integers(10, 60_000, (size, length)).astype(np.uint16)
    batch = corruptor.corrupt_batch(tokens, keys)
    for row, key in enumerate(keys):
        encoder, decoder = corruptor.corrupt(tokens[row], *key)
        assert np.array_equal(batch.encoder_ids[row, : batch.encoder_lengths[row]], encoder)
        assert np.array_equal(batch.decoder_ids[row, : batch.decoder_lengths[row]], decoder)
        assert (batch.encoder_ids[row, batch.encoder_lengths[row] :] == 0).all()
        assert (batch.decoder_ids[row, batch.decoder_lengths[row] :] == -100).all()


def test_large_batches_cross_blocks():
    corruptor = UL2Corruptor(SENTINELS, EOS)
    tokens = np.tile(np.arange(10, 2010, dtype=np.uint32), (64, 1))  # several blocks of rows
    batch = corruptor.corrupt_batch(tokens, [(1, row) for row in range(64)])
    for row in range(64):
        encoder = batch.encoder_ids[row, : batch.encoder_lengths[row]]
        decoder = batch.decoder_ids[row, : batch.decoder_lengths[row]]
        assert np.array_equal(reconstruct(encoder, decoder, SENTINELS), tokens[row])


def test_results_never_share_memory_with_the_next_call():
    corruptor, tokens = UL2Corruptor(SENTINELS, EOS, only(0)), np.arange(10, 500)[None]
    first = corruptor.corrupt_batch(tokens, [(0, 0)])
    copy = first.encoder_ids.copy()
    corruptor.corrupt_batch(tokens, [(0, 1)])
    assert np.array_equal(first.encoder_ids, copy)


def test_noise_depends_on_seed_epoch_and_sample_and_nothing_else():
    tokens = np.arange(10, 500)

    def encoder_side(seed: int, epoch: int, sample_id: int) -> list[int]:
        return UL2Corruptor(SENTINELS, EOS, only(0), seed).corrupt(tokens, epoch, sample_id)[0].tolist()

    base = encoder_side(1, 3, 7)
    np.random.seed(0)  # the global generator must not matter
    assert encoder_side(1, 3, 7) == base
    for other in ((2, 3, 7), (1, 4, 7), (1, 3, 8), (1, 7, 3)):
        assert encoder_side(*other) != base


def test_tasks_come_in_their_weights():
    keys = [(0, row) for row in range(40_000)]
    share = np.bincount(UL2Corruptor(SENTINELS, EOS).draw_tasks(keys), minlength=5) / len(keys)
    assert share == pytest.approx([1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 2], abs=0.01)
    assert set(UL2Corruptor(SENTINELS, EOS, [0, 1, 0, 2, 0]).draw_tasks(keys).tolist()) == {1, 3}


def test_every_cut_is_equally_likely():
    corruptor = UL2Corruptor(SENTINELS[:2], EOS, only(1))
    length = 36  # R2: N = 18, s = 2: 17 cuts
    keys = [(0, row) for row in range(17_000)]
    batch = corruptor.corrupt_batch(np.tile(np.arange(10, 10 + length), (len(keys), 1)), keys)
    first_span = (batch.decoder_ids == SENTINELS[1]).argmax(axis=1) - 1
    first_kept = (batch.encoder_ids == SENTINELS[0]).argmax(axis=1)
    for cuts in (first_span, first_kept):
        counts = np.bincount(cuts, minlength=18)[1:18]
        assert counts.sum() == len(keys)
        assert ((counts - 1000) ** 2 / 1000).sum() < 45, "chi-square, 16 degrees of freedom, p about 1e-4"
    assert abs(np.corrcoef(first_span, first_kept)[0, 1]) < 0.03


@settings(max_examples=150, deadline=None)
@given(
    encoder=st.integers(8, 3000), decoder=st.integers(8, 3000), cap=st.integers(2, 6000), sentinels=st.integers(1, 150)
)
def test_raw_sample_length_is_the_largest_that_fits(encoder, decoder, cap, sentinels):
    length = raw_sample_length(encoder, decoder, cap, sentinels)

    def fits(raw: int) -> bool:
        sides = [denoiser.side_lengths(raw, sentinels) for denoiser in UL2_DENOISERS]
        return all(side[0] <= encoder and side[1] <= decoder for side in sides)

    assert fits(length)
    assert length == cap or not fits(length + 1)


def test_raw_sample_length_of_the_defaults():
    assert raw_sample_length(4096, 2048, 8192, 100) == 2728
    assert raw_sample_length(4096, 2048, 8192, 100, [1, 1, 1, 1, 0]) > 3800, "without S, the targets are shorter"
    with pytest.raises(ConfigError, match="must fit"):
        raw_sample_length(2, 2, 8192, 100)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [0] * 5, [1, 1, 1, 1, -1], [1, 1, 1, 1, float("nan")]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ConfigError, match="ul2_task_weights"):
        UL2Corruptor(SENTINELS, EOS, weights)


def test_bad_sentinels_and_shapes_are_refused():
    for sentinels in ([], [5, 5], [EOS, 7]):
        with pytest.raises(ConfigError, match="sentinel"):
            UL2Corruptor(sentinels, EOS)
    with pytest.raises(DataError, match="shape"):
        UL2Corruptor(SENTINELS, EOS).corrupt_batch(np.zeros((2, 8), dtype=int), [(0, 0)])
    with pytest.raises(ConfigError, match="never cut"):
        UL2Corruptor(SENTINELS, EOS).corrupt_batch(np.zeros((1, 64), dtype=int), [(0, 0)], decoder_limit=5)
