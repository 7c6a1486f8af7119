"""ViT-S/14 from DINOv2-B on ImageNet-1K, as in the paper; say where the images are:
--config.data.root=DIR
"""

from typing import Any

import ml_collections

from proteus_jax.configs import base


def get_config() -> ml_collections.ConfigDict:
    """The paper's recipe for this pair."""
    config: Any = base.get_config()
    config.teacher = "dinov2_vitb14"
    config.student = ("vit_small",)
    return config
