"""Resizing of position tables, equal to PyTorch's bicubic interpolation.

A resize is a fixed linear map on each axis, so it is built in numpy as two small matrices.
`jax.image.resize` is another routine: its cubic has a = -0.5 and it knows no scale factor, and the
difference reaches the tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from proteus_jax.models.config import ViTSpec


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel; PyTorch takes a = -0.75, and -0.5 where it antialiases."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=64)
def resize_matrix(source: int, target: int, offset: float, antialias: bool) -> np.ndarray:
    """Float32 [target, source]: one axis of `torch.nn.functional.interpolate(mode="bicubic")`.

    With an `offset` the sampling step is source / (target + offset), as DINOv2 asks of PyTorch by
    giving a scale factor of (target + offset) / source; without one it is source / target.
    """
    step = source / (target + offset)
    center = (np.arange(target)[:, None] + 0.5) * step
    if antialias and source == target:
        # PyTorch skips an axis whose length stays, whatever the scale factor; only here.
        return np.eye(source, dtype=np.float32)
    if antialias:
        stretch = max(step, 1.0)
        first = np.maximum((center - 2 * stretch + 0.5).astype(int), 0)
        last = np.minimum((center + 2 * stretch + 0.5).astype(int), source)
        index = np.arange(source)[None, :]
        inside = (index >= first) & (index < last)
        weights = np.where(inside, _cubic((index - center + 0.5) / stretch, -0.5), 0.0)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    position = center - 0.5
    nearest = np.floor(position).astype(int)
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        # Edges are clamped, not renormalized: a tap outside lands on the border row.
        index = np.clip(nearest + tap, 0, source - 1)
        np.add.at(
            matrix, (np.arange(target)[:, None], index), _cubic(position - nearest - tap, -0.75)
        )
    return matrix.astype(np.float32)


def resize_position_table(
    table: Float[Array, "1 length d"], spec: ViTSpec, grid: tuple[int, int]
) -> Float[Array, "1 length2 d"]:
    """The table [1, (1 +) rows * columns, D] for another grid (rows, columns) of patches; the
    class entry, where there is one, stays.

    Float32 whatever the table's dtype; the table itself where the grid is already its own.
    """
    if grid == spec.table_shape:
        return table
    rows, columns = (
        jnp.asarray(
            resize_matrix(source, side, spec.interpolate_offset, spec.interpolate_antialias)
        )
        for source, side in zip(spec.table_shape, grid, strict=True)
    )
    first = spec.table_prefix
    patches = table[:, first:].astype(jnp.float32).reshape(*spec.table_shape, -1)
    # A rounded position table would move every token: full precision, also where matmuls default to
    # less.
    patches = jnp.einsum(
        "hH,wW,HWd->hwd", rows, columns, patches, precision=jax.lax.Precision.HIGHEST
    )
    patches = patches.reshape(1, grid[0] * grid[1], -1).astype(table.dtype)
    return jnp.concatenate([table[:, :first], patches], axis=1)
