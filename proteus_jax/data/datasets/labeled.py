"""Images with classes: one folder a class, or a split of tensorflow-datasets."""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from proteus_jax.data.dataset import AS_IT_IS, Reading, decoded, open_source
from proteus_jax.data.passed_over import NOTHING, PassedOver, is_clutter, joined
from proteus_jax.data.sampler import subset_indices
from proteus_jax.data.shard_folders import SPLITS, TEST, TRAIN, find_shards
from proteus_jax.data.sources import skimage
from proteus_jax.data.sources.base import (
    BelowSource,
    MemorySource,
    Source,
    SubsetSource,
)
from proteus_jax.data.sources.image_folder import FileSource
from proteus_jax.data.sources.registry import SHARDS
from proteus_jax.data.sources.tfds import PREFIX
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime import remote_fs

# Of a folder that is not split, one image in so many is tested on.
TESTED = 5
# Of files with the same name on both sides so many are compared.
LOOKED_AT = 32
# Tiles of a picture to learn from, at most, and their sides in pixels.
TILES, TILE = 16, 98


class LabeledDataset(NamedTuple):
    """A source, the class of each image [N] as a number, and the classes' names."""

    source: Source
    labels: np.ndarray
    classes: tuple[str, ...]
    passed_over: PassedOver = NOTHING

    def part(self, indices: np.ndarray) -> "LabeledDataset":
        """Some of the images."""
        subset = SubsetSource(self.source, indices)
        return self._replace(source=subset, labels=self.labels[indices])


class TrainTestSplit(NamedTuple):
    """A training set and a test set of the same classes; `test_name` names the second."""

    train: LabeledDataset
    test: LabeledDataset
    test_name: str

    @property
    def passed_over(self) -> PassedOver:
        """Sums what both places hold beside images."""
        same = self.train.passed_over is self.test.passed_over
        return joined([self.train.passed_over] + [self.test.passed_over] * (not same))


def open_labeled(root: str, reading: Reading = AS_IT_IS) -> LabeledDataset:
    """A place of images whose classes are known; a folder's are the names right inside it.

    InputError where there is none, or where there are not two classes.
    """
    return labeled(root, *open_source(root, reading))


def labeled(root: str, source: Source, passed_over: PassedOver = NOTHING) -> LabeledDataset:
    """The images of a source that `root` names, with their classes; InputError as of
    open_labeled.
    """
    names = _folder_names(root, source)
    if names is None:
        values = source.labels()
        if values is None:
            raise InputError(f"{root}: expected images with classes, found none")
        if values.max() < 0:
            raise InputError(f"{root}: its labels are {values.max()}: this split has no classes")
        source, values, passed_over = _with_class(source, values, passed_over)
        known = source.class_names()
        if known and values.max() >= len(known):
            raise InputError(
                f"{root}: its labels go to {values.max()}, its classes are {len(known)}"
            )
        names = [known[label] if known else str(label) for label in values.tolist()]
    classes, labels = np.unique(names, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"{root}: expected two classes or more, found only {classes[0]}")
    return LabeledDataset(source, labels.astype(np.int64), tuple(classes.tolist()), passed_over)


def _with_class(
    source: Source, values: np.ndarray, passed_over: PassedOver
) -> tuple[Source, np.ndarray, PassedOver]:
    """The images that have a class; those without are counted."""
    without = np.flatnonzero(values < 0)
    if not len(without):
        return source, values, passed_over
    names = tuple(source.name(int(index)) for index in without)
    kept = np.flatnonzero(values >= 0)
    passed_over = passed_over._replace(unlabeled=names)
    return SubsetSource(source, kept), values[kept], passed_over


def _folder_names(root: str, source: Source) -> list[str] | None:
    """The folder right below the root that each image lies in; None of a source without folders."""
    if source.path(0) is None:
        return None
    parts = [PurePosixPath(str(source.path(index))).parts for index in range(len(source))]
    if root.lower().endswith(".txt"):
        # Its paths may begin anywhere: the class is the folder that an image lies in.
        parts = [part[-2:] for part in parts]
    loose = [part[0] for part in parts if len(part) == 1]
    if len(loose) == len(parts) and not isinstance(source, FileSource):
        return None
    if loose:
        raise InputError(
            f"{root}: expected one folder a class, found images outside of them, as {loose[0]}"
        )
    return [part[0] for part in parts]


def tiles(source: Source, side: int, most: int) -> tuple[list[np.ndarray], list[int]]:
    """Squares of at most `side` pixels of each image, at most so many, spread evenly over a grid;
    and which image each is of.
    """
    squares, labels = [], []
    for number in range(len(source)):
        pixels = source.open(number).pixels()
        height, width = pixels.shape[:2]
        length = min(side, height, width)
        corners = [
            (top, left)
            for top in range(0, height - length + 1, length)
            for left in range(0, width - length + 1, length)
        ]
        picked = np.linspace(0, len(corners) - 1, min(most, len(corners))).round().astype(int)
        for top, left in (corners[at] for at in picked):
            squares.append(pixels[top : top + length, left : left + length].copy())
            labels.append(number)
    return squares, labels


def open_pictures_pair() -> TrainTestSplit:
    """Which of the nineteen pictures a tile is of: tiles of the left three quarters to learn from,
    of the right quarter to test on.
    """
    split = skimage.open_pictures()
    names = tuple(split.training.name(number) for number in range(len(split.training)))

    def part(source: Source | None, most: int) -> LabeledDataset:
        assert source is not None
        squares, labels = tiles(source, TILE, most)
        titles = [f"tile {at} of {names[label]}" for at, label in enumerate(labels)]
        return LabeledDataset(MemorySource(squares, titles), np.array(labels), names)

    return TrainTestSplit(
        part(split.training, TILES), part(split.held_out, TILES // 4), "tiles of the right quarters"
    )


def open_pair(root: str, reading: Reading = AS_IT_IS) -> TrainTestSplit:
    """A folder with train/ and test/ (or val/), each with one folder a class, or an archive of such
    a folder; shards whose names tell train and test; tfds:NAME with such splits; a folder of
    classes, of whose images every fifth is tested on; or "scikit-image", see open_pictures_pair.

    InputError where that is not so, or where the classes of both differ.
    """
    if root == skimage.NAME:
        return open_pictures_pair()
    if root.lower().startswith(PREFIX):
        return _matched(
            open_labeled(f"{root}:{TRAIN}", reading), *_first_of(root, _tfds_tests(root, reading))
        )
    inside = _folders(root)
    if TRAIN in inside:
        tests = [name for name in TEST if name in inside]
        if not tests:
            raise InputError(f"{root}: has {TRAIN}/, but neither of {', '.join(TEST)}")
        by_name = {name: partial(open_labeled, f"{root}/{name}", reading) for name in tests}
        return _matched(open_labeled(f"{root}/{TRAIN}", reading), *_first_of(root, by_name))
    if inside and inside <= {name for name in inside if name.lower() in SPLITS}:
        raise InputError(
            f"{root}: expected {TRAIN}/ and {TEST[0]}/, or classes, found "
            f"{', '.join(sorted(inside))}"
        )
    return _of_shards(root, reading) or _of_one_place(root, reading)


def _tfds_tests(root: str, reading: Reading) -> dict[str, Callable[[], LabeledDataset]]:
    return {name: partial(open_labeled, f"{root}:{name}", reading) for name in TEST}


def _of_shards(root: str, reading: Reading) -> TrainTestSplit | None:
    """A folder of shards whose names tell train and test; None of anything else."""
    if not _is_folder(root):
        return None
    by_split = {shards.split: shards for shards in find_shards(root)}
    tests = [name for name in TEST if name in by_split]
    if TRAIN not in by_split or not tests:
        return None

    def open_part(split: str) -> LabeledDataset:
        shards = by_split[split]
        source, passed = SHARDS[shards.kind](shards.paths, reading.columns)
        return labeled(f"{root} ({split})", decoded(source, reading), passed)

    by_name = {name: partial(open_part, name) for name in tests}
    return _matched(open_part(TRAIN), *_first_of(root, by_name))


def _is_folder(root: str) -> bool:
    return not remote_fs.is_remote(root) and remote_fs.local(root).is_dir()


def _of_one_place(root: str, reading: Reading) -> TrainTestSplit:
    """Train and test folders inside an archive; or classes, of which a part is tested on."""
    source, passed = open_source(root, reading)
    if _is_folder(root) or source.path(0) is None:
        return _parted(labeled(root, source, passed))
    tops = np.array([str(source.path(index)).partition("/")[0] for index in range(len(source))])
    tests = [name for name in TEST if name in tops]
    if TRAIN not in tops or not tests:
        return _parted(labeled(root, source, passed))

    def open_part(split: str) -> LabeledDataset:
        part = SubsetSource(source, np.flatnonzero(tops == split))
        return labeled(f"{root} ({split})", BelowSource(part, split), passed)

    by_name = {name: partial(open_part, name) for name in tests}
    return _matched(open_part(TRAIN), *_first_of(root, by_name))


def images_on_both_sides(pair: TrainTestSplit) -> str:
    """Warns of images that are both trained and tested on: of files that have the same name on both
    sides some are compared. Returns an empty text where none is the same.
    """
    sides = (pair.train.source, pair.test.source)
    if any(side.path(0) is None for side in sides):
        return ""
    train = {sides[0].path(index): index for index in range(len(sides[0]))}
    common = [index for index in range(len(sides[1])) if sides[1].path(index) in train]
    spread = np.linspace(0, len(common) - 1, min(len(common), LOOKED_AT)).astype(int)
    picked = [common[at] for at in spread]
    same = 0
    for index in picked:
        with contextlib.suppress(Unreadable):
            same += sides[0].read(train[sides[1].path(index)]) == sides[1].read(index)
    if not same:
        return ""
    return (
        f"{len(common)} files have the same names to learn from and to test on; of {len(picked)} "
        f"that were looked at {same} are the same: what is right of them is no measure"
    )


def _folders(root: str) -> set[str]:
    """Names of the folders right inside a folder or an address; none inside anything else."""
    if remote_fs.is_remote(root):
        if not root.rstrip("/").lower().endswith((".txt", ".tar", ".zip", ".parquet")):
            return {n.partition("/")[0] for n, _ in remote_fs.remote_listing(root) if "/" in n}
        return set()
    place = remote_fs.local(root)
    if not place.is_dir():
        return set()
    return {path.name for path in place.iterdir() if path.is_dir() and not is_clutter(path.name)}


def _first_of(
    root: str, splits: Mapping[str, Callable[[], LabeledDataset]]
) -> tuple[LabeledDataset, str]:
    """The first split that has classes, and its name: a test set is often published without."""
    reasons = []
    for split, open_part in splits.items():
        try:
            return open_part(), split
        except InputError as error:
            reasons += error.problems
    raise InputError([f"{root}: no split to test on", *reasons])


def _matched(train: LabeledDataset, test: LabeledDataset, test_name: str) -> TrainTestSplit:
    """The test set's labels as numbers of the training set's classes."""
    number = {name: label for label, name in enumerate(train.classes)}
    strange = [name for name in test.classes if name not in number]
    if strange:
        raise InputError(
            f"{len(strange)} classes to test on are none to learn from, as {strange[0]}; there are "
            f"{len(train.classes)}, as {train.classes[0]}"
        )
    own = np.array([number[name] for name in test.classes])
    return TrainTestSplit(
        train, test._replace(labels=own[test.labels], classes=train.classes), test_name
    )


def _parted(whole: LabeledDataset) -> TrainTestSplit:
    """Every fifth image of each class, at least one, is tested on."""
    out = np.zeros(len(whole.labels), bool)
    for label, name in enumerate(whole.classes):
        members = np.flatnonzero(whole.labels == label)
        if len(members) < 2:
            raise InputError(
                f"{name}: expected two images or more of a class, one to learn from and one to "
                f"test on, found {len(members)}"
            )
        out[
            members[subset_indices(0, len(members), max(len(members) // TESTED, 1), part=label)]
        ] = True
    train, test = (whole.part(np.flatnonzero(side)) for side in (~out, out))
    return TrainTestSplit(train, test, f"one image in {TESTED} of each class")
