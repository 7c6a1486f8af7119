"""ViT-L/14 from DINOv2-g by the fast recipe of configs/fast.py, not the paper\'s; say where the
images are: --config.data.root=DIR
"""

import ml_collections

from proteus_jax.configs import fast, vitl14


def get_config() -> ml_collections.ConfigDict:
    """The pair of configs/vitl14.py."""
    return fast.apply(vitl14.get_config())
