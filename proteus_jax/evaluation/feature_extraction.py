"""A frozen model over a set of images, once: on every device, each image exactly once."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from proteus_jax.data.eval_loader import evaluation_batches
from proteus_jax.data.sources.base import Source
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.errors import InputError
from proteus_jax.feature_extractor import Model
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, Params, fastest_attention, in_precision
from proteus_jax.models.normalization import Normalization
from proteus_jax.runtime import sharding

# (backbone, parameters, normalized images [b, h, w, 3]) -> arrays whose first axis is the batch's.
Function = Callable[[BackboneFunction, Params, jax.Array], Any]
# What `compiled_pass` makes.
Compiled = Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]


class LoaderConfig(NamedTuple):
    """How images are read: how many at a time over all devices, by whom on this host."""

    batch: int
    workers: int = 0
    threads: int = 2


class FeatureTable(NamedTuple):
    """The features of a pass: arrays [n, ...] on the host, the number of each row's image, and how
    many images had to be left out.
    """

    values: Any
    numbers: np.ndarray
    unreadable: int


class FrozenBackbone:
    """A backbone with weights on the devices that do not change while it is measured.

    `remembers` keeps the features of each set of images until `forget`, for protocols that ask for
    the same.
    """

    def __init__(
        self,
        backbone: BackboneFunction,
        params: Params,
        normalization: Normalization,
        mesh: Mesh,
        *,
        remembers: bool = False,
    ):
        self.backbone, self.params, self.normalization = backbone, params, normalization
        self.mesh, self._remembers = mesh, remembers
        self._compiled: dict[Function, Compiled] = {}
        self._tables: dict[tuple, FeatureTable] = {}

    @property
    def spec(self) -> ViTSpec:
        """The description of the backbone."""
        return self.backbone.spec

    def with_params(self, params: Params) -> "FrozenBackbone":
        """Takes other weights, as of a later step; what is compiled stays."""
        self.params, self._tables = params, {}
        return self

    def forget(self) -> None:
        """Lets go of the features that it remembers."""
        self._tables = {}

    def with_statistics(self, normalization: Normalization) -> "FrozenBackbone":
        """Makes the same backbone for images of other channel statistics."""
        return FrozenBackbone(self.backbone, self.params, normalization, self.mesh)

    def table(
        self,
        function: Function,
        source: Source,
        view: CenterCrop,
        reading: LoaderConfig,
        *,
        chosen: Sequence[int] | np.ndarray | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> FeatureTable:
        """`function` of all images of a source, or of the chosen ones, in their order; compiled
        once. See feature_pass.
        """
        key = (function, source.fingerprint, view, None if chosen is None else tuple(chosen))
        if key in self._tables:
            return self._tables[key]
        if function not in self._compiled:
            self._compiled[function] = compiled_pass(
                lambda params, images: function(self.backbone, params, self.normalization(images)),
                self.mesh,
            )
        compiled = self._compiled[function]
        table = feature_pass(
            compiled, self.params, source, view, reading, self.mesh, chosen, progress
        )
        if self._remembers:
            self._tables[key] = table
        return table


def freeze(
    model: Model,
    mesh: Mesh,
    dtype: DTypeLike = jnp.float32,
    normalization: Normalization | None = None,
) -> FrozenBackbone:
    """Places a model on the devices, its matmuls in `dtype`, with the statistics that it was
    trained with where no others are given.
    """
    backbone = BackboneFunction(model.spec, dtype, fastest_attention(model.spec, dtype))
    params = sharding.place_tree(in_precision(jax.tree.map(np.asarray, model.params), dtype), mesh)
    return FrozenBackbone(backbone, params, normalization or model.card.normalization, mesh)


def compiled_pass(function: Callable[[Any, jax.Array], Any], mesh: Mesh) -> Compiled:
    """A function of (parameters, images uint8 [b, h, w, 3]) for `feature_pass`."""

    def all_of(params: Any, images: jax.Array, numbers: jax.Array) -> tuple[Any, jax.Array]:
        return function(params, images), numbers

    return jax.jit(sharding.traced_on(mesh, all_of), out_shardings=sharding.replicated(mesh))


def feature_pass(
    compiled: Compiled,
    params: Any,
    source: Source,
    view: CenterCrop,
    reading: LoaderConfig,
    mesh: Mesh,
    chosen: Sequence[int] | np.ndarray | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> FeatureTable:
    """Applies a `compiled_pass` to every image of a source, or to the chosen ones. The result is
    whole on every host.

    InputError where none of the images can be read.
    """
    total = len(source) if chosen is None else len(chosen)
    passes = feature_batches(compiled, params, source, view, reading, mesh, chosen, progress)
    with contextlib.closing(passes):
        parts = list(passes)
    values = jax.tree.map(lambda *rows: np.concatenate(rows), *[part for part, _ in parts])
    numbers = np.concatenate([part for _, part in parts])
    if not len(numbers):
        raise InputError(f"none of the {total} images can be read, as {source.name(0)}")
    return FeatureTable(values, numbers, total - len(numbers))


def feature_batches(
    compiled: Compiled,
    params: Any,
    source: Source,
    view: CenterCrop,
    reading: LoaderConfig,
    mesh: Mesh,
    chosen: Sequence[int] | np.ndarray | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Generator[tuple[Any, np.ndarray]]:
    """Applies a `compiled_pass` batch by batch: arrays [b, ...] and the numbers of their images,
    without those that cannot be read; whole on every host. To be closed.
    """
    total = len(source) if chosen is None else len(chosen)
    # A batch has a share for every device.
    batch = -(-min(reading.batch, total) // mesh.size) * mesh.size
    batches = evaluation_batches(
        source,
        view,
        batch=batch,
        chosen=chosen,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=reading.workers,
        threads=reading.threads,
    )
    pending = None
    with contextlib.closing(batches):
        for number, made in enumerate(batches):
            outputs = compiled(params, *(sharding.place_batch(part, mesh) for part in made))
            if pending is not None:
                # Fetched while the device is busy with the next batch.
                yield _readable(*jax.device_get(pending))
            pending = outputs
            progress(f"{min((number + 1) * batch, total)} of {total} images")
    yield _readable(*jax.device_get(pending))


def _readable(values: Any, numbers: np.ndarray) -> tuple[Any, np.ndarray]:
    kept = numbers >= 0
    return jax.tree.map(lambda rows: rows[kept], values), numbers[kept]


def class_token(backbone: BackboneFunction, params: Params, images: jax.Array) -> jax.Array:
    """The class token after the final LayerNorm, float32 [b, d]."""
    return backbone(params, images).cls.astype(jnp.float32)
