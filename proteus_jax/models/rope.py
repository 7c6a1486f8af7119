"""DINOv3's positions: queries and keys of patches turned by angles of their place in the image.

Source: facebookresearch/dinov3 layers/rope_position_encoding.py, in evaluation.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The longest wave is this many times the shortest.
PERIOD = 100.0


class Rotation(NamedTuple):
    """The rotation of every token and channel of a head, float32; the tokens before the patches do
    not turn.
    """

    cosine: Float[np.ndarray, "t d"]
    sine: Float[np.ndarray, "t d"]


def rotation(grid: tuple[int, int], channels: int, prefix: int) -> Rotation:
    """For a grid (rows, columns) of patches after `prefix` other tokens, heads of `channels`."""
    frequencies = PERIOD ** -np.arange(0, 1, 4 / channels, dtype=np.float32)
    # Centers of patches from -1 to 1, on either axis whatever the other's length.
    rows, columns = (2 * (np.arange(side) + np.float32(0.5)) / side - 1 for side in grid)
    places = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = np.float32(2 * math.pi) * places.astype(np.float32) * frequencies
    angles = np.tile(angles.reshape(len(places), -1), 2)
    still = np.zeros((prefix, channels), np.float32)
    angles = np.concatenate([still, angles])
    return Rotation(np.cos(angles), np.sin(angles))


def turned(qkv: Float[Array, "b t 3 h d"], by: Rotation) -> Float[Array, "b t 3 h d"]:
    """Queries and keys turned, values as they are; arithmetic in float32."""
    moved = qkv[:, :, :2].astype(jnp.float32)
    first, second = jnp.split(moved, 2, axis=-1)
    other = jnp.concatenate([-second, first], axis=-1)
    cosine, sine = (jnp.asarray(part)[None, :, None, None, :] for part in by)
    moved = (moved * cosine + other * sine).astype(qkv.dtype)
    return jax.lax.concatenate([moved, qkv[:, :, 2:]], dimension=2)
