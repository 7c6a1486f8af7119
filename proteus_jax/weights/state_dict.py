"""This project's own parameter names and layouts, and its nested, stacked arrays.

The names are DINOv2's official ones, with norm_pre, pool.* and others of their kind where another
family has such a part. A path of nested keys is the name but for three things: a Linear's `weight`
[out, in] is a `kernel` [in, out], a LayerNorm's `weight` is a `scale`, and blocks.<i> are rows of
one stacked array.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from proteus_jax.errors import InputError
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, Params

Arrays = dict[str, np.ndarray]
HEAD_WIDTH = 64
PATCH_KERNEL = ("patch_embed", "proj", "kernel")


def infer_spec(arrays: Arrays, heads: int | None = None, **choices: Any) -> ViTSpec:
    """The sizes that these weights have and the parts that they show; `choices` are the fields of
    ViTSpec that no array tells. InputError says what cannot be a ViT.

    The number of heads leaves no trace in the shapes: it is width / 64, as in most released models,
    unless given. Without other choices the model is DINOv2's: one with registers resizes its
    position table with antialias and without offset, as released.
    """
    needed = ("patch_embed.proj.weight", "norm.weight")
    absent = [name for name in needed if name not in arrays]
    if absent:
        raise InputError(f"not a ViT: it has no {', '.join(absent)}")
    if arrays["patch_embed.proj.weight"].ndim != 4:
        found = list(arrays["patch_embed.proj.weight"].shape)
        raise InputError(
            f"patch_embed.proj.weight should be [width, 3, patch, patch], found {found}"
        )
    width, _, _, patch_size = arrays["patch_embed.proj.weight"].shape
    # As many digits as a ViT's blocks have: any more are no number of one.
    pattern = re.compile(r"blocks\.(\d{1,4})\.")
    layers = {int(found[1]) for name in arrays if (found := pattern.match(name))}
    if not layers:
        raise InputError("not a ViT: it has no blocks.<i>")
    gaps = set(range(max(layers) + 1)) - layers
    if gaps:
        raise InputError(f"it has blocks.{max(layers)} and no blocks.{min(gaps)}")
    if heads is None and width % HEAD_WIDTH:
        raise InputError(f"a width of {width} does not tell the number of heads: give --heads")
    tokens = arrays.get("register_tokens")
    if tokens is not None and tokens.ndim != 3:
        found = list(tokens.shape)
        raise InputError(f"register_tokens should be [1, registers, width], found {found}")
    registers = 0 if tokens is None else tokens.shape[1]
    found = {
        "width": width,
        "depth": max(layers) + 1,
        "heads": width // HEAD_WIDTH if heads is None else heads,
        "patch_size": patch_size,
        "registers": registers,
        "feed_forward": "swiglu" if any(".mlp.w12." in name for name in arrays) else "mlp",
        "interpolate_offset": 0.0 if registers else 0.1,
        "interpolate_antialias": registers > 0,
        "layer_scale": any(".ls1." in name for name in arrays),
        "pre_norm": "norm_pre.weight" in arrays,
        "patch_bias": "patch_embed.proj.bias" in arrays,
        "class_token": "cls_token" in arrays,
        "positions": "table" if "pos_embed" in arrays else "rotary",
        "pooling": "attention" if "pool.probe" in arrays else "token",
    }
    found |= _of_the_table(arrays.get("pos_embed"), found["class_token"], choices)
    try:
        spec = ViTSpec(**(found | choices))
        return dataclasses.replace(spec, inner=_inner(arrays, spec))
    except ValueError as error:
        raise InputError(str(error)) from None


def _of_the_table(
    table: np.ndarray | None, class_token: bool, choices: Mapping[str, Any]
) -> dict[str, Any]:
    """Sides of the position table, and whether it has a row for the class token."""
    if table is None:
        return {}
    count = table.shape[1] if table.ndim == 3 else 0
    given = (choices["grid"], choices["grid_columns"]) if choices.get("grid_columns") else None
    for prefix in (1, 0) if class_token else (0,):
        side = math.isqrt(max(count - prefix, 0))
        rows, columns = given or (side, side)
        if rows >= 1 and rows * columns + prefix == count:
            return {"grid": rows, "class_position": prefix == 1 or not class_token}
    if given is not None:
        raise InputError(f"pos_embed has {count} rows, which are none of a grid of {given}")
    raise InputError(
        f"pos_embed should be [1, 1 + side * side, width], found {list(table.shape)}: of a table "
        "that is no square give rows and columns, as --grid 16x12"
    )


def _inner(arrays: Arrays, spec: ViTSpec) -> int:
    """The width inside the feed-forward layer; 0 where it is the usual one."""
    last = "w3" if spec.feed_forward == "swiglu" else "fc2"
    kernel = arrays.get(f"blocks.0.mlp.{last}.weight")
    if kernel is None or kernel.ndim != 2 or kernel.shape[1] == spec.hidden:
        return 0
    return kernel.shape[1]


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
        array = arrays[name] if name in arrays else np.zeros(official, np.float32)
        # Releases disagree on leading axes of one (mask_token); the values are the same.
        if _without_leading_ones(array.shape) != _without_leading_ones(official):
            problems.append(
                f"misshapen: {name} should be {list(official)}, found {list(array.shape)}"
            )
            continue
        filled.setdefault(path, []).append(
            _from_official_layout(path, array.reshape(official), shape)
        )
    if problems:
        raise InputError(shortened(problems))
    params: Params = {}
    for path, layers in filled.items():
        _set(params, path, np.stack(layers) if path[0] == "blocks" else layers[0])
    return params


def shortened(problems: list[str], most: int = 20) -> list[str]:
    """The first ones, and how many more there are."""
    if len(problems) <= most:
        return problems
    return [*problems[:most], f"and {len(problems) - most} more"]


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((at for at, side in enumerate(shape) if side != 1), len(shape))
    return tuple(shape[first:])


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
