"""Opens the places of images that a configuration names."""

import json
import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from proteus_jax.data import decode, image_formats
from proteus_jax.data.image_formats import has_image_suffix
from proteus_jax.data.passed_over import PassedOver, joined
from proteus_jax.data.pillow_images import PLAIN, Decoding
from proteus_jax.data.shard_folders import TRAIN, find_shards, kind_of_shard
from proteus_jax.data.sources import skimage
from proteus_jax.data.sources.base import FOUND, Columns, DecodedSource, Source, SubsetSource
from proteus_jax.data.sources.image_folder import open_folder, open_list, open_single
from proteus_jax.data.sources.registry import SCHEMES, SHARDS
from proteus_jax.data.splits import (
    WHOLE,
    HeldOut,
    Split,
    Subset,
    mixed,
    split,
    split_within,
)
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime import remote_fs

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Reading(NamedTuple):
    """How images are found in what holds them, and how they become pixels."""

    columns: Columns = FOUND
    decoding: Decoding = PLAIN

    @classmethod
    def of(cls, data: Any) -> "Reading":
        """Takes the fields of the group `data` of a configuration."""
        return cls(
            Columns(data.image_column, data.label_column), Decoding.of(data.range, data.alpha)
        )


AS_IT_IS = Reading()


def open_images(
    roots: Sequence[str],
    *,
    held_out: HeldOut,
    subset: Subset = WHOLE,
    seed: int = 0,
    reading: Reading = AS_IT_IS,
) -> Split:
    """The images of one root, or of several as one, split, and of the training part the subset.

    InputError lists what is wrong with each root.
    """
    splits, problems = [], []
    for root in roots:
        try:
            opened_split = _open_split(root, held_out, reading)
            splits.append(opened_split._replace(training=subset.of(opened_split.training, seed)))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if not splits:
        raise InputError(f'name a folder of images, or "{skimage.NAME}"')
    return mixed(splits)


def _open_split(root: str, held_out: HeldOut, reading: Reading) -> Split:
    if root == skimage.NAME:
        return skimage.open_pictures()
    if _is_single_image(root):
        return _single_image(root, reading.decoding)
    source, passed = open_source(root, reading)
    try:
        return split(source, held_out, passed)
    except InputError as error:
        raise InputError([f"{root}: {problem}" for problem in error.problems]) from None


def _scheme(root: str) -> str:
    """Returns what stands before the first colon of a root, in lower case; nothing where there is
    no colon.
    """
    scheme, colon, _ = root.partition(":")
    return scheme.lower() if colon else ""


def _is_single_image(root: str) -> bool:
    if remote_fs.is_remote(root) or _scheme(root) in SCHEMES or not has_image_suffix(root):
        return False
    return not os.path.isdir(remote_fs.local(root))


def _single_image(root: str, decoding: Decoding) -> Split:
    path = remote_fs.local(root)
    try:
        pixels = decode.decode(remote_fs.read("", str(path)), decoding)
        return split_within([pixels], [path.name])
    except Unreadable as error:
        raise InputError(f"{root}: {error}") from None


def open_source(root: str, reading: Reading = AS_IT_IS) -> tuple[Source, PassedOver]:
    """The images of a root, and what was passed over: a folder, a text file of paths, one image,
    doctor.json, tar, zip, parquet or ArrayRecord files or a folder of them, tfds:NAME.

    Of shards whose names tell splits the training split is taken.
    """
    source, passed = _open_place(root, reading.columns)
    return decoded(source, reading), passed


def decoded(source: Source, reading: Reading) -> Source:
    """A source whose images become pixels as asked for."""
    return source if reading.decoding == PLAIN else DecodedSource(source, reading.decoding)


def _open_place(root: str, columns: Columns) -> tuple[Source, PassedOver]:
    name = root.lower()
    if root == skimage.NAME:
        return open_folder(str(skimage.obtain_pictures()))
    if _scheme(root) in SCHEMES:
        return SCHEMES[_scheme(root)](root), PassedOver()
    if not remote_fs.is_remote(root) and os.path.isdir(remote_fs.local(root)):
        return _open_directory(root, columns)
    if name.endswith(_COMPRESSED):
        raise InputError(f"{root}: a compressed tar file has no random access; unpack it")
    if name.endswith(".txt"):
        return open_list(root)
    if name.endswith(".json"):
        return _open_manifest(root, columns)
    kind = kind_of_shard(PurePath(name).name)
    if kind is not None:
        return SHARDS[kind](remote_fs.expand(root), columns)
    if not remote_fs.is_remote(root) and remote_fs.local(root).exists():
        return _open_file(root)
    return open_folder(root)


def _open_file(root: str) -> tuple[Source, PassedOver]:
    """Opens a file that is there: an image, or InputError that says what it is."""
    path = remote_fs.local(root)
    if not path.is_file():
        raise InputError(f"{root}: expected a folder or a file, found neither")
    try:
        return open_single(root), PassedOver()
    except InputError:
        kind = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        raise InputError(
            f"{root}: expected a folder, an image ({image_formats.listed()}), a .txt of paths, or "
            f"{', '.join(SHARDS)} files, found {kind} that is none of these"
        ) from None


def _open_directory(root: str, columns: Columns) -> tuple[Source, PassedOver]:
    """Opens the shards of a folder, of the training split where they have splits; or a tree."""
    shards = find_shards(root)
    if not shards:
        return open_folder(root)
    chosen = next((each for each in shards if each.split in ("", TRAIN)), shards[0])
    source, passed = SHARDS[chosen.kind](chosen.paths, columns)
    others = {f"of the split {each.split}": len(each.paths) for each in shards if each != chosen}
    return source, joined([passed, PassedOver(others)])


def _open_manifest(path: str, columns: Columns) -> tuple[Source, PassedOver]:
    """Opens what `--doctor` wrote: its source without the images that it found wrong."""
    try:
        manifest = json.loads(remote_fs.local(path).read_text())
        root, fingerprint = str(manifest["root"]), manifest["fingerprint"]
        wrong = {int(entry["index"]) for entry in manifest["left_out"]}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a file that --doctor wrote: {error!r}") from None
    if root.lower().endswith(".json"):
        raise InputError(
            f"{path}: was written of {root}, which names images in turn; expected a place of images"
        )
    source, passed = _open_place(root, columns)
    if source.fingerprint != fingerprint:
        raise InputError(f"{path}: the images of {root} have changed since; run --doctor again")
    if any(not 0 <= index < len(source) for index in wrong):
        raise InputError(f"{path}: leaves out images that {root} does not have")
    kept = np.ones(len(source), bool)
    kept[list(wrong)] = False
    if not kept.any():
        raise InputError(f"{path}: leaves out every image of {root}")
    return SubsetSource(source, np.flatnonzero(kept)), passed
