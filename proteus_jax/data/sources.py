"""Where images come from: random access, a length, a fingerprint.

A source is split once into images to train on and images held out, and the two never meet.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from proteus_jax.data.order import apart, chosen
from proteus_jax.errors import InputError


@runtime_checkable
class Source(Protocol):
    """Images by index. A copy in another process must cost little."""

    @property
    def fingerprint(self) -> str:
        """Changes when the images or their order do."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        ...

    def key(self, index: int) -> str:
        """The same for the same image in whatever source it is met: where it lies."""
        ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The bytes of an image's file, or its pixels uint8 [H, W, 3]; images.Unreadable where
        there are none.
        """
        ...

    def labels(self) -> np.ndarray | None:
        """The class of each image as a whole number; None where the source has no classes."""
        ...

    def digests(self) -> Sequence[bytes] | None:
        """A hash of each image's content; None where that would take long."""
        ...


class MemorySource:
    """A few images, decoded once."""

    def __init__(self, pictures: Sequence[np.ndarray], names: Sequence[str]):
        self._pictures = list(pictures)
        self._names = list(names)
        joined = hashlib.sha256()
        for picture, name in zip(self._pictures, self._names, strict=True):
            joined.update(
                f"{name} {picture.shape}".encode() + np.ascontiguousarray(picture).tobytes()
            )
        self.fingerprint = joined.hexdigest()

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, index: int) -> str:
        """The picture's name."""
        return self._names[index]

    def key(self, index: int) -> str:
        """See Source."""
        return self._names[index]

    def read(self, index: int) -> np.ndarray:
        """See Source."""
        return self._pictures[index]

    def labels(self) -> None:
        """There are no classes."""

    def digests(self) -> None:
        """Not needed: the source is split by hand."""


class Part:
    """Some images of a source, by sorted indices."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices.astype(np.int64)
        joined = hashlib.sha256(source.fingerprint.encode() + self._indices.tobytes())
        self.fingerprint = joined.hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        """See Source."""
        return self._source.name(int(self._indices[index]))

    def key(self, index: int) -> str:
        """See Source."""
        return self._source.key(int(self._indices[index]))

    def read(self, index: int) -> bytes | np.ndarray:
        """See Source."""
        return self._source.read(int(self._indices[index]))

    def labels(self) -> np.ndarray | None:
        """See Source."""
        labels = self._source.labels()
        return None if labels is None else labels[self._indices]

    def digests(self) -> Sequence[bytes] | None:
        """See Source."""
        digests = self._source.digests()
        return None if digests is None else [digests[index] for index in self._indices]


class Joined:
    """Several sources, one after the other in one index. They have no classes in common."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        joined = hashlib.sha256(" ".join(source.fingerprint for source in sources).encode())
        self.fingerprint = joined.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[number], index - (int(self._ends[number - 1]) if number else 0)

    def name(self, index: int) -> str:
        """See Source."""
        source, within = self._find(index)
        return source.name(within)

    def key(self, index: int) -> str:
        """See Source."""
        source, within = self._find(index)
        return source.key(within)

    def read(self, index: int) -> bytes | np.ndarray:
        """See Source."""
        source, within = self._find(index)
        return source.read(within)

    def labels(self) -> None:
        """There are no classes in common."""

    def digests(self) -> None:
        """Each source is split on its own."""


class Split(NamedTuple):
    """Images to train on, and images or parts of images that are never trained on (None: nothing is
    held out). `sizes` are the lengths of the training source's parts, where it is a mixture.
    """

    training: Source
    held_out: Source | None
    skipped: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[int, ...]:
        """Lengths of what is mixed; of the whole where nothing is."""
        return self.sizes or (len(self.training),)


class HeldOut(NamedTuple):
    """How many whole images a source holds out: a share, within bounds; a share of 0 holds out
    none.
    """

    share: float
    minimum: int
    maximum: int

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
        kept = chosen(seed, len(names), max(1, round(len(names) * self.classes)))
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(len(names) + 1))
        left = []
        for label in kept:
            members = order[starts[label] : starts[label + 1]]
            wanted = max(1, round(len(members) * self.images))
            left.append(members[chosen(seed, len(members), wanted, part=int(label) + 1)])
        return Part(source, np.sort(np.concatenate(left)))


WHOLE = Subset()


def split(source: Source, held_out: HeldOut, *, skipped: Sequence[str] = ()) -> Split:
    """Whole images held out. Where their content is known, which ones follows from it, so that
    equal images fall on one side.

    InputError where too few images would be left.
    """
    total, wanted = len(source), held_out.count(len(source))
    if wanted >= total:
        raise InputError(
            f"found {total} images of which {wanted} would be held out: at least {wanted + 1} are "
            f"needed, or set data.held_out.minimum lower{told(skipped)}"
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
    training = Part(source, np.flatnonzero(kept))
    return Split(training, Part(source, out) if len(out) else None, tuple(skipped))


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
        Joined(training),
        Joined(held_out) if held_out else None,
        tuple(name for split in splits for name in split.skipped),
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
    return source if len(kept) == len(source) else Part(source, np.array(kept))


def told(skipped: Sequence[str]) -> str:
    """Files that were passed over, for the end of a message."""
    if not skipped:
        return ""
    return f" ({len(skipped)} files with such a name are no images, as {skipped[0]})"


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
