"""Logistic regression on class tokens of the paper's twelve data sets."""

from typing import Any

import ml_collections
from proteus_jax.configs.eval import base


def get_config() -> ml_collections.ConfigDict:
    """The protocol alone. Below data.root lies a folder for each data set, or `tfds:`."""
    config: Any = base.get_config()
    config.protocol = "finegrained"
    # As the authors run it.
    config.precision = "float32"
    return config
