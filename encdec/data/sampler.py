"""The global order of samples: a keyed shuffle, and the batches of one rank in it.

Positions are places in an epoch's shuffled order; sample ids are places in the packed data. One optimizer step of G
samples takes the positions [c, c + G) of its epoch, whatever the number of ranks, workers or the micro-batch size:

    positions   c ........................................ c + G
    micro-step  |        0        |        1        | ...        (accumulation)
    rank        | 0 | 1 | ... | W | 0 | 1 | ... | W |            (micro-batch samples each)

The whole state is one integer: the number of samples that all ranks together have consumed.

Source of the shuffle: generalised Feistel cipher over Z_a x Z_b with cycle walking (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", CT-RSA 2002).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from encdec.data.randomness import key_of
from encdec.data.ul2_corruption import SampleKey
from encdec.errors import ConfigError

_ROUNDS = 6
_MULTIPLIERS = (np.uint32(0x7FEB_352D), np.uint32(0x846C_A68B))  # lowbias32 (Wellons, Hash Prospector)
# Permuted at a time: many enough to hide the cost of numpy's calls, few enough to stay in the L2 cache.
_BLOCK = 32_768
# Sample ids a rank computes ahead, so that a step does not pay for a handful of numpy calls of its own.
_LOOKAHEAD = 4_096


def sample_ids(seed: int, epoch: int, start: int, count: int, num_samples: int) -> np.ndarray:
    """Ids at the positions [start, start + count) of an epoch's shuffled order.

    A bijection of range(num_samples) for every (seed, epoch); time and memory are O(count), not O(num_samples).

    Args:
        seed, epoch: key of the order.
        start, count: positions, 0 <= start and start + count <= num_samples.
        num_samples: samples of the epoch, at most 2**48.

    Returns:
        [count] int64.
    """
    if not 0 <= start <= start + count <= num_samples:
        raise IndexError(f"positions [{start}, {start + count}) of {num_samples} samples")
    return shuffled(range(start, start + count), seed, epoch, num_samples)


def shuffled(positions: np.ndarray | range, seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """[n] int64: the sample ids at any positions [n] (integers below num_samples) of an epoch's shuffled order."""
    low_bits = max(1, num_samples.bit_length() // 2)
    high_count = -(-num_samples >> low_bits)  # high_count * 2**low_bits >= num_samples, by little: few walks
    word = np.uint32 if high_count << low_bits < 2**32 else np.uint64
    keys = [np.uint32(key_of(seed, epoch, turn) >> 32) for turn in range(_ROUNDS)]
    ids = np.empty(len(positions), dtype=np.int64)
    for first in range(0, len(positions), _BLOCK):
        here = positions[first : first + _BLOCK]
        here = np.arange(here.start, here.stop, dtype=word) if isinstance(here, range) else here.astype(word)
        block = _feistel(here, low_bits, high_count, keys)
        outside = np.flatnonzero(block >= word(num_samples))
        while len(outside):  # walk the cycle until it comes back inside
            walked = _feistel(block[outside], low_bits, high_count, keys)
            block[outside] = walked
            outside = outside[walked >= word(num_samples)]
        ids[first : first + _BLOCK] = block
    return ids


def _feistel(numbers: np.ndarray, low_bits: int, high_count: int, keys: list[np.uint32]) -> np.ndarray:
    """A keyed bijection of range(high_count * 2**low_bits) on uint32 or uint64 [n]; high_count <= 2**24.

    Rounds alternate between the halves: the low one (a power of two) is combined by xor, the high one by addition
    modulo high_count.
    """
    word = numbers.dtype.type
    low = (numbers & word((1 << low_bits) - 1)).astype(np.uint32, copy=False)
    high = (numbers >> word(low_bits)).astype(np.uint32, copy=False)
    mixed, scratch = np.empty_like(low), np.empty_like(low)
    fractions, whole = np.empty(len(low), dtype=np.float32), mixed.view(np.int32)
    for turn, key in enumerate(keys):
        np.add(low if turn % 2 else high, key, out=mixed)
        mixed *= _MULTIPLIERS[0]  # multiply, xorshift, multiply: the top bits are well mixed
        mixed ^= np.right_shift(mixed, np.uint32(15), out=scratch)
        mixed *= _MULTIPLIERS[1]
        if turn % 2 == 0:
            mixed >>= np.uint32(32 - low_bits)
            low ^= mixed
            continue
        mixed >>= np.uint32(8)
        # 24 bits are exact in float32. Rounding up to high_count is harmless: it counts as 0 below.
        np.multiply(whole, np.float32(high_count / 2**24), out=fractions, dtype=np.float32, casting="unsafe")
        np.copyto(whole, fractions, casting="unsafe")
        high += mixed
        # Where high < high_count the difference wraps to a huge number, so the minimum is high mod high_count.
        np.minimum(high, np.subtract(high, np.uint32(high_count), out=scratch), out=high)
    numbers = high.astype(word, copy=False)
    numbers <<= word(low_bits)
    numbers |= low
    return numbers


class GlobalBatchSampler:
    """This rank's micro-batches, for ever, as lists of (epoch, sample id): for DataLoader(batch_sampler=...).

    What it yields is a function of (seed, samples consumed); all ranks together take the same global batches at any
    world size, micro-batch size and worker count. The last `num_samples % global_batch_size` positions of each
    epoch's order are dropped; as the order differs from epoch to epoch, so do the samples left out.

    A DataLoader with workers runs ahead of training, so the trainer counts the samples it has consumed itself
    (steps * global_batch_size) and hands that number back through `samples_consumed` or `set_position`.

    Args:
        num_samples: samples of the training split.
        global_batch_size: G, samples per optimizer step over all ranks.
        micro_batch_size: samples per rank and forward pass.
        rank, world_size: this rank and their number.
        seed: key of the order, beside the epoch.
        samples_consumed: global samples already trained on, a multiple of G.

    Raises:
        ConfigError: G is not a multiple of micro_batch_size * world_size, exceeds num_samples, or does not divide
            samples_consumed; the rank is not below world_size.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        samples_consumed: int = 0,
    ) -> None:
        if not 0 <= rank < world_size or micro_batch_size < 1 or global_batch_size < 1:
            raise ConfigError(
                "0 <= rank < world size, micro-batch >= 1 and global batch >= 1 must hold",
                found=f"rank {rank} of {world_size}, micro-batch {micro_batch_size}, global batch {global_batch_size}",
                remedy="Correct training.per_device_train_batch_size or the launch",
            )
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                "the global batch must be a multiple of micro-batch size x world size",
                found=f"{global_batch_size} for {micro_batch_size} x {world_size}",
                remedy="Change training.per_device_train_batch_size or the number of ranks so that it divides evenly",
            )
        if global_batch_size > num_samples:
            raise ConfigError(
                "the training split must hold at least one global batch",
                found=f"{num_samples} samples for a global batch of {global_batch_size}",
                remedy="Use more text, a smaller data.max_seq_length or a smaller global batch",
            )
        self.num_samples, self.seed = num_samples, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.set_position(samples_consumed)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of this rank per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the incomplete last batch is dropped."""
        return self.num_samples // self.global_batch_size

    @property
    def samples_consumed(self) -> int:
        """Where the next iterator starts, in global samples. It does not move while an iterator runs."""
        return self._samples_consumed

    def set_position(self, samples_consumed: int) -> None:
        """Makes the NEXT iterator start after so many global samples; a running one goes on.

        Raises:
            ConfigError: not a multiple of the global batch size.
        """
        if samples_consumed < 0 or samples_consumed % self.global_batch_size:
            raise ConfigError(
                f"samples consumed must be a multiple of the global batch size, {self.global_batch_size}",
                found=samples_consumed,
                remedy="Resume with the global batch size of the checkpoint (adjust gradient_accumulation_steps)",
            )
        self._samples_consumed = samples_consumed

    def epoch_at(self, samples_consumed: int) -> int:
        """The epoch that the step after so many global samples belongs to."""
        return samples_consumed // self.global_batch_size // self.steps_per_epoch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, step = divmod(self._samples_consumed // self.global_batch_size, self.steps_per_epoch)
        steps_ahead = max(1, _LOOKAHEAD * self.world_size // self.global_batch_size)
        while True:
            while step < self.steps_per_epoch:
                steps = min(steps_ahead, self.steps_per_epoch - step)
                for micro_batch in self._micro_batches(epoch, step, steps).tolist():
                    yield [(epoch, sample_id) for sample_id in micro_batch]
                step += steps
            epoch, step = epoch + 1, 0

    def _micro_batches(self, epoch: int, step: int, steps: int) -> np.ndarray:
        """[steps * accumulation steps, micro-batch] int64: this rank's sample ids."""
        stride = self.micro_batch_size * self.world_size  # positions that all ranks take per micro-step
        firsts = np.arange(steps * self.accumulation_steps) * stride
        firsts += step * self.global_batch_size + self.rank * self.micro_batch_size
        positions = firsts[:, None] + np.arange(self.micro_batch_size)
        ids = shuffled(positions.reshape(-1), self.seed, epoch, self.num_samples)
        return ids.reshape(positions.shape)
