"""From a source to batches. Which image a slot gets, and how it is augmented, is a function of
(seed, step, slot).

So a run resumes at any step, on any number of hosts, threads or workers, with the very same
batches, and nothing of the loader needs to be saved
(docs/decisions/0002-data-order-is-a-function.md).
"""

import functools
from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np

from proteus_jax.data import decode
from proteus_jax.data.sampler import Sampler, ViewRandomness, held_out_generator
from proteus_jax.data.sources.base import Source
from proteus_jax.data.transforms.random_resized_crop import TrainTransform
from proteus_jax.data.workers import assembled, edges_of, in_parallel
from proteus_jax.errors import InputError, Unreadable

# So many images in a row that cannot be read are no accident.
MAXIMUM_REPLACEMENTS = 32


class HostBatch(NamedTuple):
    """Images uint8 [b, size, size, 3], for each the source's index of an image that could not be
    read, or -1, and the index of the image that is there.
    """

    images: np.ndarray
    unreadable: np.ndarray
    numbers: np.ndarray


class _Chunks(NamedTuple):
    """Makes this host's share of the steps' batches, piece by piece, in order.

    Pieces of a bounded number of images: what a worker process holds does not grow with the
    batch.
    """

    source: Source
    order: Sampler
    recipe: TrainTransform
    batch: int
    first: int
    edges: tuple[int, ...]
    start: int

    def __call__(self, position: int) -> HostBatch:
        step, piece = divmod(position, len(self.edges) - 1)
        low, high = self.edges[piece : piece + 2]
        size = self.recipe.size
        count = high - low
        made = HostBatch(
            np.empty((count, size, size, 3), np.uint8), np.full(count, -1), np.full(count, -1)
        )
        # The same image several times in a row is read and decoded once.
        open_once = functools.lru_cache(maxsize=1)(
            lambda index: self.source.open(index, reused=self.order.repeats > 1)
        )
        randomness = ViewRandomness(self.order.seed)
        base = (self.start + step) * self.batch + self.first + low
        for place in range(count):
            draw = base + place
            made.images[place], made.unreadable[place], made.numbers[place] = self._view(
                self.order(draw).image, randomness.at(draw), open_once
            )
        return made

    def _view(
        self, index: int, rng: np.random.Generator, open_once: Callable[[int], decode.LazyImage]
    ) -> tuple[np.ndarray, int, int]:
        """One slot; an unreadable image is replaced by another that the same slot chooses."""
        unreadable = -1
        for _ in range(MAXIMUM_REPLACEMENTS):
            try:
                return self.recipe(open_once(index), rng), unreadable, index
            except Unreadable:
                unreadable = index
                index = int(rng.integers(len(self.source)))
        raise InputError(
            f"{MAXIMUM_REPLACEMENTS} images in a row cannot be read, the last one "
            f"{self.source.name(unreadable)}"
        )


def training_batches(
    source: Source,
    *,
    order: Sampler,
    recipe: TrainTransform,
    batch: int,
    steps: range,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int = 2,
) -> Generator[HostBatch]:
    """The batches of the given steps, this host's contiguous share of the slots of each.

    `batch` is the global size and a multiple of `hosts`. Worker processes make them, or, where
    there are none, threads of this one. To be closed, as they are made ahead.
    """
    share = batch // hosts
    edges = edges_of(share)
    make = _Chunks(source, order, recipe, batch, host * share, edges, steps.start)
    pieces = len(steps) * (len(edges) - 1)
    return assembled(in_parallel(make, pieces, workers, threads), edges)


def held_out_views(source: Source, *, count: int, size: int) -> tuple[np.ndarray, list[int]]:
    """At least `count` fixed views uint8 [n, size, size, 3] of a held-out source, and the images
    that were unreadable.

    At least one view an image, the same number of each; the same for every seed, so that runs can
    be compared. Cropped and flipped, and no more.
    """
    recipe = TrainTransform(size)
    each = -(-count // len(source))
    total = max(count, len(source))
    views, unreadable = [], []
    for number in range(len(source) * each):
        if len(views) == total:
            break
        index, turn = number % len(source), number // len(source)
        if index in unreadable:
            continue
        try:
            picture = source.open(index)
            views.append(recipe(picture, held_out_generator(index, turn)))
        except Unreadable:
            unreadable.append(index)
    if not views:
        raise InputError(f"none of the {len(source)} held-out images can be read")
    return np.stack(views), unreadable
