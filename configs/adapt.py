"""A released DINOv2 ViT-S/14 adapted to one's own images, DINOv2-B its teacher; say where the
images are: --config.data.root=DIR

The student starts from the released weights. Length and rate are this project's own choice: a tenth
of the paper's epochs at a fifth of its rate, as little has to be learned anew.
"""

from typing import Any

import ml_collections

from proteus_jax.configs import base


def get_config() -> ml_collections.ConfigDict:
    """Short, and gentle with what is there."""
    config: Any = base.get_config()
    config.teacher = "dinov2_vitb14"
    config.student = ("vit_small",)
    config.init.method = "copy"
    config.init.source = "dinov2_vits14"
    config.batch = 256
    config.epochs = 30.0
    config.learning_rate = 5e-5
    config.optimizer.warmup_epochs = 1.0
    return config
