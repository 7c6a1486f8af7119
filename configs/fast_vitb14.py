"""ViT-B/14 from DINOv2-L by the fast recipe of configs/fast.py, not the paper\'s; say where the
images are: --config.data.root=DIR
"""

import ml_collections

from proteus_jax.configs import fast, vitb14


def get_config() -> ml_collections.ConfigDict:
    """The pair of configs/vitb14.py."""
    return fast.apply(vitb14.get_config())
