"""Images to train on and images held out: a source is split once, and the two never meet."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from proteus_jax.data.passed_over import NOTHING, PassedOver, joined
from proteus_jax.data.sampler import apart, subset_indices
from proteus_jax.data.sources.base import ConcatSource, MemorySource, Source, SubsetSource
from proteus_jax.errors import InputError


class Split(NamedTuple):
    """Images to train on, and images or parts of images that are never trained on (None: nothing is
    held out). `sizes` are the lengths of the training source's parts, where it is a mixture.
    """

    training: Source
    held_out: Source | None
    passed_over: PassedOver = NOTHING
    sizes: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[int, ...]:
        """Lengths of what is mixed; of the whole where nothing is."""
        return self.sizes or (len(self.training),)


class HeldOut(NamedTuple):
    """How many whole images a source holds out: a share, within bounds; a share of 0 holds out
    none. `views` is the least number of fixed views of them to measure on.
    """

    share: float
    minimum: int
    maximum: int
    views: int = 128

    def count(self, total: int) -> int:
        """The number for a source of `total` images."""
        if self.share == 0:
            return 0
        return min(max(round(total * self.share), self.minimum), self.maximum)


class Subset(NamedTuple):
    """A part of the images to train on, drawn by the run's seed: a share of the classes, then a
    share of the images of each class.
    """

    classes: float = 1.0
    images: float = 1.0

    def of(self, source: Source, seed: int) -> Source:
        """The images that are left; at least one class, and one image of each.

        InputError where the source has no classes.
        """
        if self.classes == 1 and self.images == 1:
            return source
        labels = source.labels()
        if labels is None:
            if self.classes < 1:
                raise InputError("data.subset.classes: these images have no classes")
            labels = np.zeros(len(source), np.int64)
        names, labels = np.unique(labels, return_inverse=True)
        kept = subset_indices(seed, len(names), max(1, round(len(names) * self.classes)))
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(len(names) + 1))
        left = []
        for label in kept:
            members = order[starts[label] : starts[label + 1]]
            wanted = max(1, round(len(members) * self.images))
            left.append(members[subset_indices(seed, len(members), wanted, part=int(label) + 1)])
        return SubsetSource(source, np.sort(np.concatenate(left)))


WHOLE = Subset()


def split(source: Source, held_out: HeldOut, passed_over: PassedOver = NOTHING) -> Split:
    """Whole images held out. Where their content is known, which ones follows from it, so that
    equal images fall on one side.

    InputError where too few images would be left.
    """
    total, wanted = len(source), held_out.count(len(source))
    if wanted >= total:
        raise InputError(
            f"found {total} images of which {wanted} would be held out: at least {wanted + 1} are "
            f"needed, or set data.held_out.minimum lower{_in_brackets(passed_over)}"
        )
    digests = source.digests()
    out = apart(total, wanted) if digests is None else _by_content(digests, wanted)
    if wanted and not len(out):
        raise InputError(
            f"found {total} images that are copies of each other, so that none can be held out; "
            "--config.data.held_out.share=0 trains on all"
        )
    kept = np.ones(total, bool)
    kept[out] = False
    training = SubsetSource(source, np.flatnonzero(kept))
    return Split(training, SubsetSource(source, out) if len(out) else None, passed_over)


def split_within(pictures: Sequence[np.ndarray], names: Sequence[str]) -> Split:
    """The left three quarters of each picture to train on, the right quarters held out.

    InputError where a picture is too narrow for that.
    """
    for picture, name in zip(pictures, names, strict=True):
        if picture.shape[1] < 4:
            raise InputError(f"{name}: expected at least 4 pixels across, found {picture.shape[1]}")
    edges = [picture.shape[1] * 3 // 4 for picture in pictures]
    left = [picture[:, :edge].copy() for picture, edge in zip(pictures, edges, strict=True)]
    right = [picture[:, edge:].copy() for picture, edge in zip(pictures, edges, strict=True)]
    return Split(MemorySource(left, names), MemorySource(right, names))


def mixed(splits: Sequence[Split]) -> Split:
    """Several sources, each split on its own, as one. What one of them holds out, no other trains
    on: roots may overlap.

    InputError where nothing is left of one.
    """
    if len(splits) == 1:
        return splits[0]
    held_out = [split.held_out for split in splits if split.held_out is not None]
    out = {key for source in held_out for key in _keys(source)}
    training = [_without(split.training, out) for split in splits]
    return Split(
        ConcatSource(training),
        ConcatSource(held_out) if held_out else None,
        joined(split.passed_over for split in splits),
        tuple(map(len, training)),
    )


def _keys(source: Source) -> Iterator[str | bytes]:
    """All that tells a source's images: where they lie, and their contents where known."""
    yield from map(source.key, range(len(source)))
    yield from source.digests() or ()


def _without(source: Source, out: set[str | bytes]) -> Source:
    digests = source.digests() or [b""] * len(source)
    kept = [
        index
        for index, digest in enumerate(digests)
        if digest not in out and source.key(index) not in out
    ]
    if not kept:
        raise InputError("all images of one root are held out by another")
    return source if len(kept) == len(source) else SubsetSource(source, np.array(kept))


def _in_brackets(passed_over: PassedOver) -> str:
    """Returns what was passed over in brackets, for the end of a message."""
    lines = "; ".join(passed_over.lines())
    return f" (passed over: {lines})" if lines else ""


def _by_content(digests: Sequence[bytes], wanted: int) -> np.ndarray:
    """Indices of about `wanted` images, never more: equal contents together, in the order of their
    hashes.
    """
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    out: list[int] = []
    for digest in sorted(groups):
        if len(out) + len(groups[digest]) <= wanted:
            out += groups[digest]
    return np.sort(np.array(out, np.int64))
