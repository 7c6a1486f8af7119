"""Random erasing, on the device: a box of noise in some of the images, which teacher and student
both see.

Source: arXiv 2407.10366 and timm 0.9.16 (RandomErasing, mode "pixel", one box).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AREA = (0.02, 1 / 3)
RATIO = (0.3, 1 / 0.3)
ATTEMPTS = 10


def random_erasing(
    key: jax.Array, images: Float[Array, "b h w 3"], probability: float
) -> Float[Array, "b h w 3"]:
    """Normalized images, each with a chance of one box of normal noise: area uniform in AREA,
    aspect ratio log-uniform in RATIO, place uniform.

    An image none of whose ATTEMPTS at a box fits stays as it is.
    """
    count, height, width, _ = images.shape
    area_key, ratio_key, top_key, left_key, chance_key, noise_key = jax.random.split(key, 6)
    tries = (count, ATTEMPTS)
    area = height * width * jax.random.uniform(area_key, tries, minval=AREA[0], maxval=AREA[1])
    ratio = jnp.exp(
        jax.random.uniform(ratio_key, tries, minval=math.log(RATIO[0]), maxval=math.log(RATIO[1]))
    )
    tall = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    wide = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    tall, wide = (jnp.take_along_axis(side, first, axis=1) for side in (tall, wide))
    chance = jax.random.uniform(chance_key, (count, 1))
    erased = fits.any(axis=1, keepdims=True) & (chance < probability)

    def inside(place_key: jax.Array, side: jax.Array, length: int) -> jax.Array:
        start = jnp.floor(jax.random.uniform(place_key, (count, 1)) * (length - side + 1))
        position = jnp.arange(length)
        return (position >= start) & (position < start + side)

    rows, columns = inside(top_key, tall, height), inside(left_key, wide, width)
    box = (erased & rows)[:, :, None] & columns[:, None, :]
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where(box[..., None], noise, images)
