"""Features of a whole place of images, written as they are made."""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proteus_jax.data.sources.base import Source
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.data.transforms.native_size import NativeSize
from proteus_jax.data.workers import in_parallel
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.evaluation.feature_extraction import (
    Function,
    LoaderConfig,
    compiled_pass,
    feature_batches,
    freeze,
)
from proteus_jax.evaluation.feature_files import FeatureFile, Rows
from proteus_jax.feature_extractor import Model
from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.models.vit import Features
from proteus_jax.runtime import sharding

KINDS = ("cls", "patches", "mean")


class Wanted(NamedTuple):
    """Which tokens, of how many of the last blocks (0: the model's output), in which dtype."""

    tokens: tuple[str, ...] = ("cls",)
    layers: int = 0
    dtype: str = "float32"

    def shapes(self, model: Model, patches: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one image's arrays by kind."""
        blocks, width = (self.layers,) if self.layers else (), model.spec.width
        each = {"cls": (width,), "mean": (width,), "patches": (patches, width)}
        return {kind: (*blocks, *each[kind]) for kind in self.tokens}

    def function(self) -> Function:
        """The function of images that computes them."""

        def features(backbone: BackboneFunction, params: Params, images: jax.Array) -> Any:
            if not self.layers:
                return self._picked(backbone(params, images))
            depth = backbone.spec.depth
            blocks = backbone.intermediates(params, images, range(depth - self.layers, depth))
            picked = [self._picked(block) for block in blocks]
            return {kind: jnp.stack([each[kind] for each in picked], 1) for kind in self.tokens}

        return features

    def _picked(self, features: Features) -> dict[str, jax.Array]:
        values = {"cls": features.cls, "patches": features.patches}
        values["mean"] = features.patches.astype(jnp.float32).mean(axis=1)
        return {kind: values[kind].astype(self.dtype) for kind in self.tokens}


class Labels(NamedTuple):
    """The class of each image, as a number, and the names of the classes."""

    numbers: np.ndarray
    names: tuple[str, ...]


def labels_of(source: Source) -> Labels | None:
    """The classes of a source, where it has any; folders are named. InputError where a label
    cannot be a class.
    """
    numbers = source.labels()
    if numbers is None:
        return None
    return Labels(numbers, tuple(source.class_names()) or _folders(source, numbers))


def _folders(source: Source, numbers: np.ndarray) -> tuple[str, ...]:
    if source.path(0) is None:
        return ()
    _, first = np.unique(numbers, return_index=True)
    return tuple(str(source.path(int(index))).rpartition("/")[0] for index in first)


def dump_features(
    model: Model,
    source: Source,
    wanted: Wanted,
    view: CenterCrop | NativeSize,
    reading: LoaderConfig,
    file: FeatureFile | None,
    start: int,
    progress: Callable[[str], None],
    labels: Labels | None = None,
) -> dict[str, Any]:
    """Writes the features of every image from number `start` on, with the `labels` of all; returns
    facts about the whole.

    Every host makes its share; `file` is None on those that do not write.
    """
    total = len(source)
    passes = (
        _one_by_one(model, source, wanted, view, reading, start, progress)
        if isinstance(view, NativeSize)
        else _batches(model, source, wanted, view, reading, start, progress)
    )
    until, rows_made = start, 0
    with contextlib.closing(passes):
        for arrays, numbers, looked_at in passes:
            there = set(numbers.tolist())
            lost = [source.name(n) for n in range(until, looked_at) if n not in there]
            until, rows_made = looked_at, rows_made + len(numbers)
            if file is not None:
                names = [source.name(int(number)) for number in numbers]
                own = None if labels is None else labels.numbers[numbers]
                file.add(Rows(arrays, numbers, names, own), until, lost)
    if start == 0 and not rows_made:
        raise InputError(f"none of the {total} images can be read, as {source.name(0)}")
    return {
        "images": total,
        "unreadable": [] if file is None else file.unreadable(),
        "classes": [] if labels is None else list(labels.names),
    }


Passes = Generator[tuple[Mapping[str, np.ndarray], np.ndarray, int]]


def _batches(
    model: Model,
    source: Source,
    wanted: Wanted,
    view: CenterCrop,
    reading: LoaderConfig,
    start: int,
    progress: Callable[[str], None],
) -> Passes:
    """Arrays, the numbers of their images, and below which number all have been looked at."""
    mesh, function = sharding.make_mesh(), wanted.function()
    frozen = freeze(model, mesh, model.dtype)
    compiled = compiled_pass(
        lambda params, images: function(frozen.backbone, params, frozen.normalization(images)), mesh
    )
    chosen = np.arange(start, len(source))
    if not len(chosen):
        return
    batch = -(-min(reading.batch, len(chosen)) // mesh.size) * mesh.size
    passes = feature_batches(compiled, frozen.params, source, view, reading, mesh, chosen, progress)
    with contextlib.closing(passes):
        for number, (arrays, numbers) in enumerate(passes, 1):
            yield arrays, numbers, min(start + number * batch, len(source))


def _one_by_one(
    model: Model,
    source: Source,
    wanted: Wanted,
    view: NativeSize,
    reading: LoaderConfig,
    start: int,
    progress: Callable[[str], None],
) -> Passes:
    """Images of different shapes; compiled once a shape. Patches are rows of one array a batch,
    with the grid of each image beside them.
    """
    function = wanted.function()
    backbone = BackboneFunction(model.spec, model.dtype)
    run = jax.jit(
        lambda params, images: function(backbone, params, model.card.normalization(images))
    )

    def read_view(position: int) -> np.ndarray:
        try:
            return view(source.open(start + position))
        except Unreadable:
            return np.zeros((0, 0, 3), np.uint8)

    total = len(source) - start
    views = in_parallel(read_view, total, 0, max(reading.threads, 1))
    waiting: list[tuple[int, dict[str, np.ndarray], tuple[int, int]]] = []
    with contextlib.closing(views):
        for position, pixels in enumerate(views):
            number = start + position
            if pixels.size:
                rows = {k: np.asarray(v)[0] for k, v in run(model.params, pixels[None]).items()}
                grid = pixels.shape[0] // view.patch, pixels.shape[1] // view.patch
                waiting.append((number, rows, grid))
            progress(f"{number + 1} of {len(source)} images")
            if position == total - 1 or len(waiting) >= reading.batch:
                yield (*_ragged(wanted, waiting), number + 1)
                waiting = []


def _ragged(
    wanted: Wanted, rows: Sequence[tuple[int, dict[str, np.ndarray], tuple[int, int]]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    numbers = np.array([number for number, _, _ in rows], np.int64)
    arrays = {
        kind: np.stack([own[kind] for _, own, _ in rows]) if rows else np.zeros(0)
        for kind in wanted.tokens
        if kind != "patches"
    }
    if "patches" in wanted.tokens:
        axis = 1 if wanted.layers else 0
        flat = [np.moveaxis(own["patches"], axis, 0) for _, own, _ in rows]
        # Rows of patches, [blocks, width] or [width] each; `grid` has how many are whose.
        arrays["patches"] = np.concatenate(flat) if flat else np.zeros(0)
    arrays["grid"] = np.array([grid for _, _, grid in rows], np.int32).reshape(-1, 2)
    return arrays, numbers
