"""Which patches of an image are masked."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def random_masks(key: jax.Array, count: int, patches: int, ratio: float) -> Bool[Array, "m n"]:
    """`count` masks of exactly floor(patches * ratio) patches each, uniformly without
    replacement.
    """
    masked = int(patches * ratio)
    noise = jax.random.uniform(key, (count, patches))
    ranks = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return ranks < masked
