"""Trains linear heads: on random crops through the backbone, or on features that are kept."""

import functools
import json
import shutil
from collections.abc import Callable, Generator

import jax
import jax.numpy as jnp
import numpy as np

from proteus_jax.data.datasets.labeled import LabeledDataset
from proteus_jax.data.loader import HostBatch, training_batches
from proteus_jax.data.sampler import Sampler
from proteus_jax.data.transforms.random_resized_crop import TrainTransform
from proteus_jax.errors import InputError
from proteus_jax.evaluation.classifiers.linear_heads import Probe, Tokens
from proteus_jax.evaluation.probe_training import train_probe
from proteus_jax.evaluation.protocol import Context
from proteus_jax.models.functional import Params
from proteus_jax.runtime import sharding
from proteus_jax.runtime.filesystem import write_atomically


def train_heads(
    context: Context, probe: Probe, tokens: Callable, train_set: LabeledDataset
) -> list[Params]:
    """Makes all steps of a probe; returns its heads."""
    config = context.config
    learning = KeptFeatures if config.settings.cache else RandomCrops
    source = learning(context, probe, tokens, train_set)

    def init() -> Params:
        width = context.frozen.spec.width
        return {**probe.init(width, config.seed), "step": jnp.zeros((), jnp.int32)}

    state = train_probe(
        context,
        source.train_step,
        source.place,
        source.batches,
        init=init,
        steps=probe.steps,
        what=f"{len(probe.names)} heads",
        facts={
            "model": context.digest(),
            "images": train_set.source.fingerprint,
            "images_of": len(train_set.labels),
            "probe": [*probe.names, probe.classes, probe.steps, probe.batch],
            "view": [config.data.crop, config.data.resize, config.seed, config.settings.cache],
        },
    )
    return state["heads"]


def _updated(
    probe: Probe, state: Params, tokens: Tokens, labels: jax.Array
) -> tuple[Params, dict[str, jax.Array]]:
    """One step of SGD at the step that the state has counted."""
    own = {name: state[name] for name in ("heads", "momenta")}
    updated, loss = probe.update(own, tokens, labels, state["step"].astype(jnp.float32))
    return {**updated, "step": state["step"] + 1}, {"loss": loss}


class RandomCrops:
    """Random crops through the backbone, once for all heads."""

    def __init__(self, context: Context, probe: Probe, tokens: Callable, train_set: LabeledDataset):
        self._context, self._probe, self._train_set = context, probe, train_set
        frozen = context.frozen

        def train(state: Params, params: Params, images: jax.Array, labels: jax.Array):
            pixels = frozen.normalization(images)
            return _updated(probe, state, tokens(frozen.backbone, params, pixels), labels)

        compiled = jax.jit(
            sharding.traced_on(context.mesh, train),
            donate_argnums=0,
            out_shardings=sharding.replicated(context.mesh),
        )
        self.train_step = lambda state, *inputs: compiled(state, frozen.params, *inputs)

    def batches(self, step: int) -> Generator[HostBatch]:
        """This host's batches from a step on."""
        context = self._context
        return training_batches(
            self._train_set.source,
            order=Sampler(context.config.seed, (len(self._train_set.labels),)),
            recipe=TrainTransform(context.config.data.crop),
            batch=self._probe.batch,
            steps=range(step, self._probe.steps),
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=context.reading.workers,
            threads=context.reading.threads,
        )

    def place(self, batch: HostBatch) -> tuple[jax.Array, jax.Array]:
        """Images and their classes on the devices."""
        labels = self._train_set.labels[batch.numbers].astype(np.int32)
        mesh = self._context.mesh
        return sharding.place_batch(batch.images, mesh), sharding.place_batch(labels, mesh)


class KeptFeatures:
    """Features of center crops, made once and kept on the disk."""

    def __init__(self, context: Context, probe: Probe, tokens: Callable, train_set: LabeledDataset):
        self._context, self._probe = context, probe
        self._kept, self._labels = _kept_features(context, tokens, train_set)
        self.train_step = jax.jit(
            functools.partial(_updated, probe),
            donate_argnums=0,
            out_shardings=sharding.replicated(context.mesh),
        )

    def batches(self, step: int) -> Generator[np.ndarray]:
        """The rows of this host's batches from a step on."""
        config = self._context.config
        order = Sampler(config.seed, (len(self._labels),))
        share = config.batch // jax.process_count()
        for at in range(step, self._probe.steps):
            first = at * config.batch + jax.process_index() * share
            yield np.array([order(draw).image for draw in range(first, first + share)])

    def place(self, rows: np.ndarray) -> tuple[Tokens, jax.Array]:
        """Features and their classes on the devices."""
        mesh = self._context.mesh
        batch = Tokens(*(sharding.place_batch(np.asarray(part[rows]), mesh) for part in self._kept))
        return batch, sharding.place_batch(self._labels[rows].astype(np.int32), mesh)


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
