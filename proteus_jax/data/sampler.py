"""Which image a slot gets, as a function of (seed, slot): no state, so nothing to save or lose.

docs/decisions/0002-data-order-is-a-function.md
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# One stream of randomness for each use, told apart in the counter of the generator.
_EPOCH, _VIEW, _HELD_OUT, _PART, _SUBSET, _SPLIT = 1, 2, 3, 4, 5, 6


class SampleIndex(NamedTuple):
    """An image and how many times it was drawn before in a row, for repeated augmentation."""

    image: int
    repeat: int


def _bits(seed: int, stream: int, index: int, part: int = 0) -> np.random.Philox:
    return np.random.Philox(key=[seed, index], counter=[0, 0, part, stream])


class ViewRandomness:
    """The randomness of training views, one generator set to one draw after another: to make a
    generator for each takes longer than all that is drawn from it. Not for several threads.
    """

    def __init__(self, seed: int):
        self._bits = _bits(seed, _VIEW, 0)
        self._generator = np.random.Generator(self._bits)
        self._start = self._bits.state

    def at(self, draw: int) -> np.random.Generator:
        """The generator, at the beginning of a draw's own stream."""
        self._start["state"]["key"][1] = draw
        self._bits.state = self._start
        return self._generator


def held_out_generator(index: int, turn: int) -> np.random.Generator:
    """The randomness of one held-out view: the same for every seed, so that runs compare."""
    return np.random.Generator(_bits(index, _HELD_OUT, turn))


def _permutation(seed: int, stream: int, epoch: int, length: int, part: int = 0) -> np.ndarray:
    # Raw bits and a stable sort: unlike Generator.permutation these do not change with numpy's
    # version.
    bits = _bits(seed, stream, epoch, part).random_raw(length)
    order = np.argsort(bits, kind="stable")
    return order.astype(np.uint32) if length < 2**32 else order


def subset_indices(seed: int, length: int, wanted: int, part: int = 0) -> np.ndarray:
    """`wanted` of `length` indices, sorted, drawn without replacement; a larger number contains
    a smaller.
    """
    return np.sort(_permutation(seed, _SUBSET, 0, length, part)[:wanted].astype(np.int64))


def apart(length: int, wanted: int) -> np.ndarray:
    """`wanted` of `length` indices, sorted, the same for every seed."""
    return np.sort(_permutation(0, _SPLIT, 0, length)[:wanted].astype(np.int64))


class Sampler(NamedTuple):
    """The order of a run over one data set, or over several that follow each other in one index.

    `sizes` are the lengths of the parts. Without weights every epoch of sum(sizes) images sees
    each image once. With weights an epoch is as long, and a part fills its exact share of it: the
    part's own epochs follow each other over the run's. Each image is drawn `repeats` times in a
    row, so that an epoch of as many draws sees a `repeats`-th of the images, and `repeats` epochs
    see all.
    """

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...] = ()
    repeats: int = 1

    def __call__(self, draw: int) -> SampleIndex:
        """The image of the draw-th slot since the start of training."""
        number, repeat = divmod(draw, self.repeats)
        epoch, place = divmod(number, sum(self.sizes))
        return SampleIndex(int(_epoch(self.seed, epoch, self.sizes, self.weights)[place]), repeat)


# The epoch of today, and the one before for draws at the border.
@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, sizes: tuple[int, ...], weights: tuple[float, ...]) -> np.ndarray:
    """The images of an epoch in their order."""
    places = _permutation(seed, _EPOCH, epoch, sum(sizes))
    if not weights:
        return places
    permutations, first = [], 0
    for part, (size, count) in enumerate(zip(sizes, shares(sum(sizes), weights), strict=True)):
        # This epoch's stretch of the part's own epochs, one after the other.
        start, stop = epoch * count, (epoch + 1) * count
        turns = [
            _permutation(seed, _PART, turn, size, part)
            for turn in range(start // size, -(-stop // size))
        ]
        within = start - start // size * size
        # A small part of a small share may have none of an epoch.
        drawn = np.concatenate(turns or [np.empty(0, np.uint32)])
        permutations.append(first + drawn[within : within + count])
        first += size
    return np.concatenate(permutations)[places]


def shares(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to the weights whose sum is `total`."""
    edges = np.cumsum(weights) / np.sum(weights) * total
    return tuple(np.diff(np.round(edges), prepend=0).astype(int).tolist())
