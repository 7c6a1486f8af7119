"""ViT-Ti/14 from DINOv2-S by the fast recipe of configs/fast.py, not the paper\'s; say where the
images are: --config.data.root=DIR
"""

import ml_collections

from proteus_jax.configs import fast, vitti14


def get_config() -> ml_collections.ConfigDict:
    """The pair of configs/vitti14.py."""
    return fast.apply(vitti14.get_config())
