"""Where images come from: random access, a length, a fingerprint.

A source is split once into images to train on and images held out, and the two never meet.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from proteus_jax.data import images
from proteus_jax.errors import InputError

# Enough of a file to tell it from every other; reading all of a million files would take hours.
HASHED_BYTES = 1 << 16


@runtime_checkable
class Source(Protocol):
    """Images by index."""

    @property
    def fingerprint(self) -> str:
        """Changes when the images or their order do."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        ...

    def image(self, index: int) -> np.ndarray:
        """Uint8 [H, W, 3]; images.Unreadable where it cannot be decoded."""
        ...


class Split(NamedTuple):
    """Images to train on, and images or parts of images that are never trained on (None: nothing is
    held out).
    """

    training: Source
    held_out: Source | None
    skipped: tuple[str, ...] = ()


class FileSource:
    """Image files, decoded at each access."""

    def __init__(self, root: Path, names: Sequence[str], digests: Sequence[bytes]):
        self._root = root
        self._names = list(names)
        joined = hashlib.sha256()
        for name, digest in zip(names, digests, strict=True):
            joined.update(name.encode(errors="surrogateescape") + b"\0" + digest)
        self.fingerprint = joined.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The path below the root."""
        return self._names[index]

    def image(self, index: int) -> np.ndarray:
        """See Source."""
        return images.read(self._root / self._names[index])


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

    def image(self, index: int) -> np.ndarray:
        """See Source."""
        return self._pictures[index]


class HeldOut(NamedTuple):
    """How many whole images a folder holds out: a share, within bounds; a share of 0 holds out
    none.
    """

    share: float
    minimum: int
    maximum: int

    def count(self, total: int) -> int:
        """The number for a folder of `total` images."""
        if self.share == 0:
            return 0
        return min(max(round(total * self.share), self.minimum), self.maximum)


def open_folder(root: str | Path, held_out: HeldOut) -> Split:
    """Every JPEG, PNG, WebP and BMP of a tree, without labels. Files that are no images are skipped
    and told.

    Which images are held out follows from a hash of their content, so equal files always fall on
    one side. InputError where the folder is missing or too few images would be left.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise InputError(f"{root}: no such folder")
    names, digests, skipped = [], [], []
    for name in _files_below(folder):
        digest = _digest(folder / name)
        if digest is None:
            skipped.append(name)
        else:
            names.append(name)
            digests.append(digest)
    if not names:
        raise InputError(
            f"{root}: no image ({', '.join(images.SUFFIXES)}) below it" + _told(skipped)
        )
    wanted = held_out.count(len(names))
    if wanted >= len(names):
        raise InputError(
            f"{root}: found {len(names)} images of which {wanted} would be held out: at least "
            f"{wanted + 1} are "
            "needed, or set data.held_out.minimum lower" + _told(skipped)
        )
    apart = _chosen(digests, wanted)

    def part(chosen: bool) -> FileSource:
        indices = [index for index in range(len(names)) if (index in apart) == chosen]
        return FileSource(folder, [names[i] for i in indices], [digests[i] for i in indices])

    return Split(part(False), part(True) if apart else None, tuple(skipped))


def _told(skipped: Sequence[str]) -> str:
    if not skipped:
        return ""
    return f" ({len(skipped)} files with such a name are no images, as {skipped[0]})"


def _files_below(folder: Path) -> list[str]:
    """Relative paths of files with an image's suffix, sorted; links are followed, loops are not."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for directory, below, files in os.walk(folder, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # In a fixed order: which of two links to one directory is met first must not depend on the
        # disk.
        below.sort()
        relative = Path(directory).relative_to(folder)
        found += [
            (relative / file).as_posix() for file in files if file.lower().endswith(images.SUFFIXES)
        ]
    return sorted(found)


def _digest(path: Path) -> bytes | None:
    """A hash of a file's size and beginning; None where it cannot be read or does not begin like an
    image.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HASHED_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    if not images.looks_like_image(head):
        return None
    return hashlib.sha256(size.to_bytes(8, "little") + head).digest()


def _chosen(digests: Sequence[bytes], wanted: int) -> set[int]:
    """Indices of about `wanted` files, never more: equal contents together, in the order of their
    hashes.
    """
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    chosen: set[int] = set()
    for digest in sorted(groups):
        if len(chosen) + len(groups[digest]) <= wanted:
            chosen.update(groups[digest])
    return chosen
