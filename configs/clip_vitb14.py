"""CLIP-style ViT-B/14 from OpenAI's CLIP ViT-L/14, as in the paper: the class token alone, no patch
or feature loss; say where the images are: --config.data.root=DIR

As the authors' code does, both models are given ImageNet's channel statistics, though CLIP was
trained with its own (--config.teacher_normalisation=own has those). Beyond the paper, all three
levels: --config.loss.feature=1 --config.loss.patch=1
"""

from typing import Any

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """The paper's recipe for this pair."""
    config: Any = base.get_config()
    config.teacher = "clip_vitl14"
    config.teacher_normalisation = "imagenet"
    config.student = ("vit_base_clip",)
    config.loss.feature = 0.0
    config.loss.patch = 0.0
    return config
