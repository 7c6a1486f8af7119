"""Linears after a norm, on a student's standardized stream in place of their own."""

import numpy as np

from proteus_jax.models.functional import Params
from proteus_jax.slicing.least_squares import Linear


def unit_norm(width: int) -> Params:
    """A LayerNorm that scales and moves nothing."""
    return {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}


def columns_of(groups: np.ndarray, size: int, width: int = 0, parts: int = 1) -> np.ndarray:
    """The numbers of the columns of some groups of `size`, in each of `parts` that are `width`
    wide.
    """
    columns = (groups[:, None] * size + np.arange(size)).reshape(-1)
    return np.concatenate([columns + part * width for part in range(parts)])


def read(norm: Params, linear: Params, seen: Linear, columns: np.ndarray) -> tuple[Params, Params]:
    """A norm and the Linear after it for the student: some columns of the source's, their norm's
    scale and bias folded in, through the map from what the student's norm sees to what the source's
    does.
    """
    kernel = (norm["scale"][:, None] * linear["kernel"].astype(np.float32))[:, columns]
    bias = (norm["bias"] @ linear["kernel"].astype(np.float32) + linear["bias"])[columns]
    own = {
        "kernel": np.asarray(seen.kernel @ kernel, np.float32),
        "bias": np.asarray(bias + seen.bias @ kernel, np.float32),
    }
    return unit_norm(len(seen.kernel)), own


def without_key_bias(norm: Params, qkv: Params) -> tuple[Params, Params]:
    """The same map for a model that reads no bias of keys: the norm's bias makes that of the keys,
    and the others' are less by what it makes of them.
    """
    width = len(qkv["kernel"])
    keys = slice(width, 2 * width)
    kernel = qkv["kernel"][:, keys].astype(np.float64)
    wanted = qkv["bias"][keys]
    shift = np.linalg.lstsq(kernel.T, wanted, rcond=1e-3)[0].astype(np.float32)
    bias = qkv["bias"] - shift @ qkv["kernel"]
    bias[keys] = 0.0
    return {**norm, "bias": shift}, {"kernel": qkv["kernel"], "bias": bias}
