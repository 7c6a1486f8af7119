"""The precisions that models compute in, by name."""

from typing import Any

import jax.numpy as jnp

PRECISIONS = ("auto", "float32", "bfloat16")


def dtype_of(precision: str, platform: str) -> Any:
    """float32, bfloat16, float16, or what `auto` means on a platform."""
    if precision == "auto":
        precision = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(precision)
