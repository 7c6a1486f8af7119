"""Images in tar files: shards as WebDataset packs them, and plain archives of a folder. Random
access by an index that is made once.
"""

import functools
import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from proteus_jax.data import image_formats
from proteus_jax.data.mmap_table import Names, Table, read_table, write_table
from proteus_jax.data.passed_over import PassedOver, joined, kind_of, lies_in_clutter
from proteus_jax.data.sources import webdataset
from proteus_jax.data.sources.archive import folder_paths, leaves_archive
from proteus_jax.data.sources.base import FOUND, Columns, Source, folder_classes
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime import remote_fs
from proteus_jax.runtime.filesystem import cache_directory

# Tables of an earlier form are made again.
_FORM = f"tar 2 {image_formats.FORMATS}"
# So many labels that cannot be one are named.
_NAMED = 5
# Labels and JSON members are small; what is longer is no label and is not read.
_LABEL_BYTES = 1 << 20


class TarSource(Source):
    """Images of tar files, read by their offsets."""

    def __init__(self, paths: Sequence[str], table: Table):
        self._paths, self._table = list(paths), table
        self._names = Names(table.columns["text"], table.columns["ends"])
        self.fingerprint: str = table.facts["fingerprint"]

    def __reduce__(self) -> tuple:
        return TarSource, (self._paths, self._table)

    def __len__(self) -> int:
        return len(self._names.ends)

    def name(self, index: int) -> str:
        """File and member."""
        shard = self._paths[int(self._table.columns["shard"][index])]
        return f"{shard}: {self._names[index]}"

    def key(self, index: int) -> str:
        """See Source."""
        return remote_fs.absolute(self.name(index))

    def read(self, index: int) -> bytes:
        """See Source."""
        columns = self._table.columns
        shard = int(columns["shard"][index])
        offset, size = int(columns["offset"][index]), int(columns["size"][index])
        path = self._paths[shard]
        try:
            with remote_fs.open_file(path) as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None

    @functools.cached_property
    def _folders(self) -> list[str]:
        return folder_paths([self._names[index] for index in range(len(self))])

    def path(self, index: int) -> str | None:
        """See Source. What has labels of its own has no folders."""
        return None if self._table.facts["labeled"] else self._folders[index]

    def labels(self) -> np.ndarray | None:
        """The label beside each image; the folder of each where no image has a label."""
        facts = self._table.facts
        if not facts["labeled"]:
            return folder_classes(self._folders)
        if facts["problems"]:
            raise InputError(list(facts["problems"]))
        return np.asarray(self._table.columns["label"])

    def class_names(self) -> Sequence[str]:
        """Names of the classes, where labels are words."""
        return self._table.facts["classes"]


# The label of an image that has none.
_NONE = -1


class _Shard(NamedTuple):
    """The images of a file, the label of each, and what is no image."""

    images: list[webdataset.Member]
    labels: list[webdataset.Label]
    passed: PassedOver


def open_tar(paths: Sequence[str], columns: Columns = FOUND) -> tuple[TarSource, PassedOver]:
    """The images of tar files, in the order of the files and of the members in each, and what was
    passed over.

    The index lies in the cache, and is made again where a file has changed. InputError for what is
    no tar file, is compressed, or holds no image.
    """
    sizes = [remote_fs.size_and_time(path) for path in paths]
    absolute = "\0".join(map(remote_fs.absolute, paths))
    key = hashlib.sha256(_FORM.encode() + os.fsencode(absolute)).hexdigest()
    place = cache_directory() / "listings" / key[:32]
    files = [list(size) for size in sizes]
    try:
        table = read_table(place)
        if table.facts["shards"] == files:
            return TarSource(paths, table), PassedOver.from_json(table.facts["passed_over"])
    except (OSError, ValueError, KeyError):
        pass
    shards = [_read(path, size) for path, (size, _) in zip(paths, sizes, strict=True)]
    passed = joined(shard.passed for shard in shards)
    if not any(shard.images for shard in shards):
        there = "; ".join(passed.lines()) or "nothing at all"
        raise InputError(
            f"{paths[0]}: no image (of {image_formats.listed()}) in these files, but {there}"
        )
    table = _table(paths, shards, passed, files)
    try:
        write_table(place, table.facts, table.columns)
        table = read_table(place)
    except OSError:
        pass  # made again next time
    return TarSource(paths, table), passed


def _table(
    paths: Sequence[str], shards: Sequence[_Shard], passed: PassedOver, files: list[list[int]]
) -> Table:
    images = [(number, image) for number, shard in enumerate(shards) for image in shard.images]
    labels, classes, problems = _classes(paths, shards)
    names = Names.of([image.name for _, image in images])
    columns = {
        "text": names.text,
        "ends": names.ends,
        "shard": np.array([number for number, _ in images], np.int64),
        "offset": np.array([image.offset for _, image in images], np.int64),
        "size": np.array([image.size for _, image in images], np.int64),
        "label": labels,
    }
    content = hashlib.sha256()
    for column in columns.values():
        content.update(column.data)
    facts: dict[str, Any] = {
        "fingerprint": content.hexdigest(),
        "shards": files,
        "labeled": bool(problems) or bool((labels != _NONE).any()),
        "classes": list(classes),
        "problems": problems,
        "passed_over": passed.as_json(),
    }
    return Table(facts, columns)


def _classes(
    paths: Sequence[str], shards: Sequence[_Shard]
) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """The class of each image, names of classes, and labels that cannot be one."""
    labels = [label for shard in shards for label in shard.labels]
    problems = [
        f"{path}: {label.problem}"
        for path, shard in zip(paths, shards, strict=True)
        for label in shard.labels
        if label.problem
    ]
    if len(problems) > _NAMED:
        problems = [*problems[:_NAMED], f"and {len(problems) - _NAMED} labels more"]
    labeled = [
        at for at, label in enumerate(labels) if label.text is not None and not label.problem
    ]
    numbers = np.full(len(labels), _NONE, np.int64)
    classes: tuple[str, ...] = ()
    if labeled:
        numbers[labeled], classes = webdataset.numbered([str(labels[at].text) for at in labeled])
    return numbers, classes, problems


def _read(path: str, size: int) -> _Shard:
    members: list[webdataset.Member] = []
    kinds, hidden, links = Counter[str](), 0, 0
    try:
        with remote_fs.open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                # Otherwise it keeps every header.
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if member.isdir():
                    continue
                if not member.isfile() or member.issparse() or leaves_archive(member.name):
                    links += 1
                    continue
                if member.offset_data + member.size > size:
                    raise InputError(f"{path}: ends inside its member {member.name}")
                if lies_in_clutter(member.name):
                    hidden += 1
                    continue
                used = _member(archive, member)
                if used is None:
                    kinds[kind_of(member.name)] += 1
                else:
                    members.append(used)
    except tarfile.TarError as error:
        raise InputError(f"{path}: expected an uncompressed tar file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    images = [member for member in members if member.label is None]
    return _Shard(images, webdataset.labels_of(members), PassedOver(dict(kinds), hidden, links))


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> webdataset.Member | None:
    """An image or a label; None for anything else."""
    name = member.name
    if image_formats.has_image_suffix(name):
        return webdataset.Member(name, member.offset_data, member.size)
    if webdataset.is_label(name) or image_formats.suffix_of(name) == webdataset.JSON:
        content = b"" if member.size > _LABEL_BYTES else _content(archive, member)
        return webdataset.read_label(name, content)
    if not image_formats.suffix_of(name):
        head = _content(archive, member, image_formats.HEAD)
        if image_formats.looks_like_image(head):
            return webdataset.Member(name, member.offset_data, member.size)
    return None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, most: int = -1) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read(most)
