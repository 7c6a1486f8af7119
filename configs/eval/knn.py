"""Weighted k nearest neighbors of class tokens: no training, DINOv2's constants."""

from typing import Any

import ml_collections
from proteus_jax.configs.eval import base


def get_config() -> ml_collections.ConfigDict:
    """The protocol alone."""
    config: Any = base.get_config()
    config.protocol = "knn"
    return config
