"""The twelve data sets of the fine-grained protocol, each read from the layout that its authors
publish.

Below one root lies a folder for each, by the names here; in it what the original archives hold,
with or without their own top folder. Splits are those of the protocol (docs/evaluation.md).
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from proteus_jax.data.datasets.fine_grained_layouts import (
    CIFAR10,
    CIFAR100,
    Absent,
    Images,
    Splits,
    aircraft,
    caltech101,
    cars,
    cifar,
    cub,
    dtd,
    find_folder,
    flowers,
    food,
    labels_of,
    pets,
    sun397,
    voc2007,
)
from proteus_jax.data.sources.tfds import PREFIX, open_examples
from proteus_jax.errors import InputError


class Dataset(NamedTuple):
    """`marker` is a file that the layout has; `metric` is accuracy, mean_per_class or map."""

    marker: str
    metric: str
    read: Callable[[Path], Splits]
    # tfds builder, and its splits to learn from, to choose by and to test on.
    tfds: tuple[str, str, str | None, str] | None


def find_datasets(root: str, names: Sequence[str]) -> tuple[dict[str, Splits], dict[str, str]]:
    """Those of the named data sets that lie below a root, or that tensorflow-datasets has prepared
    (root `tfds:`), and why each of the others is absent.

    InputError where one is there and does not hold what it should, or where there is none at all.
    """
    splits, absent, problems = {}, {}, []
    for name in names:
        dataset = DATASETS[name]
        try:
            if root.lower() == PREFIX:
                splits[name] = _not_empty(_from_tfds(dataset))
                continue
            folder = find_folder(Path(root).expanduser() / name, dataset.marker)
            if folder is None:
                absent[name] = f"no {dataset.marker} below {root}/{name}"
            else:
                splits[name] = _not_empty(dataset.read(folder))
        except Absent as error:
            absent[name] = str(error)
        except InputError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
        except (OSError, ValueError, KeyError, IndexError, ElementTree.ParseError) as error:
            problems.append(
                f"{name}: not the layout of its authors: {type(error).__name__}: {error}"
            )
    if problems:
        raise InputError(problems)
    if not splits:
        raise InputError(f"{root}: none of {', '.join(names)} in it")
    return splits, absent


def _not_empty(splits: Splits) -> Splits:
    if len(splits.train.source) < 2 or not len(splits.test.source):
        raise InputError(
            f"expected images to learn from, to choose by and to test on, found "
            f"{len(splits.train.source)} and {len(splits.test.source)}"
        )
    return splits


def _from_tfds(dataset: Dataset) -> Splits:
    if dataset.tfds is None:
        raise Absent("tensorflow-datasets has no form of it that is read here")
    builder, *splits = dataset.tfds
    parts: list[Images | None] = []
    for split in splits:
        if split is None:
            parts.append(None)
            continue
        try:
            source = open_examples(f"{PREFIX}{builder}:{split}")
        except InputError as error:
            raise Absent(str(error)) from None
        parts.append(Images(source, labels_of(source, dataset.metric)))
    train, validation, test = parts
    assert train is not None
    assert test is not None
    return Splits(train, validation, test)


DATASETS = {
    "aircraft": Dataset("data/images_variant_train.txt", "mean_per_class", aircraft, None),
    "caltech101": Dataset(
        "101_ObjectCategories", "mean_per_class", caltech101, ("caltech101", "train", None, "test")
    ),
    "cars": Dataset(
        "devkit/cars_train_annos.mat", "accuracy", cars, ("cars196", "train", None, "test")
    ),
    "cifar10": Dataset(
        "data_batch_1.bin", "accuracy", cifar(CIFAR10, 1), ("cifar10", "train", None, "test")
    ),
    "cifar100": Dataset(
        "train.bin", "accuracy", cifar(CIFAR100, 2), ("cifar100", "train", None, "test")
    ),
    "dtd": Dataset("labels/train1.txt", "accuracy", dtd, ("dtd", "train", "validation", "test")),
    "flowers": Dataset(
        "setid.mat",
        "mean_per_class",
        flowers,
        ("oxford_flowers102", "train", "validation", "test"),
    ),
    "food": Dataset("meta/train.txt", "accuracy", food, ("food101", "train", None, "validation")),
    "pets": Dataset(
        "annotations/trainval.txt",
        "mean_per_class",
        pets,
        ("oxford_iiit_pet", "train", None, "test"),
    ),
    "sun397": Dataset(
        "Training_01.txt",
        "accuracy",
        sun397,
        ("sun397/standard-part1-120k", "train", None, "test"),
    ),
    "voc2007": Dataset(
        "ImageSets/Main/train.txt", "map", voc2007, ("voc/2007", "train", "validation", "test")
    ),
    "cub": Dataset(
        "train_test_split.txt", "accuracy", cub, ("caltech_birds2011", "train", None, "test")
    ),
}
