"""Ridge regression from sums over all tokens, which devices add up and the host solves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Penalties in units of the mean variance of an input: that of a map from many tokens, and those
# that are tried where there may be few.
RIDGE = 1e-3
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_TINY = 1e-12


class Sums(NamedTuple):
    """Sums over `n` rows of inputs x [n, k] and targets y [n, d], float32; `yy` has the squares of
    each target.
    """

    n: Any
    x: Any
    y: Any
    xx: Any
    xy: Any
    yy: Any


def covariance(gram: np.ndarray, total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Computes the covariance [k, k] from the sums of products, of values and of ones; float64."""
    mean = np.asarray(total, np.float64) / count
    return np.asarray(gram, np.float64) / count - np.outer(mean, mean)


class Linear(NamedTuple):
    """The map y = x @ kernel + bias, float32 on the host."""

    kernel: Float[np.ndarray, "k d"]
    bias: Float[np.ndarray, "d"]


def no_sums(inputs: int, targets: int) -> Sums:
    """Makes the sums over no row."""
    shapes = ((), (inputs,), (targets,), (inputs, inputs), (inputs, targets), (targets,))
    return Sums(*(jnp.zeros(shape, jnp.float32) for shape in shapes))


def standardized(tokens: Float[Array, "... d"], epsilon: float) -> Float[Array, "... d"]:
    """Computes what a LayerNorm does before its scale and bias, float32."""
    wide = tokens.astype(jnp.float32)
    centered = wide - wide.mean(axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + epsilon)


def product(left: Float[Array, "... k"], right: Float[Array, "... d"]) -> Float[Array, "k d"]:
    """Computes the sum over rows of the outer products, float32 whatever devices prefer."""
    left, right = (rows(each) for each in (left, right))
    return jnp.matmul(left.T, right, precision=jax.lax.Precision.HIGHEST)


def rows(values: Float[Array, "... k"]) -> Float[Array, "n k"]:
    """Reshapes to one row a token, float32."""
    return values.reshape(-1, values.shape[-1]).astype(jnp.float32)


def add_rows(
    sums: Sums,
    x: Float[Array, "... k"],
    y: Float[Array, "... d"],
    chosen: Bool[Array, "..."] | None = None,
) -> Sums:
    """Adds the rows of a batch, or those that are chosen."""
    x, y = rows(x), rows(y)
    counted = jnp.ones(len(x)) if chosen is None else chosen.reshape(-1).astype(jnp.float32)
    x, y = (each * counted[:, None] for each in (x, y))
    new = Sums(
        counted.sum(),
        x.sum(axis=0),
        y.sum(axis=0),
        product(x, x),
        product(x, y),
        jnp.square(y).sum(axis=0),
    )
    return jax.tree.map(jnp.add, sums, new)


class _Moments(NamedTuple):
    """Means and covariances, float64."""

    x: np.ndarray
    y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray


def _moments(sums: Sums) -> _Moments:
    count, x, y, xx, xy, yy = (np.asarray(part, np.float64) for part in sums)
    x, y = x / count, y / count
    centered = xx / count - np.outer(x, x), xy / count - np.outer(x, y)
    return _Moments(x, y, *centered, yy / count - y**2)


def solve(sums: Sums, ridge: float = RIDGE) -> Linear:
    """Finds the map with the least squared error, its kernel penalized by `ridge`, in float64."""
    moments = _moments(sums)
    size = len(moments.xx)
    penalty = ridge * max(np.trace(moments.xx) / size, _TINY)
    kernel = np.linalg.solve(moments.xx + penalty * np.eye(size), moments.xy)
    bias = moments.y - moments.x @ kernel
    return Linear(kernel.astype(np.float32), bias.astype(np.float32))


def squared_error(linear: Linear, sums: Sums) -> float:
    """Computes the mean squared error of a map over the rows of some sums, summed over targets."""
    moments, kernel = _moments(sums), linear.kernel.astype(np.float64)
    offset = moments.x @ kernel + linear.bias - moments.y
    explained = np.sum(kernel * (2 * moments.xy - moments.xx @ kernel))
    return float(moments.yy.sum() - explained + offset @ offset)


def solve_validated(fitted: Sums, held_out: Sums) -> Linear:
    """Finds the map from all rows with the penalty out of RIDGES that does best on `held_out` when
    solved on `fitted` alone.
    """
    errors = [squared_error(solve(fitted, ridge), held_out) for ridge in RIDGES]
    both = Sums(*(np.asarray(a) + np.asarray(b) for a, b in zip(fitted, held_out, strict=True)))
    return solve(both, RIDGES[int(np.argmin(errors))])
