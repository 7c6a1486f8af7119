"""The mean norm of class tokens."""

from typing import Any

import ml_collections
from proteus_jax.configs.eval import base


def get_config() -> ml_collections.ConfigDict:
    """The protocol, with its own field."""
    config: Any = base.get_config()
    config.unlock()
    config.protocol = "norm"
    config.norm = ml_collections.ConfigDict({"images": 5})
    return config.lock()
