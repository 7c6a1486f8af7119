"""A slice of the attention pool that stands for a class token in some models.

One token an image is too few to fit it on. Heads, units and directions are chosen by what the
source computes, and its weights are taken as they are.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import Params
from proteus_jax.models.pooling import PoolParts
from proteus_jax.slicing.basis import principal_basis
from proteus_jax.slicing.folding import columns_of, read
from proteus_jax.slicing.least_squares import Linear, covariance, product, standardized
from proteus_jax.slicing.selection import choose_groups


class PoolSums(NamedTuple):
    """Second moments of what a pool computes, over images."""

    n: Any
    heads: Any
    heads_sum: Any
    units: Any
    units_sum: Any
    # Of the token between its two steps and of the class token, standardized.
    tokens: Any


def sums_of(parts: PoolParts, epsilon: float) -> PoolSums:
    """The moments over a group of images."""
    tokens = [standardized(part, epsilon) for part in (parts.pooled, parts.cls)]
    return PoolSums(
        jnp.asarray(len(parts.cls), jnp.float32),
        product(parts.heads, parts.heads),
        parts.heads.sum(axis=0),
        product(parts.units, parts.units),
        parts.units.astype(jnp.float32).sum(axis=0),
        product(tokens[0], tokens[0]) + product(tokens[1], tokens[1]),
    )


def sliced_pool(
    params: Params, spec: ViTSpec, student: ViTSpec, seen: Linear, sums: PoolSums
) -> Params:
    """The pool of a student, whose last norm's tokens `seen` turns into the source's before scale
    and bias.
    """
    pool = params["pool"]
    size = spec.width // spec.heads
    basis = principal_basis(sums.tokens, student.width)
    heads = choose_groups(
        covariance(sums.heads, sums.heads_sum, sums.n),
        pool["proj"]["kernel"] @ basis,
        size,
        student.heads,
    )
    columns = columns_of(heads, size)
    _, qkv = read(params["norm"], pool["qkv"], seen, columns_of(heads, size, spec.width, parts=3))
    # The learned query meets the kernel alone, so that the bias can say what it comes to.
    query = pool["probe"].reshape(-1) @ pool["qkv"]["kernel"] + pool["qkv"]["bias"]
    qkv["bias"][: student.width] = query[columns]
    moments = covariance(sums.units, sums.units_sum, sums.n)
    last = pool["mlp"]["fc2"]
    units = choose_groups(moments, last["kernel"] @ basis, 1, student.hidden)
    ratio = np.float32((spec.width / student.width) ** 0.5)
    inside = Linear(ratio * basis.T, np.zeros(spec.width, np.float32))
    norm, first = read(pool["norm"], pool["mlp"]["fc1"], inside, units)
    return {
        "probe": np.zeros((1, 1, student.width), np.float32),
        "qkv": qkv,
        "proj": _written(pool["proj"], columns, basis),
        "norm": norm,
        "mlp": {"fc1": first, "fc2": _written(last, units, basis)},
    }


def _written(linear: Params, rows: np.ndarray, basis: np.ndarray) -> Params:
    return {
        "kernel": np.asarray(linear["kernel"][rows] @ basis, np.float32),
        "bias": np.asarray(linear["bias"] @ basis, np.float32),
    }
