"""Reads the fine-grained data sets in the layouts of their authors."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io

from proteus_jax.data.sources.base import MemorySource, Source
from proteus_jax.data.sources.image_folder import open_names
from proteus_jax.data.sources.tfds import Examples
from proteus_jax.errors import InputError

# Draws of an image of each class of Caltech-101 to learn from.
CALTECH_DRAWS = 30


# Bytes of an image of CIFAR, and its sides.
_CIFAR = (3, 32, 32)


class Images(NamedTuple):
    """Images and what they show: classes [N], or for several at once [N, K] of 1, 0 (difficult) and
    -1.
    """

    source: Source
    labels: np.ndarray


class Splits(NamedTuple):
    """The training set, the set that C is chosen by (None: a part of the training set), and the
    test set.
    """

    train: Images
    validation: Images | None
    test: Images


class Absent(Exception):
    """A data set that is not there, which is no fault."""


def find_folder(base: Path, marker: str) -> Path | None:
    """Finds the folder of the marker: the folder itself or one or two (VOCdevkit/VOC2007) inside
    it.
    """
    inside = [*sorted(base.glob("*/")), *sorted(base.glob("*/*/"))] if base.is_dir() else []
    return next((place for place in (base, *inside) if (place / marker).exists()), None)


def _mat(path: Path) -> dict[str, Any]:
    """The variables of a .mat file. Its reader raises whatever a broken one provokes."""
    try:
        return scipy.io.loadmat(path, squeeze_me=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path.name}: {error}") from None


def labels_of(source: Examples, metric: str) -> np.ndarray:
    """Classes; for several an image ("map") one row each, 1 where the class is there.

    Those of an image that are marked difficult count as not there, as in the original's lists.
    """
    if metric != "map":
        labels = source.labels()
        assert labels is not None
        return labels
    table = np.full((len(source), len(VOC_CLASSES)), -1)
    for row, classes in zip(table, source.values("labels_no_difficult"), strict=True):
        row[classes] = 1
    return table


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def _images(folder: Path, rows: Iterable[tuple[str, Any]]) -> Images:
    """Files below a folder and their labels; InputError where one is missing."""
    names, labels = zip(*rows, strict=True)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{len(missing)} images are missing, as {folder / missing[0]}")
    return Images(open_names(folder, names), np.array(labels))


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(set(names)))}


def aircraft(folder: Path) -> Splits:
    """FGVC-Aircraft 2013b by variant: images_variant_SPLIT.txt has `0034309 707-320`."""
    data = folder / "data"
    rows = {
        split: [line.split(" ", 1) for line in _lines(data / f"images_variant_{split}.txt")]
        for split in ("train", "val", "test")
    }
    number = _numbered(variant for _, variant in rows["train"])
    return Splits(
        *(
            _images(data / "images", [(f"{name}.jpg", number[variant]) for name, variant in part])
            for part in rows.values()
        )
    )


def caltech101(folder: Path) -> Splits:
    """Folders of classes, the background's too; 30 draws of each with replacement, from the
    generator and the seed of the protocol.
    """
    place = folder / "101_ObjectCategories"
    rng = np.random.RandomState(0)
    train, test = [], []
    for number, kind in enumerate(sorted(path for path in place.iterdir() if path.is_dir())):
        names = sorted(f"{kind.name}/{path.name}" for path in kind.glob("*.jpg"))
        drawn = rng.choice(len(names), CALTECH_DRAWS)
        train += [(names[at], number) for at in drawn]
        test += [(name, number) for at, name in enumerate(names) if at not in set(drawn.tolist())]
    return Splits(_images(place, train), None, _images(place, test))


def cars(folder: Path) -> Splits:
    """Stanford Cars: annotations in .mat files, with the test set's labels."""

    def part(place: str, annotations: str) -> Images:
        annotated = _mat(folder / annotations)["annotations"]
        rows = [(str(row["fname"]), int(row["class"]) - 1) for row in np.atleast_1d(annotated)]
        return _images(folder / place, rows)

    test = "cars_test_annos_withlabels.mat"
    if not (folder / test).is_file():
        test = f"devkit/{test}"
    return Splits(part("cars_train", "devkit/cars_train_annos.mat"), None, part("cars_test", test))


def cifar(files: dict[str, Sequence[str]], labels: int) -> Callable[[Path], Splits]:
    """The binary version: for each image `labels` bytes, of which the last is the class, then
    planes of red, green and blue.
    """

    def part(folder: Path, names: Sequence[str]) -> Images:
        size = labels + int(np.prod(_CIFAR))
        whole = b"".join((folder / name).read_bytes() for name in names)
        if len(whole) % size or not whole:
            raise InputError(f"{names[0]}: expected a multiple of {size} bytes, found {len(whole)}")
        rows = np.frombuffer(whole, np.uint8).reshape(-1, size)
        pixels = rows[:, labels:].reshape(-1, *_CIFAR).transpose(0, 2, 3, 1)
        source = MemorySource(list(pixels), [f"image {number}" for number in range(len(rows))])
        return Images(source, rows[:, labels - 1].astype(np.int64))

    def read(folder: Path) -> Splits:
        return Splits(part(folder, files["train"]), None, part(folder, files["test"]))

    return read


def dtd(folder: Path) -> Splits:
    """Describable Textures, its first partition: lists of `banded/banded_0002.jpg`."""
    rows = {part: _lines(folder / f"labels/{part}1.txt") for part in ("train", "val", "test")}
    number = _numbered(name.split("/")[0] for name in rows["train"])
    return Splits(
        *(
            _images(folder / "images", [(name, number[name.split("/")[0]]) for name in part])
            for part in rows.values()
        )
    )


def flowers(folder: Path) -> Splits:
    """Oxford Flowers 102: labels and splits in .mat files, by the number of the image from 1."""
    labels = np.ravel(_mat(folder / "imagelabels.mat")["labels"])
    ids = _mat(folder / "setid.mat")
    return Splits(
        *(
            _images(
                folder / "jpg",
                [(f"image_{at:05}.jpg", int(labels[at - 1]) - 1) for at in np.ravel(ids[part])],
            )
            for part in ("trnid", "valid", "tstid")
        )
    )


def food(folder: Path) -> Splits:
    """Food-101: lists of `apple_pie/1005649`."""
    rows = {part: _lines(folder / f"meta/{part}.txt") for part in ("train", "test")}
    number = _numbered(name.split("/")[0] for name in rows["train"])
    train, test = (
        _images(folder / "images", [(f"{name}.jpg", number[name.split("/")[0]]) for name in part])
        for part in rows.values()
    )
    return Splits(train, None, test)


def pets(folder: Path) -> Splits:
    """Oxford-IIIT Pets: lists of `Abyssinian_100 1 1 1`, the class from 1 second."""

    def part(name: str) -> Images:
        rows = [line.split() for line in _lines(folder / f"annotations/{name}.txt")]
        rows = [row for row in rows if not row[0].startswith("#")]
        return _images(folder / "images", [(f"{row[0]}.jpg", int(row[1]) - 1) for row in rows])

    return Splits(part("trainval"), None, part("test"))


def sun397(folder: Path) -> Splits:
    """SUN397, its first partition: lists of `/a/abbey/sun_aaa.jpg`, the class is the folder."""
    rows = {
        part: [line.lstrip("/") for line in _lines(folder / f"{part}_01.txt")]
        for part in ("Training", "Testing")
    }
    number = _numbered(name.rpartition("/")[0] for name in rows["Training"])
    train, test = (
        _images(folder, [(name, number[name.rpartition("/")[0]]) for name in part])
        for part in rows.values()
    )
    return Splits(train, None, test)


def voc2007(folder: Path) -> Splits:
    """PASCAL VOC 2007: CLASS_SPLIT.txt has `000005 -1`; where there are none, from the XML of each
    image.
    """
    lists = folder / "ImageSets/Main"

    def part(split: str) -> Images:
        names = [line.split()[0] for line in _lines(lists / f"{split}.txt")]
        if all((lists / f"{kind}_{split}.txt").is_file() for kind in VOC_CLASSES):
            columns = []
            for kind in VOC_CLASSES:
                values = dict(line.split() for line in _lines(lists / f"{kind}_{split}.txt"))
                columns.append([int(values[name]) for name in names])
            labels = np.array(columns).T
        else:
            labels = np.array([_shown(folder / f"Annotations/{name}.xml") for name in names])
        rows = zip((f"{name}.jpg" for name in names), labels.tolist(), strict=True)
        return _images(folder / "JPEGImages", rows)

    return Splits(part("train"), part("val"), part("test"))


def _shown(path: Path) -> list[int]:
    """Reads an annotation. Returns for each class 1 where it is shown, 0 where only difficult to
    see, else -1.
    """
    text = path.read_text()
    if re.search(r"<!(DOCTYPE|ENTITY)", text):
        raise ValueError(f"{path.name} declares entities")
    shown = dict.fromkeys(VOC_CLASSES, -1)
    for element in ElementTree.fromstring(text).iter("object"):
        kind, difficult = (
            element.findtext("name", ""),
            element.findtext("difficult", "0").strip() == "1",
        )
        shown[kind.strip()] = max(shown[kind.strip()], 0 if difficult else 1)
    return list(shown.values())


def cub(folder: Path) -> Splits:
    """CUB-200-2011: lists by the number of the image."""
    names, kinds, first = (
        dict(line.split(" ", 1) for line in _lines(folder / file))
        for file in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    train, test = (
        _images(
            folder / "images",
            [(name, int(kinds[at]) - 1) for at, name in names.items() if first[at] == side],
        )
        for side in ("1", "0")
    )
    return Splits(train, None, test)


VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


CIFAR10: dict[str, Sequence[str]] = {
    "train": [f"data_batch_{n}.bin" for n in range(1, 6)],
    "test": ["test_batch.bin"],
}


CIFAR100: dict[str, Sequence[str]] = {"train": ["train.bin"], "test": ["test.bin"]}
