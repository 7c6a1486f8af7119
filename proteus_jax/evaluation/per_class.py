"""Accuracy by class, for sets whose classes differ in size."""

from typing import Any

import numpy as np

# So many rows are printed at most; all of them are in results.json.
SHOWN = 20
# A largest class of so many times its even share is worth a word.
UNEVEN = 1.5


def balanced(right: np.ndarray, labels: np.ndarray) -> float:
    """The mean over classes of the percent of their images that are `right` [M]; classes without
    images to test on do not count.
    """
    return float(np.mean([100 * right[labels == label].mean() for label in np.unique(labels)]))


def chance(labels: np.ndarray) -> float:
    """Percent right of always saying the class that has most of the images [M]."""
    return 100 * float(np.bincount(labels).max() / len(labels))


def rows(
    right: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Images and percent right of each class that has images to test on."""
    return {
        classes[label]: {
            "images": int(np.sum(labels == label)),
            "top1": 100 * float(right[labels == label].mean()),
        }
        for label in np.unique(labels)
    }


def uneven(labels: np.ndarray) -> str:
    """Warns where one class has far more images [M] than its share; else an empty text."""
    classes = len(np.unique(labels))
    share = chance(labels)
    if classes < 2 or share < UNEVEN * 100 / classes:
        return ""
    return (
        f"one of {classes} classes has {share:.1f} % of the images to test on: so much is right by "
        "always saying it; balanced accuracy counts each class alike"
    )


def table(classes: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of `rows`, the first SHOWN of them."""
    width = max(map(len, classes))
    lines = [
        f"    {name:{width}}  {row['images']:6} images  {row['top1']:6.2f} %"
        for name, row in list(classes.items())[:SHOWN]
    ]
    more = len(classes) - SHOWN
    return [*lines, f"    and {more} more in results.json"] if more > 0 else lines
