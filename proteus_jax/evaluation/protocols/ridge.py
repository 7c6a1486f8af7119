"""The protocol ridge: a ridge classifier of class tokens, its strength chosen by leaving one image
out. It takes seconds, and comes close to the linear probe.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from proteus_jax.data.datasets.labeled import TrainTestSplit
from proteus_jax.evaluation import per_class
from proteus_jax.evaluation.classifiers import ridge
from proteus_jax.evaluation.protocol import Context, Protocol
from proteus_jax.evaluation.protocols import knn


class Settings(NamedTuple):
    """It has no fields of its own."""


def measure(context: Context, pair: TrainTestSplit) -> dict[str, Any]:
    """`top1` and `balanced_top1` are percents of the test images."""
    train, test = (
        knn.class_tokens(context, part, title)
        for title, part in (("train", pair.train), ("test", pair.test))
    )
    labels = pair.test.labels[test.numbers]
    probe = ridge.fit(train.values, pair.train.labels[train.numbers])
    right = probe(test.values) == labels
    top1, even = 100 * float(right.mean()), per_class.balanced(right, labels)
    context.say(f"  ridge probe  {top1:6.2f} %  balanced {even:6.2f} %")
    rows = per_class.rows(right, labels, pair.train.classes)
    knn.say_what_it_is_worth(context, pair, labels, rows)
    return {
        "top1": top1,
        "balanced_top1": even,
        "chance": per_class.chance(labels),
        "per_class": rows,
        "regularizer": probe.regularizer,
        "data": knn.described(context.config, pair, train.unreadable + test.unreadable),
    }


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy, and its mean over classes."""
    return {"top1": results["top1"], "balanced_top1": results["balanced_top1"]}


PROTOCOL = Protocol(
    name="ridge",
    settings=Settings,
    rules={},
    open=knn.open_data,
    measure=measure,
    scores=scores,
    cells=lambda results: {"ridge": results["top1"]},
)
