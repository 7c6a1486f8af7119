"""The protocol linear: DINOv2's probe, 52 linear heads on frozen features, trained at once.

Source: facebookresearch/dinov2 eval/linear.py, which Proteus evaluates with: SGD of momentum 0.9,
no weight decay, cosine to 0 over all iterations, the sum of the heads' cross entropies; learning
rates are those for a batch of 256. One pass of the backbone serves all heads.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proteus_jax.data.datasets.labeled import LabeledDataset, TrainTestSplit
from proteus_jax.data.loader import training_batches
from proteus_jax.data.sampler import Sampler, subset_indices
from proteus_jax.data.transforms.random_resized_crop import TrainTransform
from proteus_jax.errors import InputError
from proteus_jax.evaluation import per_class
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import compiled_pass, feature_pass
from proteus_jax.evaluation.protocol import Context, Protocol
from proteus_jax.evaluation.protocols import knn
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.runtime import sharding
from proteus_jax.runtime.filesystem import write_atomically
from proteus_jax.schema import ABOVE_ZERO, BOOLEAN, numbers, share

MOMENTUM, REFERENCE_BATCH, DEVIATION = 0.9, 256, 0.01
HEAD = "head.npz"


class Settings(NamedTuple):
    """The fields of the probe; configs/eval/base.py says what each means."""

    epochs: float
    learning_rates: tuple[float, ...]
    blocks: tuple[float, ...]
    held_out: float
    cache: bool


class Tokens(NamedTuple):
    """Class tokens [b, blocks, d] of the last blocks, the last one last, and the mean [b, d] of its
    patch tokens, all after the final LayerNorm.
    """

    cls: jax.Array
    mean: jax.Array


class Kind(NamedTuple):
    """The tokens that a head sees."""

    blocks: int
    pooled: bool

    def of(self, tokens: Tokens) -> jax.Array:
        """The head's input [b, f]."""
        last = tokens.cls[:, -self.blocks :]
        flat = last.reshape(len(last), -1)
        return jnp.concatenate([flat, tokens.mean], axis=1) if self.pooled else flat

    def name(self, rate: float) -> str:
        """A head's key in results.json."""
        return f"blocks_{self.blocks}_avgpool_{str(self.pooled).lower()}_lr_{rate:g}"


class Probe(NamedTuple):
    """The heads of a probe: for each kind, one for each learning rate."""

    kinds: tuple[Kind, ...]
    rates: tuple[float, ...]
    classes: int
    steps: int
    batch: int

    @property
    def names(self) -> list[str]:
        """Names of all heads, in the order of `predictions`."""
        return [kind.name(rate) for kind in self.kinds for rate in self.rates]

    def init(self, width: int, seed: int) -> Params:
        """Weights [f, rates, classes] of N(0, 0.01), biases of 0, and momenta, for each kind."""
        keys = jax.random.split(jax.random.key(seed), len(self.kinds))
        heads = []
        for key, kind in zip(keys, self.kinds, strict=True):
            shape = (width * (kind.blocks + kind.pooled), len(self.rates), self.classes)
            weight = DEVIATION * jax.random.normal(key, shape)
            heads.append({"weight": weight, "bias": jnp.zeros(shape[1:])})
        return {"heads": heads, "momenta": jax.tree.map(jnp.zeros_like, heads)}

    def logits(self, heads: list[Params], tokens: Tokens) -> jax.Array:
        """[b, heads, classes], float32."""

        def of_kind(kind: Kind, head: Params) -> jax.Array:
            weight = head["weight"]
            flat = jnp.matmul(
                kind.of(tokens),
                weight.reshape(len(weight), -1),
                precision=jax.lax.Precision.HIGHEST,
            )
            return flat.reshape(-1, *weight.shape[1:]) + head["bias"]

        return jnp.concatenate([of_kind(*each) for each in zip(self.kinds, heads, strict=True)], 1)

    def update(
        self, state: Params, tokens: Tokens, labels: jax.Array, step: jax.Array
    ) -> tuple[Params, jax.Array]:
        """One step of SGD; also the mean loss of the heads. Labels are int [b]."""

        def loss(heads: list[Params]) -> jax.Array:
            scores = jax.nn.log_softmax(self.logits(heads, tokens))
            right = jnp.take_along_axis(scores, labels[:, None, None], axis=2)
            return -jnp.sum(jnp.mean(right, axis=0))

        total, gradients = jax.value_and_grad(loss)(state["heads"])
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * step / self.steps))
        rate = jnp.asarray(self.rates) * self.batch / REFERENCE_BATCH * cosine
        momenta = jax.tree.map(lambda m, g: MOMENTUM * m + g, state["momenta"], gradients)
        heads = jax.tree.map(lambda p, m: p - rate[:, None] * m, state["heads"], momenta)
        return {"heads": heads, "momenta": momenta}, total / len(self.names)


def last_tokens(
    backbone: BackboneFunction, params: Params, images: jax.Array, *, blocks: int
) -> Tokens:
    """The tokens of normalised images that the heads see."""
    depth = backbone.spec.depth
    outputs = backbone.intermediates(params, images, range(depth - blocks, depth))
    cls = jnp.stack([features.cls for features in outputs], axis=1)
    mean = outputs[-1].patches.mean(axis=1)
    return Tokens(cls.astype(jnp.float32), mean.astype(jnp.float32))


def open_data(config: EvalConfig) -> TrainTestSplit:
    """See neighbours.open_data; also InputError where the batch does not divide."""
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
    """A share of each class, at least one image and never all of them, is not learnt from."""
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
    state = jax.jit(
        functools.partial(probe.init, context.frozen.spec.width, config.seed),
        out_shardings=sharding.replicated(context.mesh),
    )()
    protocol = "linear, frozen crops" if settings.cache else "linear"
    if settings.cache:
        state = _train_on_kept_features(context, probe, tokens, train_set, state)
    else:
        state = CropTrainer(context, probe, tokens)(train_set, state)
    scores, unreadable = {}, 0
    results = None
    for title, part in (("held_out", held_out), ("test", pair.test)):
        if part is not None:
            results = _run_heads(context, probe, tokens, part, state["heads"], title)
            scores[title] = [100 * float(share) for share in results.right.mean(axis=0)]
            unreadable += results.unreadable
    assert results is not None
    even = [per_class.balanced(head, results.labels) for head in results.right.T]
    best = {"test": int(np.argmax(scores["test"]))}
    if held_out is not None:
        best["held_out"] = int(np.argmax(scores["held_out"]))
    for title, number in best.items():
        way = "the paper's way" if title == "test" else "no head learnt from these"
        context.say(
            f"  best on {title.replace('_', ' ')} ({way})  {scores['test'][number]:6.2f} %  "
            f"balanced {even[number]:6.2f} %  {probe.names[number]}"
        )
    chosen = best.get("held_out", best["test"])
    rows = per_class.rows(results.right[:, chosen], results.labels, pair.train.classes)
    knn.say_what_it_is_worth(context, pair, results.labels, rows)
    if jax.process_index() == 0:
        _save_head(context, probe, state["heads"], best, pair.train.classes, protocol)
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


class CropTrainer:
    """Random crops through the backbone, once for all heads."""

    def __init__(self, context: Context, probe: Probe, tokens: Callable):
        self._context, self._probe = context, probe
        frozen = context.frozen

        def train(state: Params, params: Params, images: jax.Array, labels: jax.Array, step: Any):
            pixels = frozen.normalisation(images)
            return probe.update(state, tokens(frozen.backbone, params, pixels), labels, step)

        self._train = jax.jit(
            sharding.traced_on(context.mesh, train),
            donate_argnums=0,
            out_shardings=sharding.replicated(context.mesh),
        )

    def __call__(self, train_set: LabeledDataset, state: Params) -> Params:
        """All steps of the probe; `state` is gone afterwards."""
        context, probe, mesh = self._context, self._probe, self._context.mesh
        batches = training_batches(
            train_set.source,
            order=Sampler(context.config.seed, (len(train_set.labels),)),
            recipe=TrainTransform(context.config.data.crop),
            batch=probe.batch,
            steps=range(probe.steps),
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=context.reading.workers,
            threads=context.reading.threads,
        )
        with contextlib.closing(batches):
            for step, made in enumerate(batches):
                images = sharding.place_batch(made.images, mesh)
                labels = sharding.place_batch(train_set.labels[made.numbers].astype(np.int32), mesh)
                state, loss = self._train(
                    state, context.frozen.params, images, labels, np.float32(step)
                )
                _show(context, probe, step, loss)
        return state


def _train_on_kept_features(
    context: Context, probe: Probe, tokens: Callable, train_set: LabeledDataset, state: Params
) -> Params:
    """Features of center crops, made once and kept on the disk."""
    config, mesh = context.config, context.mesh
    kept, labels = _kept_features(context, tokens, train_set)
    compiled = jax.jit(probe.update, donate_argnums=0, out_shardings=sharding.replicated(mesh))
    order = Sampler(config.seed, (len(labels),))
    share = config.batch // jax.process_count()
    for step in range(probe.steps):
        first = step * config.batch + jax.process_index() * share
        rows = np.array([order(draw).image for draw in range(first, first + share)])
        batch = Tokens(*(sharding.place_batch(np.asarray(part[rows]), mesh) for part in kept))
        target = sharding.place_batch(labels[rows].astype(np.int32), mesh)
        state, loss = compiled(state, batch, target, np.float32(step))
        _show(context, probe, step, loss)
    return state


def _kept_features(
    context: Context, tokens: Callable, train_set: LabeledDataset
) -> tuple[Tokens, np.ndarray]:
    """From the workdir where they are of the same model and images; made, and kept, otherwise."""
    config = context.config
    made_of = {
        "model": context.digest(),
        "images": train_set.source.fingerprint,
        "view": list(context.view),
        "blocks": int(max(config.settings.blocks)),
        "precision": str(context.frozen.backbone.dtype),
    }
    paths = [context.workdir / f"features-{name}.npy" for name in (*Tokens._fields, "numbers")]
    card = context.workdir / "features.json"
    try:
        if json.loads(card.read_text()) == made_of:
            cls, mean, numbers = (np.load(path, mmap_mode="r") for path in paths)
            if len(cls) == len(mean) == len(numbers):
                return Tokens(cls, mean), train_set.labels[numbers]
    except (OSError, ValueError):
        pass  # made again
    alone = jax.process_count() == 1
    if alone:
        _refuse_too_large(context, len(train_set.labels))
    table = context.frozen.table(
        tokens,
        train_set.source,
        context.view,
        context.reading,
        progress=lambda text: context.progress(f"train: {text}"),
    )
    if alone:
        card.unlink(missing_ok=True)
        for path, part in zip(paths, (*table.values, table.numbers), strict=True):
            np.save(path, part)
        write_atomically(card, json.dumps(made_of))
    return table.values, train_set.labels[table.numbers]


def _refuse_too_large(context: Context, images: int) -> None:
    blocks = int(max(context.config.settings.blocks))
    needed = images * context.frozen.spec.width * (blocks + 1) * 4
    free = shutil.disk_usage(context.workdir).free
    if needed > free:
        raise InputError(
            f"--config.linear.cache: {needed / 1e9:.1f} GB of features do not fit into the "
            f"{free / 1e9:.1f} GB that are free in {context.workdir}"
        )


def _show(context: Context, probe: Probe, step: int, loss: jax.Array) -> None:
    """The live line; the loss is fetched seldom, as that waits for the device."""
    if step % 10 == 9 or step + 1 == probe.steps:
        context.progress(
            f"step {step + 1}/{probe.steps} of {len(probe.names)} heads, mean loss "
            f"{float(loss):.3f}"
        )


class _HeadAnswers(NamedTuple):
    """The answers of all heads to labelled images: which heads are right of each [M, heads], the
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
        seen = tokens(frozen.backbone, params[0], frozen.normalisation(images))
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
