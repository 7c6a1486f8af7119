"""A linear head of ImageNet on ImageNet-A, -R, -Sketch, -V2 and -C."""

from typing import Any

import ml_collections
from proteus_jax.configs.eval import base


def get_config() -> ml_collections.ConfigDict:
    """The protocol alone."""
    config: Any = base.get_config()
    config.protocol = "robustness"
    return config
