"""ViT-L/14 from DINOv2-g on ImageNet-1K, as in the paper; say where the images are:
--config.data.root=DIR
"""

from typing import Any

import ml_collections

from proteus_jax.configs import base


def get_config() -> ml_collections.ConfigDict:
    """The paper's recipe for this pair."""
    config: Any = base.get_config()
    config.teacher = "dinov2_vitg14"
    config.student = ("vit_large",)
    # Fits 16 GB a device from 16 devices on; with 32 GB or more, off is a sixth faster
    # (docs/topologies.md).
    config.remat = "blocks"
    return config
