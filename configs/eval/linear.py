"""DINOv2's linear probe: 52 heads on frozen features, trained at once."""

from typing import Any

import ml_collections
from proteus_jax.configs.eval import base


def get_config() -> ml_collections.ConfigDict:
    """The protocol alone."""
    config: Any = base.get_config()
    config.protocol = "linear"
    return config
