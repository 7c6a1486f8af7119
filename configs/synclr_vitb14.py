"""SynCLR-style ViT-B/14 from SynCLR ViT-L/14, as in the paper, with all three losses; say where the
images are, and where the teacher is, whose file is fetched by hand: --config.data.root=DIR
--config.teacher=DIR

As the authors' code does, both models are given ImageNet's channel statistics, though SynCLR was
trained with CLIP's (--config.teachers.teacher.normalization=native has those).
"""

from typing import Any

import ml_collections

from proteus_jax.configs import base


def get_config() -> ml_collections.ConfigDict:
    """The paper's recipe for this pair."""
    config: Any = base.get_config()
    config.teacher = "synclr_vitl14"
    config.teachers.teacher.normalization = "imagenet"
    config.student = ("vit_base_synclr",)
    return config
