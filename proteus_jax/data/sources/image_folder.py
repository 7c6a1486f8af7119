"""A tree of image files, or a text file of paths: no labels, no index to write by hand.

The listing of a large tree is kept in one file of the cache and used again while the tree's
directories are unchanged; processes share it through the memory of the machine.
"""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from proteus_jax.data import image_formats
from proteus_jax.data.mmap_table import Names, Table, read_table, write_table
from proteus_jax.data.passed_over import (
    PassedOver,
    kind_of,
    lies_in_clutter,
)
from proteus_jax.data.sources.base import Source, folder_classes
from proteus_jax.data.sources.folder_walk import Walk
from proteus_jax.errors import InputError
from proteus_jax.runtime import remote_fs
from proteus_jax.runtime.filesystem import cache_directory

# Enough of a file to tell it from every other.
HASHED_BYTES = 1 << 16
# A tree of no more files than this is looked at file by file, each time; of a larger one only names
# and sizes are known. (The beginnings of 1.28 million files are 84 GB.)
SMALL = 10_000
# Listings of an earlier form are made again.
_FORM = f"2 {image_formats.FORMATS}"


class FileSource(Source):
    """Image files, known by the table of their names."""

    def __init__(self, root: str, table: Table, digests: Sequence[bytes] | None = None):
        self._root, self._table, self._digests = root, table, digests
        self._names = Names(table.columns["text"], table.columns["ends"])
        self.fingerprint: str = table.facts["fingerprint"]

    def __reduce__(self) -> tuple:
        return FileSource, (self._root, self._table)

    def __len__(self) -> int:
        return len(self._names.ends)

    def name(self, index: int) -> str:
        """The path below the root."""
        return self._names[index]

    def key(self, index: int) -> str:
        """See Source."""
        return os.path.join(self._root, self._names[index])

    def read(self, index: int) -> bytes:
        """See Source."""
        return remote_fs.read(self._root, self._names[index])

    def path(self, index: int) -> str:
        """See Source."""
        return self._names[index]

    @functools.cached_property
    def _labels(self) -> np.ndarray | None:
        return folder_classes(self.name(index) for index in range(len(self)))

    def labels(self) -> np.ndarray | None:
        """The directory that holds an image is its class; None where one directory holds all."""
        return self._labels

    def digests(self) -> Sequence[bytes] | None:
        """Hashes of size and beginning, for a small tree."""
        return self._digests


def open_folder(root: str) -> tuple[FileSource, PassedOver]:
    """Every image of a tree, in the order of the names, and what was passed over: hidden files and
    folders, files of other kinds, directories that cannot be read, and, of a small tree, files with
    the name of an image that are none. A file without a suffix is an image if it begins like one.

    InputError where there is no folder or no image in it.
    """
    if remote_fs.is_remote(root):
        return _remote_folder(root)
    folder = remote_fs.local(root)
    if not os.path.isdir(folder):
        raise InputError(f"{root}: no such folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{root}: no permission to read it")
    path = cache_directory() / "listings" / _key(folder)
    known = _known(path, folder)
    if known is not None:
        passed = PassedOver.from_json(known.facts["passed_over"])
        return FileSource(str(folder.resolve()), known), passed
    walk = Walk(str(folder))
    entries = sorted(walk.files(""))
    passed = walk.passed_over(entries)
    if len(entries) <= SMALL:
        return _looked_at(root, folder, entries, passed)
    source = _source(str(folder.resolve()), entries, passed, walk.directories)
    try:
        write_table(path, source._table.facts, source._table.columns)
    except OSError:
        # Without a place to keep it the listing is made again next time, and copied to workers.
        return source, passed
    return FileSource(str(folder.resolve()), read_table(path)), passed


def _remote_folder(root: str) -> tuple[FileSource, PassedOver]:
    entries, hidden, kinds = [], 0, Counter[str]()
    for name, size in remote_fs.remote_listing(root):
        if lies_in_clutter(name):
            hidden += 1
        elif image_formats.has_image_suffix(name):
            entries.append((name, size))
        else:
            kinds[kind_of(name)] += 1
    passed = PassedOver(dict(kinds), hidden)
    return _source(root, sorted(entries), passed), passed


def open_list(path: str) -> tuple[FileSource, PassedOver]:
    """The images that a text file names, one path a line, from the file's own folder where they
    are relative; empty lines and those that begin with # do not count, and what lies in hidden
    folders is passed over.

    InputError where it names none, one twice, or what is no image.
    """
    file = remote_fs.local(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if b"\0" in content:
        raise InputError(f"{path}: expected text with one path a line, found bytes of zero")
    lines = (line.strip() for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    listed = [os.fsdecode(line) for line in lines if line and not line.startswith(b"#")]
    names = _without_clutter(file.parent.absolute(), listed)
    if not names:
        raise InputError(f"{path}: names no image")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path}: names {name} twice")
    root, passed = file.parent, PassedOver(hidden=len(listed) - len(names))
    if len(names) > SMALL:
        return _source(str(root.resolve()), [(name, 0) for name in names], passed), passed
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise InputError(f"{path}: {len(missing)} of its files are missing, as {missing[0]}")
    source, passed = _looked_at(path, root, [(name, 0) for name in names], passed)
    if passed.no_images:
        raise InputError(
            f"{path}: {len(passed.no_images)} of its files are no images, as {passed.no_images[0]}"
        )
    return source, passed


def _without_clutter(folder: Path, names: list[str]) -> list[str]:
    """The names that lie in nothing hidden. Where all the data lie may be hidden; what is hidden
    among them is not meant.
    """
    if not any(map(lies_in_clutter, names)):
        return names
    above = os.path.commonpath([(folder / name).parent for name in names])
    return [name for name in names if not lies_in_clutter(os.path.relpath(folder / name, above))]


def open_names(folder: Path, names: Sequence[str]) -> FileSource:
    """Files below a folder, in the order given; one may be named more than once."""
    return _source(str(folder.resolve()), [(name, 0) for name in names], PassedOver())


def open_single(path: str) -> FileSource:
    """One image file. InputError where it is none."""
    file = remote_fs.local(path)
    if not file.is_file():
        raise InputError(f"{path}: no such file")
    return _looked_at(path, file.parent, [(file.name, 0)], PassedOver())[0]


def _key(folder: Path) -> str:
    return hashlib.sha256(_FORM.encode() + os.fsencode(folder.resolve())).hexdigest()[:32]


def _known(path: Path, folder: Path) -> Table | None:
    """The listing in the cache, where no directory has changed since."""
    try:
        table = read_table(path)
        directories = Names(table.columns["directories"], table.columns["directory_ends"])
        for index, time in enumerate(table.columns["times"].tolist()):
            if os.stat(folder / directories[index]).st_mtime_ns != time:
                return None
    except (OSError, ValueError, KeyError):
        return None
    return table


def _source(
    root: str,
    entries: Sequence[tuple[str, int]],
    passed: PassedOver,
    directories: Sequence[tuple[str, int]] = (),
) -> FileSource:
    """Files known by names and sizes."""
    if not entries:
        raise InputError(_no_image(root, passed))
    names = Names.of([name for name, _ in entries])
    sizes = np.fromiter((size for _, size in entries), np.int64, len(entries))
    joined = hashlib.sha256()
    for column in (names.text, names.ends, sizes):
        joined.update(column.data)
    columns = {"text": names.text, "ends": names.ends}
    if directories:
        places = Names.of([name for name, _ in directories])
        times = np.fromiter((time for _, time in directories), np.int64, len(directories))
        columns |= {"directories": places.text, "directory_ends": places.ends, "times": times}
    facts = {"fingerprint": joined.hexdigest(), "passed_over": passed.as_json()}
    return FileSource(root, Table(facts, columns))


def _no_image(root: str, passed: PassedOver) -> str:
    """Words for a place that holds no image: what it holds."""
    there = "; ".join(passed.lines()) or "nothing at all"
    return f"{root}: no image below it (of {image_formats.listed()}), but {there}"


def _looked_at(
    given: str, root: Path, entries: Sequence[tuple[str, int]], passed: PassedOver
) -> tuple[FileSource, PassedOver]:
    """Files each of which begins like an image, known by their content; and the others."""
    names, digests, others = [], [], []
    for name, _ in entries:
        digest = _digest(root / name)
        if digest is None:
            others.append(name)
        else:
            names.append(name)
            digests.append(digest)
    passed = passed._replace(no_images=tuple(others))
    if not names:
        raise InputError(_no_image(given, passed))
    joined = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        joined.update(os.fsencode(name) + b"\0" + digest)
    packed = Names.of(names)
    table = Table({"fingerprint": joined.hexdigest()}, {"text": packed.text, "ends": packed.ends})
    return FileSource(str(root.resolve()), table, digests), passed


def _digest(path: Path) -> bytes | None:
    """A hash of a file's size and beginning; None where it cannot be read or does not begin like an
    image.
    """
    try:
        with remote_fs.open_regular(path) as file:
            head = file.read(HASHED_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    if not image_formats.looks_like_image(head, path.name):
        return None
    return hashlib.sha256(size.to_bytes(8, "little") + head).digest()
