"""A student beside its teacher: alignment of all layers, rank, neighbors, errors."""

from typing import Any

import ml_collections
from proteus_jax.configs.eval import base


def get_config() -> ml_collections.ConfigDict:
    """The protocol alone."""
    config: Any = base.get_config()
    config.protocol = "analysis"
    return config
