"""Sources of images: random access, a length, a fingerprint."""

import hashlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Source(Protocol):
    """Images by index. A copy in another process must cost little."""

    @property
    def fingerprint(self) -> str:
        """Changes when the images or their order do."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of an image in messages."""
        ...

    def key(self, index: int) -> str:
        """The same for the same image in whatever source it is met: where it lies."""
        ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The bytes of an image's file, or its pixels uint8 [H, W, 3]; Unreadable where
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
        """See Source. Two parts of one picture have its name, and are not the same."""
        return f"{self.fingerprint} {self._names[index]}"

    def read(self, index: int) -> np.ndarray:
        """See Source."""
        return self._pictures[index]

    def labels(self) -> None:
        """There are no classes."""

    def digests(self) -> None:
        """Not needed: the source is split by hand."""


class SubsetSource:
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


class ConcatSource:
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
