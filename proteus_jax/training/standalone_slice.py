"""Slices of a model without any training: one as a model directory, or a table of many sizes."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import proteus_jax
from proteus_jax.data.dataset import open_images
from proteus_jax.data.loader import held_out_views
from proteus_jax.data.sampler import Sampler
from proteus_jax.data.splits import HeldOut
from proteus_jax.data.transforms.random_resized_crop import TrainTransform
from proteus_jax.errors import InputError, collecting
from proteus_jax.evaluation.cka import linear_cka
from proteus_jax.evaluation.teacher_agreement import centered_cosine
from proteus_jax.models import flops
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, Params, fastest_attention
from proteus_jax.models.precision import dtype_of
from proteus_jax.models.vit import Features
from proteus_jax.runtime import sharding
from proteus_jax.slicing.fit import BlockError, Slice
from proteus_jax.slicing.least_squares import add_rows, no_sums, rows, solve, standardized
from proteus_jax.slicing.sizes import sliced_spec
from proteus_jax.slicing.slicer import Slicer
from proteus_jax.training.initialization import (
    Progress,
    fitting_images,
    make_slicer,
)
from proteus_jax.weights.fetch import obtain_model
from proteus_jax.weights.model_card import license_of, text_of
from proteus_jax.weights.model_dir import ModelCard, load_model, save_model

# Images that slices are scored on, and never fitted on.
HELD_OUT, NOTHING = HeldOut(share=0.1, minimum=1, maximum=512), HeldOut(0.0, 1, 1)
# Widths of the table of sizes, as shares of the source's heads; and depths, of its blocks.
SHARES, DEPTHS = (0.25, 1 / 3, 0.5, 2 / 3, 0.75), (1.0, 0.5)
THREADS = 4
_EPSILON = 1e-5


class Settings(NamedTuple):
    """The images to fit on: how many, and the side of their crops in pixels; some others are held
    out where slices are to be `scored`.
    """

    roots: tuple[str, ...]
    images: int = 512
    crop: int = 224
    seed: int = 0
    scored: bool = False


class Scores(NamedTuple):
    """How near a slice is to its source, on images that it was not fitted on: centered cosines of
    class tokens and patches through fitted heads, and CKA of class tokens.
    """

    agreement_class: float
    agreement_patch: float
    cka: float


class _Tokens(NamedTuple):
    """Class tokens [n, b, d] and patches [n, b, t, d], float32 on the host."""

    cls: np.ndarray
    patches: np.ndarray


class Row(NamedTuple):
    """One size of the table; GFLOPs of an image, errors of the last block, seconds to slice it."""

    spec: ViTSpec
    parameters: int
    gflops: float
    error: BlockError
    scores: Scores
    seconds: float


class Bench:
    """A model, and images to slice it on, which are made when they are first needed."""

    def __init__(self, source: str, settings: Settings, progress: Progress):
        """Opens the images and fetches the model; InputError where either cannot be had."""
        problems: list[str] = []
        with collecting(problems):
            split = open_images(settings.roots, held_out=HELD_OUT if settings.scored else NOTHING)
        with collecting(problems):
            directory = obtain_model(source)
        if problems:
            raise InputError(problems)
        self.name, self.settings, self._split, self._progress = source, settings, split, progress
        self.params, self.card = load_model(directory)
        self.spec = self.card.spec
        if settings.crop % self.spec.patch_size:
            raise InputError(
                f"--crop: expected a multiple of the patch size {self.spec.patch_size}, found "
                f"{settings.crop}"
            )
        self.mesh = sharding.make_mesh()

    @functools.cached_property
    def images(self) -> jax.Array:
        """The images to fit on, uint8 [n, b, h, w, 3]."""
        return fitting_images(
            self._split.training,
            Sampler(self.settings.seed, self._split.parts, (), 1),
            TrainTransform(self.settings.crop),
            self.settings.images,
            self.mesh,
            THREADS,
            self._progress,
        )

    @functools.cached_property
    def slicer(self) -> Slicer:
        """The model on the devices."""
        dtype = dtype_of("auto", jax.default_backend())
        return make_slicer(
            self.params,
            self.spec,
            self.settings.crop // self.spec.patch_size,
            self.images,
            self.card.normalization,
            self.mesh,
            dtype,
            fastest_attention(self.spec, dtype),
        )

    @functools.cached_property
    def views(self) -> np.ndarray:
        """Held-out views in groups as large as those of the images."""
        group, held_out = self.images.shape[1], self._split.held_out
        assert held_out is not None
        views, _ = held_out_views(held_out, count=HELD_OUT.views, size=self.settings.crop)
        rows = np.arange(-(-len(views) // group) * group) % len(views)
        return views[rows].reshape(-1, group, *views.shape[1:])

    def spec_of(self, **sizes: Any) -> ViTSpec:
        """See slicing.sizes.sliced_spec; InputError in place of ValueError."""
        try:
            return sliced_spec(self.spec, self.settings.crop, **sizes)
        except ValueError as error:
            raise InputError(str(error)) from None

    def slice(self, spec: ViTSpec, progress: Progress) -> Slice:
        """Slices to a spec of `spec_of`."""
        return self.slicer.slice(spec, progress)

    def scores(self, spec: ViTSpec, params: Params) -> Scores:
        """Scores a slice on held-out images, its heads fitted on the others."""
        fitted, held = self._features(BackboneFunction(spec), params)
        fitted_targets, held_targets = self._source_features
        cosines = [
            centered_cosine(_predicted(inputs, target, own), _flat(wanted))
            for inputs, target, own, wanted in zip(
                fitted, fitted_targets, held, held_targets, strict=True
            )
        ]
        cka = linear_cka(_flat(held.cls), _flat(held_targets.cls))
        return Scores(cosines[0], cosines[1], cka)

    @functools.cached_property
    def _source_features(self) -> tuple[_Tokens, _Tokens]:
        grid = self.settings.crop // self.spec.patch_size
        spec = dataclasses.replace(self.spec, grid=grid, layer_scale=False)
        return self._features(BackboneFunction(spec), self.slicer.source.params)

    def _features(self, function: BackboneFunction, params: Params) -> tuple[_Tokens, _Tokens]:
        """A model's tokens of the images to fit on, and of the held-out views."""

        @functools.partial(jax.jit, out_shardings=sharding.replicated(self.mesh))
        def passed(params: Params, images: jax.Array) -> Features:
            return function(params, self.card.normalization(images))

        def tokens(groups: Any) -> _Tokens:
            parts = [jax.device_get(passed(params, group)) for group in groups]
            return _Tokens(
                np.stack([np.asarray(part.cls, np.float32) for part in parts]),
                np.stack([np.asarray(part.patches, np.float32) for part in parts]),
            )

        return tokens(self.images), tokens(self.views)


def table_rows(
    bench: Bench, specs: Sequence[ViTSpec], progress: Callable[[str], None]
) -> Iterator[Row]:
    """Slices and scores one size after the other."""
    for spec in specs:
        start = time.monotonic()
        sliced = bench.slice(spec, lambda text, spec=spec: progress(f"{size_of(spec)}: {text}"))
        seconds = time.monotonic() - start
        yield Row(
            spec,
            sum(array.size for array in jax.tree.leaves(sliced.params)),
            flops.forward(spec, bench.settings.crop) / 1e9,
            sliced.errors[-1],
            bench.scores(spec, sliced.params),
            seconds,
        )


def usual_specs(bench: Bench) -> list[ViTSpec]:
    """The sizes of the table, the largest first."""
    source = bench.spec
    heads = sorted({max(1, round(source.heads * share)) for share in SHARES}, reverse=True)
    depths = sorted({max(1, round(source.depth * share)) for share in DEPTHS}, reverse=True)
    return [
        bench.spec_of(heads=count, depth=depth)
        for count in heads
        if count < source.heads
        for depth in depths
    ]


def size_of(spec: ViTSpec) -> str:
    """A spec's sizes in words."""
    return f"{spec.width} wide, {spec.heads} heads, {spec.hidden} hidden, {spec.depth} blocks"


def save_slice(bench: Bench, spec: ViTSpec, sliced: Slice, output: Path, name: str) -> None:
    """Writes a slice as a model directory, whole or not at all."""
    settings = bench.settings
    recipe = {
        "sliced_from": bench.name,
        "images": ", ".join(settings.roots),
        "crop": settings.crop,
        "fitted_on": int(np.prod(bench.images.shape[:2])),
        "seed": settings.seed,
        "proteus_jax": proteus_jax.__version__,
    }
    card = ModelCard(
        spec=spec,
        family=bench.card.family,
        normalization=bench.card.normalization,
        license=license_of({bench.name: bench.card}),
        source={"student": name, "teacher": bench.name, **recipe},
    )
    readme = text_of(card, name, {"teacher": (bench.name, bench.card)}, recipe, results={})
    save_model(output, sliced.params, card, readme=readme)


def _predicted(own: np.ndarray, target: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The targets of held-out tokens, by least squares from the others."""
    inputs = standardized(jnp.asarray(own), _EPSILON)
    sums = add_rows(no_sums(own.shape[-1], target.shape[-1]), inputs, jnp.asarray(target))
    linear = solve(sums, 1e-2)
    return np.asarray(rows(standardized(jnp.asarray(held), _EPSILON))) @ linear.kernel + linear.bias


def _flat(tokens: np.ndarray) -> np.ndarray:
    return tokens.reshape(-1, tokens.shape[-1])
