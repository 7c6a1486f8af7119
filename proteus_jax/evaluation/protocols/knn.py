"""The protocol knn: DINOv2's weighted nearest neighbors on class tokens."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from proteus_jax.data.datasets.labeled import (
    LabeledDataset,
    TrainTestSplit,
    images_on_both_sides,
    open_pair,
)
from proteus_jax.errors import InputError, about
from proteus_jax.evaluation import per_class
from proteus_jax.evaluation.classifiers import knn
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import class_token
from proteus_jax.evaluation.protocol import Context, Protocol
from proteus_jax.schema import ABOVE_ZERO, numbers

# With so few classes each has its row on the terminal.
FEW = 10


class Settings(NamedTuple):
    """How many neighbors vote, and the temperature of their votes."""

    neighbours: tuple[float, ...]
    temperature: float


def open_data(config: EvalConfig) -> TrainTestSplit:
    """Training and test images of --config.data.root."""
    with about("--config.data.root"):
        if not config.data.root:
            raise InputError("expected images with classes, one folder a class; found nothing")
        return open_pair(config.data.root, config.data.reading)


def described(config: EvalConfig, pair: TrainTestSplit, unreadable: int) -> dict[str, Any]:
    """The description of the images in results.json."""
    return {
        "root": config.data.root,
        "test": pair.test_name,
        "train_images": len(pair.train.labels),
        "test_images": len(pair.test.labels),
        "classes": len(pair.train.classes),
        "unreadable": unreadable,
        "passed_over": pair.passed_over.as_json(),
        "train_fingerprint": pair.train.source.fingerprint,
        "test_fingerprint": pair.test.source.fingerprint,
    }


def measure(context: Context, pair: TrainTestSplit) -> dict[str, Any]:
    """`top1` and `balanced_top1` are {k: percent}; `per_class` is of the k that is best."""
    config, settings, unreadable = context.config, context.config.settings, 0
    tokens, labels = [], []
    for title, part in (("train", pair.train), ("test", pair.test)):
        table = class_tokens(context, part, title)
        tokens.append(table.values)
        labels.append(part.labels[table.numbers])
        unreadable += table.unreadable
    wanted = [int(k) for k in settings.neighbours]
    if min(wanted) > len(tokens[0]):
        # Of fewer images all vote.
        wanted.append(len(tokens[0]))
    predicted = knn.predictions(
        tokens[0],
        labels[0],
        tokens[1],
        neighbors=wanted,
        temperature=settings.temperature,
        mesh=context.mesh,
    )
    right = {k: chosen == labels[1] for k, chosen in predicted.items()}
    top1 = {k: 100 * float(each.mean()) for k, each in right.items()}
    even = {k: per_class.balanced(each, labels[1]) for k, each in right.items()}
    for k in wanted:
        context.say(
            f"  {k:>4} neighbors  {top1[k]:6.2f} %  balanced {even[k]:6.2f} %"
            if k in top1
            else f"  {k:>4} neighbors  left out: there are {len(tokens[0])} training images"
        )
    rows = {}
    if top1:
        rows = per_class.rows(right[max(top1, key=top1.__getitem__)], labels[1], pair.train.classes)
    say_what_it_is_worth(context, pair, labels[1], rows)
    again = seen_again(*tokens)
    if again:
        context.say(
            f"  {again} of {len(tokens[1])} images to test on have the features of an image to "
            "learn from: they are the same"
        )
    return {
        "top1": {str(k): value for k, value in top1.items()},
        "balanced_top1": {str(k): value for k, value in even.items()},
        "chance": per_class.chance(labels[1]),
        "per_class": rows,
        "left_out": [k for k in wanted if k not in top1],
        "data": described(config, pair, unreadable) | {"tested_images_learnt_from": again},
    }


def say_what_it_is_worth(
    context: Context, pair: TrainTestSplit, labels: np.ndarray, rows: dict[str, dict[str, Any]]
) -> None:
    """Classes of which one has most of the images, and images on both sides, make numbers that look
    better than they are.
    """
    uneven = per_class.uneven(labels)
    if uneven:
        context.say(f"  {uneven}")
    if rows and (uneven or len(rows) <= FEW):
        for line in per_class.table(rows):
            context.say(line)
    again = images_on_both_sides(pair)
    if again:
        context.say(f"  {again}")


def seen_again(train: np.ndarray, test: np.ndarray) -> int:
    """How many rows of `test` [M, D] are rows of `train` [N, D], bit for bit."""
    known = {row.tobytes() for row in train}
    return sum(row.tobytes() in known for row in test)


def class_tokens(context: Context, part: LabeledDataset, title: str):
    """A pass over one part of the images."""
    return context.frozen.table(
        class_token,
        part.source,
        context.view,
        context.reading,
        progress=lambda text: context.progress(f"{title}: {text}"),
    )


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy and its mean over classes, of the number of neighbors that is best."""
    best = max(results["top1"], key=results["top1"].__getitem__)
    return {"top1": results["top1"][best], "balanced_top1": results["balanced_top1"][best]}


PROTOCOL = Protocol(
    name="knn",
    settings=Settings,
    rules={"neighbours": numbers(1, whole=True), "temperature": ABOVE_ZERO},
    open=open_data,
    measure=measure,
    scores=scores,
    cells=lambda results: {"knn": max(results["top1"].values())} if results["top1"] else {},
    numbers=("neighbours",),
    # One, so that rows of metrics are of the same.
    during_training={"neighbours": 20},
)
