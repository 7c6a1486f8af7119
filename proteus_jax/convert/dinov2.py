"""DINOv2's official parameter names and layouts, and this package's nested, stacked arrays.

The official names are also those of this project's own model.safetensors. A path of nested keys is
the official name but for three things: a Linear's `weight` [out, in] is a `kernel` [in, out], a
LayerNorm's `weight` is a `scale`, and blocks.<i> are rows of one stacked array.
"""

import math
import re
from typing import Any

import numpy as np

from proteus_jax.errors import InputError
from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.models.specs import ViTSpec

Arrays = dict[str, np.ndarray]
HEAD_WIDTH = 64
PATCH_KERNEL = ("patch_embed", "proj", "kernel")


def infer_spec(arrays: Arrays, heads: int | None = None) -> ViTSpec:
    """The sizes that these weights have; InputError says what cannot be a DINOv2 ViT.

    The number of heads leaves no trace in the shapes: it is width / 64, as in every released model,
    unless given. A model with registers resizes its position table with antialias and without
    offset, as released.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight")
    absent = [name for name in needed if name not in arrays]
    if absent:
        raise InputError(f"not a DINOv2 ViT: it has no {', '.join(absent)}")
    width, patch_size = arrays["cls_token"].shape[-1], arrays["patch_embed.proj.weight"].shape[-1]
    table = arrays["pos_embed"]
    grid = math.isqrt(max(table.shape[1] - 1, 0)) if table.ndim == 3 else 0
    if grid < 1 or grid**2 + 1 != table.shape[1]:
        raise InputError(
            f"pos_embed should be [1, 1 + side * side, width], found {list(table.shape)}"
        )
    layers = {int(found[1]) for name in arrays if (found := re.match(r"blocks\.(\d+)\.", name))}
    if not layers:
        raise InputError("not a DINOv2 ViT: it has no blocks.<i>")
    if heads is None and width % HEAD_WIDTH:
        raise InputError(f"a width of {width} does not tell the number of heads: give --heads")
    registers = arrays["register_tokens"].shape[1] if "register_tokens" in arrays else 0
    try:
        return ViTSpec(
            width=width,
            depth=max(layers) + 1,
            heads=heads or width // HEAD_WIDTH,
            patch_size=patch_size,
            grid=grid,
            feed_forward="swiglu" if any(".mlp.w12." in name for name in arrays) else "mlp",
            registers=registers,
            interpolate_offset=0.0 if registers else 0.1,
            interpolate_antialias=registers > 0,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def to_params(arrays: Arrays, spec: ViTSpec, *, optional: tuple[str, ...] = ()) -> Params:
    """Nested numpy arrays for a ViT of this spec: every name used once, every parameter filled,
    every shape right.

    InputError lists all that is missing, unexpected or misshapen; a missing name in `optional`
    becomes zeros.
    """
    shapes = BackboneFunction(spec).shapes
    slots = list(_slots(shapes, spec.depth))
    known = {name for name, _, _ in slots}
    problems = [
        f"unexpected: {name} {list(arrays[name].shape)}" for name in sorted(set(arrays) - known)
    ]
    filled: dict[tuple[str, ...], list[np.ndarray]] = {}
    for name, path, shape in slots:
        official = _official_shape(path, shape, spec)
        if name not in arrays and name not in optional:
            problems.append(f"missing: {name} {list(official)}")
            continue
        array = arrays.get(name, np.zeros(official, np.float32))
        # Releases disagree on leading axes of one (mask_token); the values are the same.
        if array.shape != official and (
            array.size != math.prod(official) or array.shape[-1] != official[-1]
        ):
            problems.append(
                f"misshapen: {name} should be {list(official)}, found {list(array.shape)}"
            )
            continue
        filled.setdefault(path, []).append(
            _from_official_layout(path, array.reshape(official), shape)
        )
    if problems:
        raise InputError(problems)
    params: Params = {}
    for path, layers in filled.items():
        _set(params, path, np.stack(layers) if path[0] == "blocks" else layers[0])
    return params


def from_params(params: Params, spec: ViTSpec) -> Arrays:
    """The inverse of `to_params`: official names and layouts."""
    arrays: Arrays = {}
    for name, path, shape in _slots(BackboneFunction(spec).shapes, spec.depth):
        value: Any = params
        for key in path:
            value = value[key]
        if path[0] == "blocks":
            value = value[int(name.split(".")[1])]
        official = _official_shape(path, shape, spec)
        arrays[name] = np.ascontiguousarray(_to_official_layout(path, np.asarray(value), official))
    return arrays


def _slots(shapes: Params, depth: int, path: tuple[str, ...] = ()) -> Any:
    """(official name, path of keys, shape in one block) of every official parameter."""
    for key, value in shapes.items():
        here = (*path, key)
        if isinstance(value, dict):
            yield from _slots(value, depth, here)
        elif here[0] == "blocks":
            for layer in range(depth):
                yield (
                    _official_name(("blocks", str(layer), *here[1:])),
                    here,
                    tuple(value.shape[1:]),
                )
        else:
            yield _official_name(here), here, tuple(value.shape)


def _official_name(path: tuple[str, ...]) -> str:
    return ".".join((*path[:-1], {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])))


def _official_shape(
    path: tuple[str, ...], shape: tuple[int, ...], spec: ViTSpec
) -> tuple[int, ...]:
    if path == PATCH_KERNEL:
        return (spec.width, 3, spec.patch_size, spec.patch_size)
    return shape[::-1] if path[-1] == "kernel" else shape


def _from_official_layout(
    path: tuple[str, ...], array: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    if path == PATCH_KERNEL:
        return array.transpose(2, 3, 1, 0).reshape(shape)
    return array.T if path[-1] == "kernel" else array


def _to_official_layout(
    path: tuple[str, ...], array: np.ndarray, official: tuple[int, ...]
) -> np.ndarray:
    if path == PATCH_KERNEL:
        width, channels, patch, _ = official
        return array.reshape(patch, patch, channels, width).transpose(3, 2, 0, 1)
    return array.T if path[-1] == "kernel" else array


def _set(tree: Params, path: tuple[str, ...], value: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
