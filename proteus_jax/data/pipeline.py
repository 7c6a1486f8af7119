"""From a source to batches. Which image a slot gets, and how it is augmented, is a function of
(seed, step, slot).

So a run resumes at any step, on any number of hosts, threads or workers, with the very same
batches, and nothing of the loader needs to be saved
(docs/decisions/0002-data-order-is-a-function.md).
"""

import atexit
import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import absl.flags
import grain
import numpy as np

from proteus_jax.data import images
from proteus_jax.data.augment import Recipe
from proteus_jax.data.order import Order, ViewRandomness, held_out_generator
from proteus_jax.data.sources import Source
from proteus_jax.errors import InputError

# So many images in a row that cannot be read are no accident.
MAXIMUM_REPLACEMENTS = 32
# Images that a thread or a worker makes at a time.
CHUNK = 64


class Batch(NamedTuple):
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
    order: Order
    recipe: Recipe
    batch: int
    first: int
    edges: tuple[int, ...]
    start: int

    def __call__(self, position: int) -> Batch:
        step, piece = divmod(position, len(self.edges) - 1)
        low, high = self.edges[piece : piece + 2]
        size = self.recipe.size
        count = high - low
        made = Batch(
            np.empty((count, size, size, 3), np.uint8), np.full(count, -1), np.full(count, -1)
        )
        # The same image several times in a row is read and decoded once.
        opened = functools.lru_cache(maxsize=1)(
            lambda index: images.opened(self.source.read(index), reused=self.order.repeats > 1)
        )
        randomness = ViewRandomness(self.order.seed)
        base = (self.start + step) * self.batch + self.first + low
        for place in range(count):
            draw = base + place
            made.images[place], made.unreadable[place], made.numbers[place] = self._view(
                self.order(draw).image, randomness.at(draw), opened
            )
        return made

    def _view(
        self, index: int, rng: np.random.Generator, opened: Callable[[int], images.Picture]
    ) -> tuple[np.ndarray, int, int]:
        """One slot; an unreadable image is replaced by another that the same slot chooses."""
        unreadable = -1
        for _ in range(MAXIMUM_REPLACEMENTS):
            try:
                return self.recipe(opened(index), rng), unreadable, index
            except images.Unreadable:
                unreadable = index
                index = int(rng.integers(len(self.source)))
        raise InputError(
            f"{MAXIMUM_REPLACEMENTS} images in a row cannot be read, the last one "
            f"{self.source.name(unreadable)}"
        )


def training_batches(
    source: Source,
    *,
    order: Order,
    recipe: Recipe,
    batch: int,
    steps: range,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int = 2,
) -> Generator[Batch]:
    """The batches of the given steps, this host's contiguous share of the slots of each.

    `batch` is the global size and a multiple of `hosts`. Worker processes make them, or, where
    there are none, threads of this one. To be closed, as they are made ahead.
    """
    share = batch // hosts
    edges = (*range(0, share, CHUNK), share)
    make = _Chunks(source, order, recipe, batch, host * share, edges, steps.start)
    pieces = len(edges) - 1
    return _batches(in_parallel(make, len(steps) * pieces, workers, threads), pieces)


def in_parallel(
    make: Callable[[int], Any], count: int, workers: int, threads: int
) -> Generator[Any]:
    """make(0), make(1), ... make(count - 1), in order, made ahead by worker processes or, where
    there are none, by threads. Processes and their shared memory end with the generator, or at the
    latest with this process; what it yields is to be copied before the next is asked for.
    """
    dataset = grain.MapDataset.range(count).map(make)
    if workers:
        # Grain's workers read its flags, which only programs of absl.app have parsed.
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()
        ahead = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        ).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_start_worker,
        )
    else:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        ahead = dataset.to_iter_dataset(options)
    return _closing(iter(ahead))


def _closing(iterator: grain.DatasetIterator[Any]) -> Generator[Any]:
    opened = [iterator]
    del iterator

    def close() -> None:
        if opened:
            opened.pop().close()
            _await_release()

    # A script may end without closing what it opened, and a generator cannot tell.
    atexit.register(close)
    try:
        # No variable holds what was yielded, or the iterator: both must go when `close` lets go.
        with contextlib.suppress(StopIteration):
            while True:
                yield next(opened[0])
    finally:
        close()
        atexit.unregister(close)


def _batches(chunks: Generator[Batch], pieces: int) -> Generator[Batch]:
    """So many pieces put together, again and again."""
    with contextlib.closing(chunks):
        while made := list(itertools.islice(chunks, pieces)):
            # Copied in any case: pieces from workers lie in memory that is theirs.
            batch = Batch(*(np.concatenate(part) for part in zip(*made, strict=True)))
            del made
            yield batch


def _await_release() -> None:
    """Grain lets go of the last pieces only when their circle of references is collected, and then
    frees them in a thread; an exit before that would leave them behind, with a warning.
    """
    gc.collect()
    maps, deadline = Path("/proc/self/maps"), time.monotonic() + 2.0
    while maps.exists() and "/dev/shm/psm_" in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    # Their names go a moment after their pages.
    time.sleep(0.05)


def worker_count(asked: int | None) -> int:
    """Worker processes for this host: as many as asked for, or its cores less two; none where there
    are four or fewer.
    """
    if asked is not None:
        return asked
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return cores - 2 if cores > 4 else 0


def _start_worker(index: int, count: int) -> None:
    # An interrupt from the keyboard, and a scheduler's request to end, reach every process of the
    # group; the main one decides what becomes of them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed run must not leave processes that wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _remove_open_segments()
        os._exit(1)


def _remove_open_segments() -> None:
    """Of shared memory that this worker was about to fill: Python's tracker, which removes all
    others, may not have heard of it yet.
    """
    files = Path("/proc/self/fd")
    for file in files.iterdir() if files.is_dir() else ():
        with contextlib.suppress(OSError):
            name = file.readlink()
            if name.is_relative_to("/dev/shm") and name.name.startswith("psm_"):
                name.unlink()


def held_out_views(source: Source, *, count: int, size: int) -> tuple[np.ndarray, list[int]]:
    """At least `count` fixed views uint8 [n, size, size, 3] of a held-out source, and the images
    that were unreadable.

    At least one view an image, the same number of each; the same for every seed, so that runs can
    be compared. Cropped and flipped, and no more.
    """
    recipe = Recipe(size)
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
            picture = images.opened(source.read(index))
            views.append(recipe(picture, held_out_generator(index, turn)))
        except images.Unreadable:
            unreadable.append(index)
    if not views:
        raise InputError(f"none of the {len(source)} held-out images can be read")
    return np.stack(views), unreadable
