"""What the one line of a configuration that says where the images are can mean."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np

from proteus_jax.data import files, images, pictures
from proteus_jax.data.folder import open_folder, open_list, open_single
from proteus_jax.data.records import PREFIX, open_records, open_tfds
from proteus_jax.data.shards import open_parquet, open_tar
from proteus_jax.data.sources import (
    WHOLE,
    HeldOut,
    Part,
    Source,
    Split,
    Subset,
    mixed,
    split,
    split_within,
)
from proteus_jax.errors import InputError

_TAR, _PARQUET, _RECORDS = (".tar",), (".parquet",), (".array_record", ".arrayrecord")
# As tensorflow-datasets and Hugging Face name the files of a split.
_SPLIT = re.compile(r"([a-z]+)-\d+-of-\d+")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_images(
    roots: Sequence[str], *, held_out: HeldOut, subset: Subset = WHOLE, seed: int = 0
) -> Split:
    """The images of one root, or of several as one, split, and of the training part the subset.

    InputError lists what is wrong with each root.
    """
    splits, problems = [], []
    for root in roots:
        try:
            opened = _open_split(root, held_out)
            splits.append(opened._replace(training=subset.of(opened.training, seed)))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if not splits:
        raise InputError(f'name a folder of images, or "{pictures.NAME}"')
    return mixed(splits)


def _open_split(root: str, held_out: HeldOut) -> Split:
    if root == pictures.NAME:
        return pictures.open_pictures()
    if root.lower().endswith(images.SUFFIXES) and not files.is_remote(root):
        return _single_image(root)
    source, skipped = open_source(root)
    try:
        return split(source, held_out, skipped=skipped)
    except InputError as error:
        raise InputError([f"{root}: {problem}" for problem in error.problems]) from None


def _single_image(root: str) -> Split:
    path = files.local(root)
    try:
        return split_within([images.decode(files.read("", str(path)))], [path.name])
    except images.Unreadable as error:
        raise InputError(f"{root}: {error}") from None


def open_source(root: str) -> tuple[Source, tuple[str, ...]]:
    """The images of a root, and files that were passed over: a folder, a text file of paths,
    one image, doctor.json, tar, parquet or ArrayRecord files or a folder of them, tfds:NAME.
    """
    name = root.lower()
    if root == pictures.NAME:
        return open_folder(str(pictures.obtain_pictures()))
    if name.startswith(PREFIX):
        return open_tfds(root), ()
    if name.endswith(images.SUFFIXES):
        return open_single(root), ()
    if name.endswith(_COMPRESSED):
        raise InputError(f"{root}: a compressed tar file has no random access; unpack it")
    if name.endswith(".txt"):
        return open_list(root)
    if name.endswith(".json"):
        return _open_manifest(root)
    for suffixes, opener in (
        (_TAR, open_tar),
        (_PARQUET, open_parquet),
        (_RECORDS, open_records),
    ):
        if any(suffix in PurePath(name).name for suffix in suffixes):
            return opener(files.expand(root)), ()
        inside = _inside(root, suffixes)
        if inside:
            return opener(inside), ()
    return open_folder(root)


def _inside(root: str, suffixes: Sequence[str]) -> list[str]:
    """The files of a kind right inside a folder, as sharded data sets lie there; sorted."""
    if files.is_remote(root):
        return []
    folder = files.local(root)
    if not folder.is_dir():
        return []
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.lower()
            if entry.is_dir() or name.endswith(images.SUFFIXES):
                return []  # a tree of images, with an archive beside them perhaps
            if any(suffix in name for suffix in suffixes):
                found.append(entry.path)
    splits = {match[1] for path in found if (match := _SPLIT.match(PurePath(path).name))}
    if len(splits) > 1:
        raise InputError(
            f"{root}: holds the splits {', '.join(sorted(splits))}; name one, as "
            f"{root.rstrip('/')}/{max(splits)}-*"
        )
    return sorted(found)


def _open_manifest(path: str) -> tuple[Source, tuple[str, ...]]:
    """What `--doctor` wrote: its source without the images that it found wrong."""
    try:
        manifest = json.loads(files.local(path).read_text())
        root, left_out = manifest["root"], manifest["left_out"]
        fingerprint = manifest["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a file that --doctor wrote: {error!r}") from None
    source, skipped = open_source(root)
    if source.fingerprint != fingerprint:
        raise InputError(f"{path}: the images of {root} have changed since; run --doctor again")
    wrong = {entry["index"] for entry in left_out}
    kept = [index for index in range(len(source)) if index not in wrong]
    return Part(source, np.array(kept, np.int64)), skipped
