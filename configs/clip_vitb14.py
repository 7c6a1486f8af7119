"""CLIP-style ViT-B/14 from OpenAI's CLIP ViT-L/14, as in the paper: the class token alone, no patch
or feature loss; say where the images are: --config.data.root=DIR

As the authors' code does, both models are given ImageNet's channel statistics, though CLIP was
trained with its own (--config.teachers.teacher.normalization=native has those). Beyond the paper,
all three losses: --config.method.loss_weights.feature=1 --config.method.loss_weights.patch=1
"""

from typing import Any

import ml_collections

from proteus_jax.configs import base


def get_config() -> ml_collections.ConfigDict:
    """The paper's recipe for this pair."""
    config: Any = base.get_config()
    config.teacher = "clip_vitl14"
    config.teachers.teacher.normalization = "imagenet"
    config.student = ("vit_base_clip",)
    config.method.loss_weights.feature = 0.0
    config.method.loss_weights.patch = 0.0
    return config
