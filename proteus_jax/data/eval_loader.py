"""Images as evaluation sees them: each once, in their order, cut the same way every time."""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np

from proteus_jax.data.sources.base import Source
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.data.workers import assembled, edges_of, in_parallel
from proteus_jax.errors import Unreadable

# Slots of an incomplete batch, and images that cannot be read.
NOTHING = -1


class EvalBatch(NamedTuple):
    """Images uint8 [b, crop, crop, 3], and the number of each in its source, or NOTHING."""

    images: np.ndarray
    numbers: np.ndarray


class _Pieces(NamedTuple):
    """Makes this host's share of one batch after the other, piece by piece."""

    source: Source
    view: CenterCrop
    chosen: Sequence[int] | np.ndarray
    batch: int
    first: int
    edges: tuple[int, ...]

    def __call__(self, position: int) -> EvalBatch:
        number, piece = divmod(position, len(self.edges) - 1)
        low, high = self.edges[piece : piece + 2]
        first = number * self.batch + self.first + low
        side, count = self.view.crop, high - low
        made = EvalBatch(
            np.zeros((count, side, side, 3), np.uint8), np.full(count, NOTHING, np.int32)
        )
        for slot, image in enumerate(self.chosen[first : first + count]):
            try:
                made.images[slot] = self.view(self.source.open(int(image)))
                made.numbers[slot] = image
            except Unreadable:
                continue
        return made


def evaluation_batches(
    source: Source,
    view: CenterCrop,
    *,
    batch: int,
    chosen: Sequence[int] | np.ndarray | None = None,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int = 2,
) -> Generator[EvalBatch]:
    """This host's share of each batch; every image, or every chosen one, is in one of them. All
    batches are of one size: what is missing from the last one is zeros, its number NOTHING, as that
    of an image that cannot be read. To be closed.
    """
    picked = range(len(source)) if chosen is None else np.asarray(chosen)
    share = batch // hosts
    edges = edges_of(share)
    make = _Pieces(source, view, picked, batch, host * share, edges)
    pieces = -(-len(picked) // batch) * (len(edges) - 1)
    return assembled(in_parallel(make, pieces, workers, threads), edges)
