"""Opens the places of images that a configuration names."""

import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np

from proteus_jax.data import decode
from proteus_jax.data.sources import skimage
from proteus_jax.data.sources.base import Source, SubsetSource
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

# A number, or a pattern for it, may follow the suffix.
_SHARD = re.compile(r"(\.tar|\.parquet|\.array_?record)(-\d+-of-\d+|-[*?]+)?$")
_NUMBER = re.compile(r"[-_.]*\d")
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
            opened_split = _open_split(root, held_out)
            splits.append(opened_split._replace(training=subset.of(opened_split.training, seed)))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if not splits:
        raise InputError(f'name a folder of images, or "{skimage.NAME}"')
    return mixed(splits)


def _open_split(root: str, held_out: HeldOut) -> Split:
    if root == skimage.NAME:
        return skimage.open_pictures()
    single = root.lower().endswith(decode.SUFFIXES) and not remote_fs.is_remote(root)
    if single and _scheme(root) not in SCHEMES and not os.path.isdir(remote_fs.local(root)):
        return _single_image(root)
    source, skipped = open_source(root)
    try:
        return split(source, held_out, skipped=skipped)
    except InputError as error:
        raise InputError([f"{root}: {problem}" for problem in error.problems]) from None


def _scheme(root: str) -> str:
    """Returns what stands before the first colon of a root, in lower case; nothing where there is
    no colon.
    """
    scheme, colon, _ = root.partition(":")
    return scheme.lower() if colon else ""


def _single_image(root: str) -> Split:
    path = remote_fs.local(root)
    try:
        return split_within([decode.decode(remote_fs.read("", str(path)))], [path.name])
    except Unreadable as error:
        raise InputError(f"{root}: {error}") from None


def open_source(root: str) -> tuple[Source, tuple[str, ...]]:
    """The images of a root, and files that were passed over: a folder, a text file of paths, one
    image, doctor.json, tar, parquet or ArrayRecord files or a folder of them, tfds:NAME.
    """
    name = root.lower()
    if root == skimage.NAME:
        return open_folder(str(skimage.obtain_pictures()))
    if _scheme(root) in SCHEMES:
        return SCHEMES[_scheme(root)](root), ()
    if not remote_fs.is_remote(root) and os.path.isdir(remote_fs.local(root)):
        return _open_directory(root)
    if name.endswith(_COMPRESSED):
        raise InputError(f"{root}: a compressed tar file has no random access; unpack it")
    if name.endswith(".txt"):
        return open_list(root), ()
    if name.endswith(".json"):
        return _open_manifest(root)
    kind = _kind(PurePath(name).name)
    if kind is not None:
        return SHARDS[kind](remote_fs.expand(root)), ()
    if name.endswith(decode.SUFFIXES) and not remote_fs.is_remote(root):
        return open_single(root), ()
    return open_folder(root)


def _kind(name: str) -> str | None:
    """The kind of shard that a file name tells."""
    match = _SHARD.search(name.lower())
    return match[1].replace("arrayrecord", "array_record") if match else None


def _pattern(name: str) -> str:
    """The shards that belong with one: what comes before its number tells the split."""
    match = _SHARD.search(name.lower())
    assert match is not None
    suffix = name[match.start(1) : match.end(1)] + ("-*" if match[2] else "")
    before = name[: match.start()]
    numbered = _NUMBER.search(before)
    return (f"{before[: numbered.start()]}*" if numbered else before) + suffix


def _open_directory(root: str) -> tuple[Source, tuple[str, ...]]:
    """Shards that lie right inside a folder, and nothing but files beside them; or a tree."""
    shards: dict[str, list[str]] = {}
    try:
        with os.scandir(remote_fs.local(root)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir() or entry.name.lower().endswith(decode.SUFFIXES):
                    return open_folder(root)
                kind = _kind(entry.name)
                if kind is not None:
                    shards.setdefault(kind, []).append(entry.path)
    except OSError:
        return open_folder(root)  # which says what it cannot read
    if not shards:
        return open_folder(root)
    patterns = sorted({_pattern(PurePath(path).name) for path in itertools.chain(*shards.values())})
    if len(patterns) > 1:
        one = next((pattern for pattern in patterns if pattern.startswith("train")), patterns[0])
        raise InputError(
            f"{root}: holds shards of several kinds, {', '.join(patterns)}; name those that you "
            f"mean, as {root.rstrip('/')}/{one}"
        )
    ((kind, paths),) = shards.items()
    return SHARDS[kind](sorted(paths)), ()


def _open_manifest(path: str) -> tuple[Source, tuple[str, ...]]:
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
    source, skipped = open_source(root)
    if source.fingerprint != fingerprint:
        raise InputError(f"{path}: the images of {root} have changed since; run --doctor again")
    if any(not 0 <= index < len(source) for index in wrong):
        raise InputError(f"{path}: leaves out images that {root} does not have")
    kept = np.ones(len(source), bool)
    kept[list(wrong)] = False
    if not kept.any():
        raise InputError(f"{path}: leaves out every image of {root}")
    return SubsetSource(source, np.flatnonzero(kept)), skipped
