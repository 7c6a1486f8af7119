"""The protocol linear: DINOv2's probe, 52 linear heads on frozen features, trained at once.

Source: facebookresearch/dinov2 eval/linear.py, which Proteus evaluates with: SGD of momentum 0.9,
no weight decay, cosine to 0 over all iterations, the sum of the heads' cross entropies; learning
rates are those for a batch of 256. One pass of the backbone serves all heads.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proteus_jax.data.datasets.labeled import LabeledDataset, TrainTestSplit
from proteus_jax.data.sampler import subset_indices
from proteus_jax.errors import InputError
from proteus_jax.evaluation import per_class
from proteus_jax.evaluation.classifiers.linear_heads import MOMENTUM, Kind, Probe, last_tokens
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import compiled_pass, feature_pass
from proteus_jax.evaluation.linear_training import train_heads
from proteus_jax.evaluation.protocol import Context, Protocol
from proteus_jax.evaluation.protocols import knn
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import Params
from proteus_jax.schema import ABOVE_ZERO, BOOLEAN, numbers, share

HEAD = "head.npz"


class Settings(NamedTuple):
    """The fields of the probe; configs/eval/base.py says what each means."""

    epochs: float
    learning_rates: tuple[float, ...]
    blocks: tuple[float, ...]
    held_out: float
    cache: bool


def open_data(config: EvalConfig) -> TrainTestSplit:
    """See knn.open_data; also InputError where the batch does not divide."""
    pair = knn.open_data(config)
    if config.batch % jax.device_count():
        raise InputError(
            f"--config.batch: expected a multiple of the {jax.device_count()} devices, found "
            f"{config.batch}"
        )
    return pair


def check(config: EvalConfig, spec: ViTSpec, digest: Callable[[], str]) -> list[str]:
    """A head cannot see more blocks than there are."""
    most = int(max(config.settings.blocks))
    if most > spec.depth:
        return [
            f"--config.linear.blocks: expected at most the {spec.depth} blocks of the model, "
            f"found {most}"
        ]
    return []


def hold_out(whole: LabeledDataset, share: float) -> tuple[LabeledDataset, LabeledDataset | None]:
    """A share of each class, at least one image and never all of them, is not learned from."""
    if share == 0:
        return whole, None
    out = np.zeros(len(whole.labels), bool)
    for label in range(len(whole.classes)):
        members = np.flatnonzero(whole.labels == label)
        wanted = min(max(round(len(members) * share), 1), len(members) - 1)
        out[members[subset_indices(1, len(members), wanted, part=label)]] = True
    if not out.any():
        return whole, None
    return whole.part(np.flatnonzero(~out)), whole.part(np.flatnonzero(out))


def measure(context: Context, pair: TrainTestSplit) -> dict[str, Any]:
    """`top1` is {head: percent} on the test set; `best` names the head that is best on the held-out
    part of the training set, and the best on the test set, which is the paper's way.
    """
    config, settings = context.config, context.config.settings
    train_set, held_out = hold_out(pair.train, settings.held_out)
    most = int(max(settings.blocks))
    probe = Probe(
        kinds=tuple(Kind(int(n), pooled) for n in settings.blocks for pooled in (False, True)),
        rates=tuple(settings.learning_rates),
        classes=len(pair.train.classes),
        steps=max(1, round(settings.epochs * len(train_set.labels) / config.batch)),
        batch=config.batch,
    )
    tokens = functools.partial(last_tokens, blocks=most)
    protocol = "linear, frozen crops" if settings.cache else "linear"
    heads = train_heads(context, probe, tokens, train_set)
    scores, unreadable = {}, 0
    results = None
    for title, part in (("held_out", held_out), ("test", pair.test)):
        if part is not None:
            results = _run_heads(context, probe, tokens, part, heads, title)
            scores[title] = [100 * float(share) for share in results.right.mean(axis=0)]
            unreadable += results.unreadable
    assert results is not None
    even = [per_class.balanced(head, results.labels) for head in results.right.T]
    best = {"test": int(np.argmax(scores["test"]))}
    if held_out is not None:
        best["held_out"] = int(np.argmax(scores["held_out"]))
    for title, number in best.items():
        way = "the paper's way" if title == "test" else "no head learned from these"
        context.say(
            f"  best on {title.replace('_', ' ')} ({way})  {scores['test'][number]:6.2f} %  "
            f"balanced {even[number]:6.2f} %  {probe.names[number]}"
        )
    chosen = best.get("held_out", best["test"])
    rows = per_class.rows(results.right[:, chosen], results.labels, pair.train.classes)
    knn.say_what_it_is_worth(context, pair, results.labels, rows)
    if jax.process_index() == 0:
        _save_head(context, probe, heads, best, pair.train.classes, protocol)
    return {
        "protocol": protocol,
        "top1": dict(zip(probe.names, scores["test"], strict=True)),
        "held_out_top1": dict(zip(probe.names, scores.get("held_out", []), strict=False)),
        "best": {
            title: {
                "head": probe.names[number],
                "top1": scores["test"][number],
                "balanced_top1": even[number],
            }
            for title, number in best.items()
        },
        "chance": per_class.chance(results.labels),
        "per_class": rows,
        "data": knn.described(config, pair, unreadable)
        | {"held_out_images": 0 if held_out is None else len(held_out.labels)},
        "constants": {"steps": probe.steps, "batch": config.batch, "momentum": MOMENTUM},
    }


class _HeadAnswers(NamedTuple):
    """The answers of all heads to labeled images: which heads are right of each [M, heads], the
    classes [M], and how many images could not be read.
    """

    right: np.ndarray
    labels: np.ndarray
    unreadable: int


def _run_heads(
    context: Context,
    probe: Probe,
    tokens: Callable,
    part: LabeledDataset,
    heads: list[Params],
    title: str,
) -> _HeadAnswers:
    frozen = context.frozen

    def predict(params: tuple[Params, list[Params]], images: jax.Array) -> jax.Array:
        seen = tokens(frozen.backbone, params[0], frozen.normalization(images))
        return probe.logits(params[1], seen).argmax(axis=2).astype(jnp.int32)

    table = feature_pass(
        compiled_pass(predict, context.mesh),
        (frozen.params, heads),
        part.source,
        context.view,
        context.reading,
        context.mesh,
        progress=lambda text: context.progress(f"{title.replace('_', ' ')}: {text}"),
    )
    labels = part.labels[table.numbers]
    return _HeadAnswers(table.values == labels[:, None], labels, table.unreadable)


def _save_head(
    context: Context,
    probe: Probe,
    heads: list[Params],
    best: dict[str, int],
    classes: tuple[str, ...],
    protocol: str,
) -> None:
    """The chosen head, for other test sets: by held-out images where there are any."""
    number = best.get("held_out", best["test"])
    kind, rate = divmod(number, len(probe.rates))
    head = jax.device_get(heads[kind])
    np.savez(
        context.workdir / HEAD,
        weight=head["weight"][:, rate],
        bias=head["bias"][rate],
        blocks=probe.kinds[kind].blocks,
        pooled=probe.kinds[kind].pooled,
        classes=np.array(classes),
        model=context.digest(),
        protocol=protocol,
    )


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy of the head that is chosen: by held-out images where there are any."""
    best = results["best"].get("held_out", results["best"]["test"])
    return {"top1": best["top1"], "balanced_top1": best["balanced_top1"]}


PROTOCOL = Protocol(
    name="linear",
    settings=Settings,
    rules={
        "epochs": ABOVE_ZERO,
        "learning_rates": numbers(0),
        "blocks": numbers(1, whole=True),
        "held_out": share(below_one=True),
        "cache": BOOLEAN,
    },
    open=open_data,
    measure=measure,
    scores=scores,
    cells=lambda results: {results["protocol"]: results["best"]["test"]["top1"]},
    check=check,
    numbers=("learning_rates", "blocks"),
    # Heads on the last block alone, which students of any depth have.
    during_training={"blocks": (1,)},
    writes_files=True,
)
