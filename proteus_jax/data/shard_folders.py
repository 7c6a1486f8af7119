"""Folders of shards: of which kind they are, which belong together, and to which split."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from proteus_jax.data.image_formats import has_image_suffix
from proteus_jax.data.passed_over import is_clutter
from proteus_jax.errors import InputError
from proteus_jax.runtime import remote_fs

TRAIN, TEST = "train", ("test", "val", "validation")
# How people spell the splits that are read.
_SPELLINGS = {
    "train": TRAIN, "training": TRAIN, "test": "test", "testing": "test", "eval": "test",
    "val": "val", "valid": "val", "dev": "val", "validation": "validation",
}  # fmt: skip
# Names that say a folder is a split, in any spelling.
SPLITS = tuple(_SPELLINGS)
# A number, or a pattern for it, may follow the suffix.
_SHARD = re.compile(r"(\.tar|\.zip|\.parquet|\.array_?record|\.arecord)(-\d+-of-\d+|-[*?]+)?$")
_NUMBER = re.compile(r"[-_.]*\d")
# Shards lie at most so many folders below a set's own.
_DEPTH = 3


class Shards(NamedTuple):
    """Files of one kind that belong together, in order; `split` is "" where no name tells one."""

    kind: str
    split: str
    paths: tuple[str, ...]


def kind_of_shard(name: str) -> str | None:
    """Returns the kind of shard that a file name tells."""
    match = _SHARD.search(name.lower())
    if match is None:
        return None
    return ".array_record" if "record" in match[1] else match[1]


def find_shards(root: str) -> list[Shards]:
    """Finds the shards of a folder of a disk: right inside it, or in folders of it where there are
    no images, as data/ of a Hugging Face repository and train/ beside test/. None where it is a
    tree of images.

    InputError where they are of several kinds, and no names say which are meant.
    """
    folder = remote_fs.local(root)
    try:
        paths = list(_shards_below(folder, _DEPTH))
    except (_HoldsImagesError, OSError):
        return []
    right_inside = [path for path in paths if path.parent == folder]
    paths = _without_metadata(right_inside or paths)
    together: dict[tuple[str, str, str], list[str]] = {}
    for path in paths:
        kind = kind_of_shard(path.name)
        assert kind is not None
        group = (kind, _split_of(path.relative_to(folder)), _pattern(path, folder))
        together.setdefault(group, []).append(str(path))
    by_split: dict[str, list[tuple[str, str]]] = {}
    for kind, split, pattern in together:
        by_split.setdefault(split, []).append((kind, pattern))
    several = [patterns for patterns in by_split.values() if len(patterns) > 1]
    if several or ("" in by_split and len(by_split) > 1):
        patterns = sorted(pattern for _, _, pattern in together)
        one = next((pattern for pattern in patterns if TRAIN in pattern), patterns[0])
        raise InputError(
            f"{root}: holds shards of several kinds, {', '.join(patterns)}; name those that you "
            f"mean, as {root.rstrip('/')}/{one}"
        )
    return [
        Shards(kind, split, tuple(sorted(members)))
        for (kind, split, _), members in sorted(together.items())
    ]


class _HoldsImagesError(Exception):
    """A folder is a tree of images."""


def _shards_below(folder: Path, depth: int) -> Iterator[Path]:
    """Every shard, those of a folder before those of the folders in it."""
    inside = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_clutter(entry.name):
                continue
            if entry.is_dir():
                inside.append(folder / entry.name)
            elif has_image_suffix(entry.name):
                raise _HoldsImagesError
            elif kind_of_shard(entry.name):
                yield folder / entry.name
    if depth:
        for each in inside:
            yield from _shards_below(each, depth - 1)


def _without_metadata(paths: Sequence[Path]) -> list[Path]:
    """Leaves out the parquet of img2dataset, which lies beside the tar file of its name and tells
    addresses and captions.
    """
    tars = {path.with_suffix("") for path in paths if path.suffix == ".tar"}
    return [path for path in paths if path.suffix != ".parquet" or path.with_suffix("") not in tars]


def _split_of(path: PurePath) -> str:
    """The split that a path below the root tells: by a folder of it, or by how its name begins."""
    words = [*path.parts[:-1], re.split(r"[^a-zA-Z]", path.name)[0]]
    return next((_SPELLINGS[word.lower()] for word in words if word.lower() in _SPELLINGS), "")


def _pattern(path: Path, folder: Path) -> str:
    """The shards that belong with one: what comes before its number tells them from others."""
    below, name = path.relative_to(folder), path.name
    match = _SHARD.search(name.lower())
    assert match is not None
    suffix = name[match.start(1) : match.end(1)] + ("-*" if match[2] else "")
    before = name[: match.start()]
    numbered = _NUMBER.search(before)
    pattern = (f"{before[: numbered.start()]}*" if numbered else before) + suffix
    return str(below.with_name(pattern))
