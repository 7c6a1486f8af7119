"""From a source to batches. Which image a slot gets, and how it is augmented, is a function of
(seed, step, slot).

So a run resumes at any step, on any number of hosts, threads or workers, with the very same
batches, and nothing of the loader needs to be saved
(docs/decisions/0002-data-order-is-a-function.md).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from proteus_jax.data.augment import random_view
from proteus_jax.data.images import Unreadable
from proteus_jax.data.sources import Source
from proteus_jax.errors import InputError

# One stream of randomness for each use, told apart in the counter of the generator.
_ORDER, _VIEW, _HELD_OUT = 1, 2, 3
# So many images in a row that cannot be read are no accident.
MAXIMUM_REPLACEMENTS = 32


class Batch(NamedTuple):
    """Images uint8 [b, size, size, 3], and the source's index of an image that could not be read,
    or -1, for each.
    """

    images: np.ndarray
    unreadable: np.ndarray


def _bits(seed: int, stream: int, index: int) -> np.random.Philox:
    return np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream])


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    # Raw bits and a stable sort: unlike Generator.permutation these do not change with numpy's
    # version.
    bits = _bits(seed, _ORDER, epoch).random_raw(length)
    return np.argsort(bits, kind="stable")


def sample_index(seed: int, draw: int, length: int) -> int:
    """The image of the draw-th slot since the start of training: every epoch of `length` draws sees
    each image once.
    """
    epoch, position = divmod(draw, length)
    return int(_permutation(seed, epoch, length)[position])


def _sample(draw: int, *, source: Source, seed: int, size: int) -> Batch:
    """One slot; an unreadable image is replaced by another, chosen by the same slot."""
    rng = np.random.Generator(_bits(seed, _VIEW, draw))
    index = sample_index(seed, draw, len(source))
    unreadable = -1
    for _ in range(MAXIMUM_REPLACEMENTS):
        try:
            return Batch(random_view(source.image(index), rng, size), np.asarray(unreadable))
        except Unreadable:
            unreadable = index
            index = int(rng.integers(len(source)))
    raise InputError(
        f"{MAXIMUM_REPLACEMENTS} images in a row cannot be read, the last one "
        f"{source.name(unreadable)}"
    )


def training_batches(
    source: Source,
    *,
    size: int,
    batch: int,
    steps: range,
    seed: int,
    host: int = 0,
    hosts: int = 1,
    threads: int = 2,
) -> grain.DatasetIterator[Batch]:
    """The batches of the given steps, this host's contiguous share of the slots of each.

    `batch` is the global size and a multiple of `hosts`.
    """
    share = batch // hosts

    def draw(position: int) -> int:
        step, slot = divmod(position, share)
        return step * batch + host * share + slot

    dataset = grain.MapDataset.range(steps.start * share, steps.stop * share)
    dataset = dataset.map(draw).map(functools.partial(_sample, source=source, seed=seed, size=size))
    # Grain reads ahead by samples, in threads: Pillow lets go of the interpreter while it decodes
    # and resizes.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * share)
    return iter(dataset.to_iter_dataset(options).batch(share, batch_fn=_stack))


def _stack(samples: Sequence[Batch]) -> Batch:
    return Batch(*(np.stack(parts) for parts in zip(*samples, strict=True)))


def held_out_views(source: Source, *, count: int, size: int) -> tuple[np.ndarray, list[int]]:
    """At least `count` fixed views uint8 [n, size, size, 3] of a held-out source, and the images
    that were unreadable.

    At least one view an image, the same number of each; the same for every seed, so that runs can
    be compared.
    """
    each = -(-count // len(source))
    total = max(count, len(source))
    views, unreadable = [], []
    for number in range(len(source) * each):
        if len(views) == total:
            break
        index, turn = number % len(source), number // len(source)
        if index in unreadable:
            continue
        rng = np.random.Generator(_bits(index, _HELD_OUT, turn))
        try:
            views.append(random_view(source.image(index), rng, size))
        except Unreadable:
            unreadable.append(index)
    if not views:
        raise InputError(f"none of the {len(source)} held-out images can be read")
    return np.stack(views), unreadable
