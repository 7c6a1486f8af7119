"""Looks through a tree of files: its images, and what else there is."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from proteus_jax.data import image_formats
from proteus_jax.data.passed_over import PassedOver, is_clutter, kind_of
from proteus_jax.runtime import remote_fs


class Walk:
    """Every image of a tree, and what else there is; links are followed, loops are not."""

    def __init__(self, root: str):
        self._root = root
        self._seen: set[tuple[int, int]] = set()
        self._kinds: Counter[str] = Counter()
        self._hidden = 0
        # Each directory and its time of change; and what could not be read.
        self.directories: list[tuple[str, int]] = []
        self._unreadable: list[str] = []

    def files(self, below: str) -> Iterator[tuple[str, int]]:
        """Names and sizes in bytes, in no order."""
        here, prefix, inside = os.path.join(self._root, below), f"{below}/" if below else "", []
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in self._seen:
                return
            self._seen.add((status.st_dev, status.st_ino))
            self.directories.append((below, status.st_mtime_ns))
            with os.scandir(here) as entries:
                for entry in entries:
                    if is_clutter(entry.name):
                        self._hidden += 1
                    elif _is_directory(entry):
                        inside.append(prefix + entry.name)
                    elif _is_named_like_image(entry):
                        yield prefix + entry.name, _size(entry)
                    else:
                        self._kinds[kind_of(entry.name)] += 1
        except OSError:
            self._unreadable.append(below or self._root)
        # In a fixed order: which of two links to one directory is met first must not depend on the
        # disk.
        for name in sorted(inside):
            yield from self.files(name)

    def passed_over(self, entries: Sequence[tuple[str, int]]) -> PassedOver:
        """Returns what is no image, when all files have been seen."""
        holding = {name.partition("/")[0] for name, _ in entries}
        inside = {name.partition("/")[0] for name, _ in self.directories} - {""}
        return PassedOver(
            dict(self._kinds),
            self._hidden,
            unreadable=tuple(self._unreadable),
            empty=tuple(sorted(inside - holding)) if inside & holding else (),
        )


def _is_named_like_image(entry: os.DirEntry[str]) -> bool:
    """Returns True for the suffix of an image; without any suffix the content decides."""
    if image_formats.suffix_of(entry.name):
        return image_formats.has_image_suffix(entry.name)
    try:
        with remote_fs.open_regular(entry.path) as file:
            return image_formats.looks_like_image(file.read(image_formats.HEAD))
    except OSError:
        return False


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1
