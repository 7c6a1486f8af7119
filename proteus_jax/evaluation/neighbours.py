"""The protocol knn: DINOv2's weighted nearest neighbours on class tokens."""

from typing import Any

from proteus_jax.data.labelled import Labelled, Pair, open_pair
from proteus_jax.errors import InputError, about
from proteus_jax.evaluation import knn
from proteus_jax.evaluation.context import Context
from proteus_jax.evaluation.features import class_token
from proteus_jax.pretrained import Model


def open_data(config: Any) -> Pair:
    """Training and test images of --config.data.root."""
    with about("--config.data.root"):
        if not config.data.root:
            raise InputError("expected images with classes, one folder a class; found nothing")
        return open_pair(config.data.root)


def check(config: Any, model: Model) -> list[str]:
    """Every model fits."""
    return []


def described(config: Any, pair: Pair, unreadable: int) -> dict[str, Any]:
    """What results.json says of the images."""
    return {
        "root": config.data.root,
        "test": pair.told,
        "train_images": len(pair.train.labels),
        "test_images": len(pair.test.labels),
        "classes": len(pair.train.classes),
        "unreadable": unreadable,
        "train_fingerprint": pair.train.source.fingerprint,
        "test_fingerprint": pair.test.source.fingerprint,
    }


def measure(context: Context, pair: Pair) -> dict[str, Any]:
    """`top1` is {k: percent}."""
    config, unreadable = context.config, 0
    tokens, labels = [], []
    for title, part in (("train", pair.train), ("test", pair.test)):
        found = class_tokens(context, part, title)
        tokens.append(found.values)
        labels.append(part.labels[found.numbers])
        unreadable += found.unreadable
    wanted = [int(k) for k in config.knn.neighbours]
    top1 = knn.top1(
        tokens[0],
        labels[0],
        tokens[1],
        labels[1],
        neighbours=wanted,
        temperature=config.knn.temperature,
        mesh=context.mesh,
    )
    for k in wanted:
        context.say(
            f"  {k:>4} neighbours  {top1[k]:6.2f} %"
            if k in top1
            else f"  {k:>4} neighbours  left out: there are {len(tokens[0])} training images"
        )
    return {
        "top1": {str(k): value for k, value in top1.items()},
        "left_out": [k for k in wanted if k not in top1],
        "data": described(config, pair, unreadable),
    }


def class_tokens(context: Context, part: Labelled, title: str):
    """A pass over one part of the images."""
    return context.frozen.table(
        class_token,
        part.source,
        context.view,
        context.reading,
        progress=lambda text: context.progress(f"{title}: {text}"),
    )
