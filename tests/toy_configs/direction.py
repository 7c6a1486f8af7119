"""quickstart by a method of its own."""

from typing import Any

import ml_collections

from proteus_jax.configs import quickstart_paper as quickstart


def get_config() -> ml_collections.ConfigDict:
    """The group of the method is another one."""
    config: Any = quickstart.get_config()
    config.unlock()
    config.method = ml_collections.ConfigDict({"name": "direction", "temperature": 0.5})
    return config.lock()
