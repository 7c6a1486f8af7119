"""A teacher's tokens with mean 0 and deviation 1 in every channel: teachers of different scales can
then be learned from at once.

Running statistics in the manner of UNIC (arXiv 2408.05088): class tokens and patches apart.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from proteus_jax.models.vit import Features

# The share that a batch has in the statistics once there have been many.
LEAST_SHARE = 1e-3
_EPSILON = 1e-6


class RunningMoments(NamedTuple):
    """Means of tokens and of their squares, float32."""

    cls: Float[Array, "d"]
    cls_square: Float[Array, "d"]
    patches: Float[Array, "d"]
    patches_square: Float[Array, "d"]


def init_moments(width: int) -> RunningMoments:
    """Before the first batch: mean 0, deviation 1."""
    return RunningMoments(*(jnp.full(width, value) for value in (0.0, 1.0, 0.0, 1.0)))


def batch_moments(features: Features) -> RunningMoments:
    """Moments of one batch."""
    cls = features.cls.astype(jnp.float32)
    patches = features.patches.astype(jnp.float32)
    return RunningMoments(
        jnp.mean(cls, axis=0),
        jnp.mean(jnp.square(cls), axis=0),
        jnp.mean(patches, axis=(0, 1)),
        jnp.mean(jnp.square(patches), axis=(0, 1)),
    )


def moments_for_step(
    updates: jax.Array, running: RunningMoments, batch: RunningMoments
) -> RunningMoments:
    """The moments that a step after so many updates uses: the running ones or, before there are
    any, the batch's own.
    """
    return jax.tree.map(lambda old, new: jnp.where(updates == 0, new, old), running, batch)


def ema_update(
    updates: jax.Array, running: RunningMoments, batch: RunningMoments
) -> RunningMoments:
    """A plain mean over the first batches, then an average that forgets slowly."""
    share = jnp.maximum(1.0 / (updates + 1.0), LEAST_SHARE)
    return jax.tree.map(lambda old, new: old + share * (new - old), running, batch)


def standardize(features: Features, moments: RunningMoments) -> Features:
    """Float32 tokens; registers stay as they are."""
    return Features(
        _standardize(features.cls, moments.cls, moments.cls_square),
        _standardize(features.patches, moments.patches, moments.patches_square),
        features.registers,
    )


def unstandardize(features: Features, moments: RunningMoments) -> Features:
    """The inverse: standardized tokens in the teacher's own scale."""
    return Features(
        _unstandardize(features.cls, moments.cls, moments.cls_square),
        _unstandardize(features.patches, moments.patches, moments.patches_square),
        features.registers,
    )


def standardizing_map(moments: RunningMoments, of_class: bool) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the deviation [d] that class tokens, or patches, are standardized by."""
    mean, square = moments[:2] if of_class else moments[2:]
    return np.asarray(mean), np.asarray(_deviation(jnp.asarray(mean), jnp.asarray(square)))


def _deviation(mean: jax.Array, square: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0.0) + _EPSILON)


def _standardize(tokens: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
    return (tokens.astype(jnp.float32) - mean) / _deviation(mean, square)


def _unstandardize(tokens: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
    return tokens.astype(jnp.float32) * _deviation(mean, square) + mean
