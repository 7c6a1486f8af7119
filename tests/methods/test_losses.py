"""Losses and statistics by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import assert_equal

from proteus_jax.methods.feature_standardization import (
    RunningMoments,
    batch_moments,
    ema_update,
    standardize,
)
from proteus_jax.methods.losses import token_loss
from proteus_jax.models.layers import LayerNorm
from proteus_jax.models.vit import Features


def test_sums_and_means_are_float32_whatever_comes_in() -> None:
    """LayerNorm of large means, losses, and moments of teachers' tokens in 16 bits."""
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(64, 256)) + 300, jnp.float32)
    norm = LayerNorm(256, 1e-6, rngs=nnx.Rngs(0))
    wide = np.asarray(rows, np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(norm(rows), expected, atol=3e-4)
    half = jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16)
    assert norm(half).dtype == jnp.float32
    wide = np.asarray(half, np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(norm(half), expected, atol=1e-5)

    other = jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16)
    difference = np.asarray(half, np.float64) - np.asarray(other, np.float64)
    found = token_loss(half, other)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(np.mean(difference**2), rel=1e-6)

    patches = jnp.asarray(rng.normal(size=(64, 5, 256)) + 3, jnp.bfloat16)
    moments = batch_moments(Features(half, patches, jnp.zeros((64, 0, 256))))
    wide, deep = np.asarray(half, np.float64), np.asarray(patches, np.float64)
    for one, other in zip(
        moments,
        (wide.mean(0), (wide**2).mean(0), deep.mean((0, 1)), (deep**2).mean((0, 1))),
        strict=True,
    ):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_constant_channel_of_a_teacher_is_no_nan() -> None:
    """E[x^2] - E[x]^2 may come out a little below 0."""
    for value in (1.1, 100.3, 3e3):
        mean = jnp.full(4, value, jnp.float32)
        square = jnp.square(mean) * (1 - 3e-7)
        features = Features(jnp.ones((2, 4)) * value, jnp.ones((2, 3, 4)), jnp.zeros((2, 0, 4)))
        found = standardize(features, RunningMoments(mean, square, mean, square))
        assert np.isfinite(found.cls).all()
        assert np.abs(found.cls).max() < 1


def test_moments_over_many_batches() -> None:
    """A plain mean of the first thousand, and never a smaller share than a thousandth."""
    rows = np.random.default_rng(0).normal(size=(4, 4, 2)).astype(np.float32)
    batches = [RunningMoments(*jnp.asarray(each)) for each in rows]
    running = RunningMoments(*(jnp.full(2, 3.0) for _ in range(4)))
    for count, batch in enumerate(batches):
        running = ema_update(jnp.int32(count), running, batch)
    assert_equal(running, RunningMoments(*rows.mean(axis=0)), 1e-5)
    zero, one = (RunningMoments(*(jnp.full(2, value) for _ in range(4))) for value in (0.0, 1.0))
    for updates, share in ((9, 0.1), (998, 1 / 999), (999, 1e-3), (5000, 1e-3)):
        assert_equal(ema_update(jnp.int32(updates), zero, one).cls, jnp.full(2, share), 1e-5)
