"""Sources of images: random access, a length, a fingerprint."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from proteus_jax.data.decode import LazyImage, open_image
from proteus_jax.data.pillow_images import Decoding


class Columns(NamedTuple):
    """The columns of images and of classes of a set that has columns; found where none is named."""

    image: str = ""
    label: str = ""


FOUND = Columns()


@runtime_checkable
class Source(Protocol):
    """Images by index. A copy in another process must cost little."""

    # Changes when the images or their order do.
    fingerprint: str

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

    def open(self, index: int, *, reused: bool = False) -> LazyImage:
        """The picture of an image; `reused` where more than one view of it is wanted. Unreadable
        where there is none.
        """
        return open_image(self.read(index), reused=reused)

    def path(self, index: int) -> str | None:
        """The path of an image below the root, by which folders are classes; None where the
        source has no folders.
        """
        return None

    def labels(self) -> np.ndarray | None:
        """The class of each image as a whole number, -1 of one that has none; None where no image
        has a class. InputError where a label cannot be one.
        """
        return None

    def class_names(self) -> Sequence[str]:
        """Names of the classes by number; none where the numbers are all there is."""
        return ()

    def digests(self) -> Sequence[bytes] | None:
        """A hash of each image's content; None where that would take long."""
        return None


def folder_classes(names: Iterable[str]) -> np.ndarray | None:
    """The class of each image by the directory that holds it; None where one holds all."""
    parents = [PurePosixPath(name).parent.as_posix() for name in names]
    labels = np.unique(parents, return_inverse=True)[1]
    return labels if labels.max(initial=0) else None


class MemorySource(Source):
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


class _Wrapped(Source):
    """A source whose images are those of others."""

    def _within(self, index: int) -> tuple[Source, int]:
        """The source of an image, and its index there."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """See Source."""
        source, within = self._within(index)
        return source.name(within)

    def key(self, index: int) -> str:
        """See Source."""
        source, within = self._within(index)
        return source.key(within)

    def read(self, index: int) -> bytes | np.ndarray:
        """See Source."""
        source, within = self._within(index)
        return source.read(within)

    def open(self, index: int, *, reused: bool = False) -> LazyImage:
        """See Source."""
        source, within = self._within(index)
        return source.open(within, reused=reused)

    def path(self, index: int) -> str | None:
        """See Source."""
        source, within = self._within(index)
        return source.path(within)


class SubsetSource(_Wrapped):
    """Some images of a source, by sorted indices."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices.astype(np.int64)
        joined = hashlib.sha256(source.fingerprint.encode() + self._indices.tobytes())
        self.fingerprint = joined.hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def _within(self, index: int) -> tuple[Source, int]:
        return self._source, int(self._indices[index])

    def labels(self) -> np.ndarray | None:
        """See Source."""
        labels = self._source.labels()
        return None if labels is None else labels[self._indices]

    def class_names(self) -> Sequence[str]:
        """See Source."""
        return self._source.class_names()

    def digests(self) -> Sequence[bytes] | None:
        """See Source."""
        digests = self._source.digests()
        return None if digests is None else [digests[index] for index in self._indices]


class ConcatSource(_Wrapped):
    """Several sources, one after the other in one index. They have no classes in common, and are
    split one by one.
    """

    def __init__(self, sources: Sequence[Source]):
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        joined = hashlib.sha256(" ".join(source.fingerprint for source in sources).encode())
        self.fingerprint = joined.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _within(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[number], index - (int(self._ends[number - 1]) if number else 0)

    def path(self, index: int) -> str | None:
        """Folders of several places are no classes."""
        return None


class _Same(_Wrapped):
    """A source in another light: the same images in the same order."""

    def __init__(self, source: Source):
        self._source = source
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def _within(self, index: int) -> tuple[Source, int]:
        return self._source, index

    def labels(self) -> np.ndarray | None:
        """See Source."""
        return self._source.labels()

    def class_names(self) -> Sequence[str]:
        """See Source."""
        return self._source.class_names()

    def digests(self) -> Sequence[bytes] | None:
        """See Source."""
        return self._source.digests()


class BelowSource(_Same):
    """A source all of whose images lie in one folder, as seen from inside that folder."""

    def __init__(self, source: Source, folder: str):
        super().__init__(source)
        self._folder = folder

    def path(self, index: int) -> str | None:
        """See Source."""
        path = self._source.path(index)
        return None if path is None else path.removeprefix(f"{self._folder}/")


class DecodedSource(_Same):
    """A source whose files become pixels in another way than the usual one."""

    def __init__(self, source: Source, decoding: Decoding):
        super().__init__(source)
        self._decoding = decoding

    def open(self, index: int, *, reused: bool = False) -> LazyImage:
        """See Source."""
        return open_image(self.read(index), self._decoding, reused=reused)
