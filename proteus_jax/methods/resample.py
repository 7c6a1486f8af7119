"""How one batch of images reaches models that want other sizes, statistics and grids.

Where a model wants what is there already nothing is computed: the same array comes back.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from proteus_jax.models.normalization import Normalization
from proteus_jax.models.pos_embed import resize_matrix
from proteus_jax.models.vit import Features


def resize_images(pixels: Float[Array, "b h w c"], side: int) -> Float[Array, "b side side c"]:
    """Square images of another side, by antialiased bicubic interpolation."""
    if pixels.shape[1:3] == (side, side):
        return pixels
    return _on_a_grid(pixels, (side, side))


def renormalize(
    pixels: Float[Array, "b h w 3"], old: Normalization, new: Normalization
) -> Float[Array, "b h w 3"]:
    """Images that have one model's statistics with another's instead."""
    if old == new:
        return pixels
    factor = jnp.asarray(old.std, jnp.float32) / jnp.asarray(new.std, jnp.float32)
    shift = jnp.asarray(old.mean, jnp.float32) - jnp.asarray(new.mean, jnp.float32)
    return pixels * factor + shift / jnp.asarray(new.std, jnp.float32)


def resize_patch_grid(features: Features, side: int) -> Features:
    """Features with the patch tokens of a square grid resampled to another: every new patch gets
    what the old ones say at its place.
    """
    batch, count, width = features.patches.shape
    old = round(count**0.5)
    if old == side:
        return features
    patches = features.patches.reshape(batch, old, old, width)
    patches = _on_a_grid(patches, (side, side)).reshape(batch, side**2, width)
    return features._replace(patches=patches)


def _on_a_grid(values: jax.Array, sides: tuple[int, int]) -> jax.Array:
    rows, columns = (
        jnp.asarray(resize_matrix(old, new, 0.0, True))
        for old, new in zip(values.shape[1:3], sides, strict=True)
    )
    moved = jnp.einsum(
        "hH,wW,bHWd->bhwd",
        rows,
        columns,
        values.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return moved.astype(values.dtype)
