"""The protocol finegrained: logistic regression on class tokens of twelve data sets.

Source: Proteus eval/fine_grained/main_downstream_linear_dinov2.py, which follows SynCLR: the
shorter side resized to 224, CLIP's statistics whatever the model was trained with, the class token
of the last block, every dimension standardized, 45 values of C, the best one by a validation set,
one more fit on all that may be learned from.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from proteus_jax.data.datasets.fine_grained import DATASETS, find_datasets
from proteus_jax.data.datasets.fine_grained_layouts import Images, Splits
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.errors import InputError, about
from proteus_jax.evaluation.classifiers import logistic_regression
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import FrozenBackbone, class_token
from proteus_jax.evaluation.protocol import Context, Protocol
from proteus_jax.models.normalization import CLIP
from proteus_jax.schema import Rule

DECAYS = np.logspace(-6, 5, 45)
# Share of what is learned from that C is chosen by, where a data set has no validation part.
VALIDATION = 0.2


class Settings(NamedTuple):
    """Names of data sets; none for all twelve."""

    datasets: tuple[str, ...]


class Data(NamedTuple):
    """The data sets that are there, and why others are not."""

    found: dict[str, Splits]
    absent: dict[str, str]


class Features(NamedTuple):
    """Class tokens float32 [N, D], and classes [N] or -1, 0 and 1 [N, K]."""

    rows: np.ndarray
    labels: np.ndarray


class Result(NamedTuple):
    """Percent by the data set's own metric, the chosen C, and its percent on the validation set."""

    percent: float
    c: float
    validation: float


def open_data(config: EvalConfig) -> Data:
    """The data sets below --config.data.root that the configuration names."""
    with about("--config.data.root"):
        if not config.data.root:
            raise InputError("expected a folder with one folder a data set, found nothing")
        return Data(*find_datasets(config.data.root, config.settings.datasets or [*DATASETS]))


def measure(context: Context, data: Data) -> dict[str, Any]:
    """`per_dataset` is {name: percent}, `average` their plain mean where all twelve are there, null
    otherwise; `absent` says why others are missing.
    """
    frozen = context.frozen.with_statistics(CLIP)
    results, unreadable = {}, 0
    for name, splits in data.found.items():
        parts: list[Features | None] = []
        for title, images in zip(Splits._fields, splits, strict=True):
            found = None
            if images is not None:
                found, lost = _features(context, frozen, images, f"{name}, {title}")
                unreadable += lost
            parts.append(found)
        context.progress(f"{name}: {len(DECAYS)} values of C")
        train, validation, test = parts
        assert train is not None
        assert test is not None
        results[name] = evaluate(train, validation, test, DATASETS[name].metric)
        metric = DATASETS[name].metric.replace("_", " ")
        context.say(f"  {name:12}{results[name].percent:6.2f} %  {metric}, C {results[name].c:.3g}")
    for name, reason in data.absent.items():
        context.say(f"  {name:12}absent: {reason}")
    complete = len(results) == len(DATASETS)
    average = float(np.mean([result.percent for result in results.values()]))
    context.say(
        f"  {'average':12}{average:6.2f} %"
        if complete
        else f"  no average: {len(results)} of {len(DATASETS)} data sets were measured"
    )
    return {
        "per_dataset": {name: result.percent for name, result in results.items()},
        "average": average if complete else None,
        "absent": data.absent,
        "metrics": {name: DATASETS[name].metric for name in results},
        "c": {name: result.c for name, result in results.items()},
        "validation": {name: result.validation for name, result in results.items()},
        "data": {
            "root": context.config.data.root,
            "images": {
                name: {
                    title: 0 if part is None else len(part.source)
                    for title, part in zip(Splits._fields, splits, strict=True)
                }
                for name, splits in data.found.items()
            },
            "unreadable": unreadable,
        },
        "constants": {
            "resize": context.view.crop,
            "decays": DECAYS.tolist(),
            "normalisation": {"mean": list(CLIP.mean), "std": list(CLIP.std)},
            "solver": f"L-BFGS, {_dtype().name}",
        },
    }


def _features(
    context: Context, frozen: FrozenBackbone, images: Images, title: str
) -> tuple[Features, int]:
    """Class tokens of one part. An image that is drawn several times is several rows."""
    crop = context.view.crop
    table = frozen.table(
        class_token,
        images.source,
        CenterCrop(crop, crop),
        context.reading,
        progress=lambda text: context.progress(f"{title}: {text}"),
    )
    return Features(table.values, images.labels[table.numbers]), table.unreadable


def _dtype() -> np.dtype:
    """The dtype of the solver: float64 where that costs little."""
    return np.dtype(np.float64 if jax.default_backend() == "cpu" else np.float32)


def evaluate(train: Features, validation: Features | None, test: Features, metric: str) -> Result:
    """The protocol on one data set's features."""
    if validation is None:
        # The original code's own draw.
        order = np.arange(len(train.rows))
        np.random.RandomState(0).shuffle(order)
        out = order[: max(int(len(order) * VALIDATION), 1)]
        kept = order[len(out) :]
        everything = train
        train, validation = (Features(*(part[at] for part in everything)) for at in (kept, out))
    else:
        everything = Features(
            *(np.concatenate(parts) for parts in zip(train, validation, strict=True))
        )
    scores = _scores(train, validation, DECAYS)
    percents = [_percent(each, validation.labels, metric) for each in scores]
    # Of values that are as good, the smallest decay.
    best = int(np.argmax(percents))
    (final,) = _scores(everything, test, DECAYS[best : best + 1])
    return Result(_percent(final, test.labels, metric), 1 / DECAYS[best], percents[best])


def _scores(train_features: Features, tested: Features, decays: np.ndarray) -> np.ndarray:
    """[L, N, K] of `tested`, by the means and deviations of what is learned from."""
    rows = train_features.rows.astype(np.float64)
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    # A dimension that never changes says nothing, and should not divide by zero.
    deviation[deviation == 0] = 1.0
    labels = train_features.labels
    targets = (labels == 1).astype(np.float64) if labels.ndim == 2 else labels
    probe = logistic_regression.fit((rows - mean) / deviation, targets, decays, dtype=_dtype())
    return probe.scores((tested.rows.astype(np.float64) - mean) / deviation)


def _percent(scores: np.ndarray, labels: np.ndarray, metric: str) -> float:
    """The metric in percent, from scores [N, K]."""
    if metric == "map":
        columns = range(labels.shape[1])
        return 100 * float(
            np.mean([average_precision(scores[:, k], labels[:, k] == 1) for k in columns])
        )
    right = scores.argmax(axis=1) == labels
    if metric == "mean_per_class":
        return 100 * float(np.mean([right[labels == kind].mean() for kind in np.unique(labels)]))
    return 100 * float(right.mean())


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """VOC 2007's: the mean over eleven recalls of the best precision at that recall or above."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    if not positive.any():
        return 0.0
    recall, precision = hits / hits[-1], hits / np.arange(1, len(hits) + 1)
    precisions = [
        precision[recall >= at - 1e-12].max(initial=0.0) for at in np.linspace(0.0, 1.0, 11)
    ]
    return float(np.mean(precisions))


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """The number of each data set, and the average where all are there."""
    average = results["average"]
    return results["per_dataset"] | ({} if average is None else {"average": average})


PROTOCOL = Protocol(
    name="finegrained",
    settings=Settings,
    rules={
        "datasets": Rule(
            lambda names: set(names) <= set(DATASETS) and len(set(names)) == len(names),
            f"different names out of {', '.join(DATASETS)}",
        )
    },
    open=open_data,
    measure=measure,
    scores=scores,
    cells=lambda results: (
        {} if results["average"] is None else {"fine-grained": results["average"]}
    ),
)
