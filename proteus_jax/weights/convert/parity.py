"""A model directory against the weights it came from, run by transformers in PyTorch, block by
block.

At the position table's own size: transformers resizes the table without DINOv2's offset of 0.1, so
that at any other size the two differ by design.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from proteus_jax.errors import InputError, refusing
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.models.vit import Features
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert.import_weights import read_model
from proteus_jax.weights.convert.name_maps import Arrays
from proteus_jax.weights.convert.torch_reference import Outputs, timm_outputs, transformers_outputs
from proteus_jax.weights.model_dir import OPTIONAL, load_model

# Largest error allowed, in standard deviations of the reference's output.
TOLERANCE = 2e-4


class Comparison(NamedTuple):
    """Errors of one output, in standard deviations of the reference's, and the smallest cosine of
    a token with the reference's.
    """

    name: str
    largest: float
    mean: float
    cosine: float

    @property
    def passed(self) -> bool:
        """True where the largest error is within tolerance; not a number is not."""
        return self.largest <= TOLERANCE


def verify_golden(directory: Path, file: Path) -> Iterator[Comparison]:
    """Compares with outputs that other code computed and stored: `image` [b, h, w, 3] float32, or
    `image_uint8`, and `out/cls`, `out/patch` and `out/block<i>_cls`, `out/block<i>_patch`.
    """
    params, card = load_model(directory)
    arrays = _golden_arrays(file)
    patch, floats = card.spec.patch_size, arrays.get("image")
    images = arrays["image_uint8"] if floats is None else floats
    kind = np.uint8 if floats is None else np.float32
    shape = images.shape
    fits = images.ndim == 4 and shape[-1] == 3 and images.size > 0
    if not fits or images.dtype != kind or shape[1] % patch or shape[2] % patch:
        raise InputError(
            f"{file}: expected images {np.dtype(kind)} [b, h, w, 3] of multiples of {patch} px, "
            f"found {images.dtype} {list(shape)}"
        )
    pixels = np.asarray(card.normalization(jnp.asarray(images))) if floats is None else floats
    ours = _golden_outputs(params, card.spec, pixels)
    expected_arrays = {name: value for name, value in arrays.items() if name.startswith("out/")}
    expected_arrays = {
        name: value
        for name, value in expected_arrays.items()
        if value.size and name not in _ELSEWHERE
    }
    wrong = [
        name
        for name, value in expected_arrays.items()
        if name not in ours or value.shape != ours[name].shape or value.dtype.kind != "f"
    ]
    if not expected_arrays or wrong:
        raise InputError(
            f"{file}: {wrong[0]} is that of another model" if wrong else f"{file}: no out/cls in it"
        )
    yield from compare(ours, expected_arrays)


# What golden.py of the tests compares and this does not.
_ELSEWHERE = ("out/all", "out/prenorm")


def _golden_arrays(file: Path) -> dict[str, np.ndarray]:
    with (
        refusing(f"{file}: not a readable .npz of plain arrays"),
        open(file, "rb") as file_of_numbers,
        np.load(file_of_numbers, allow_pickle=False) as stored,
    ):
        arrays = {name: stored[name] for name in stored.files}
    if not {"image", "image_uint8"} & arrays.keys():
        raise InputError(f"{file}: expected image or image_uint8 in it")
    return arrays


def _golden_outputs(params: Params, spec: ViTSpec, pixels: np.ndarray) -> Outputs:
    backbone = BackboneFunction(spec)

    @jax.jit
    def run(params: Params, pixels: jax.Array) -> tuple[Features, tuple[Features, ...]]:
        between = backbone.intermediates(params, pixels, range(spec.depth))
        return backbone(params, pixels), between

    with jax.default_matmul_precision("highest"):
        final, between = run(params, jnp.asarray(pixels))
    outputs = {"out/cls": final.cls, "out/patch": final.patches, "out/reg": final.registers}
    for block, features in enumerate(between):
        outputs[f"out/block{block}_cls"] = features.cls
        outputs[f"out/block{block}_patch"] = features.patches
    return {name: np.asarray(value) for name, value in outputs.items()}


def verify(
    directory: Path,
    source: Path,
    images: UInt8[np.ndarray, "b h w 3"],
    prefix: str | None = None,
    key: str | None = None,
) -> Iterator[Comparison]:
    """Compares every block's output, class token and patches with transformers', and the last two
    with timm's where it is installed and has such a model, on images of the position table's own
    size.
    """
    params, card = load_model(directory)
    spec = card.spec
    height, width = (side * spec.patch_size for side in spec.table_shape)
    if images.shape[1:3] != (height, width):
        raise InputError(
            f"images should be {height} x {width}, the position table's own size, found "
            f"{images.shape[1:3]}"
        )
    pixels = np.asarray(card.normalization(jnp.asarray(images)))
    model, _ = read_model(source, prefix=prefix, key=key, family=card.family, heads=spec.heads)
    arrays: Arrays = model.arrays
    try:
        state_dict.to_params(arrays, spec, optional=OPTIONAL)
    except InputError as error:
        raise InputError(
            [f"{source}: another model: {problem}" for problem in error.problems]
        ) from None
    ours = our_outputs(params, spec, pixels)
    yield from compare(ours, transformers_outputs(card.family, spec, arrays, pixels))
    try:
        theirs = timm_outputs(spec, arrays, pixels)
    except InputError:
        return
    if theirs is not None:
        for found_in_timm in compare(ours, theirs):
            yield found_in_timm._replace(name=f"{found_in_timm.name}, timm")


def compare(ours: Outputs, theirs: Outputs) -> Iterator[Comparison]:
    """Every output of the reference with ours of that name."""
    for name, expected in theirs.items():
        value = ours[name].astype(np.float64)
        expected = expected.astype(np.float64)
        difference = np.abs(value - expected)
        # A constant output has none: then errors are as they are.
        deviation = float(expected.std()) or 1.0
        lengths = np.linalg.norm(value, axis=-1) * np.linalg.norm(expected, axis=-1)
        cosine = np.sum(value * expected, axis=-1) / np.maximum(lengths, np.finfo(float).tiny)
        yield Comparison(
            name,
            float(difference.max()) / deviation,
            float(difference.mean()) / deviation,
            float(cosine.min()),
        )


def our_outputs(params: Params, spec: ViTSpec, pixels: np.ndarray) -> Outputs:
    """The outputs that PyTorch's are compared with, at full precision on any device."""
    backbone = BackboneFunction(spec)

    @jax.jit
    def run(params: Params, pixels: jax.Array) -> dict[str, jax.Array]:
        blocks = backbone.block_tokens(params, pixels, range(spec.depth))
        final = backbone(params, pixels)
        named = {f"block {number}": tokens for number, tokens in enumerate(blocks)}
        return named | {"class token": final.cls, "patches": final.patches}

    with jax.default_matmul_precision("highest"):
        return {name: np.asarray(value) for name, value in run(params, pixels).items()}
