"""ViT-B/16 from DINOv2-L and CLIP-L at once, tokens standardized, with heads for each; say where
the images are: --config.data.root=DIR

The teachers have patches of 14 px, the student of 16: what they say of patches is resampled to its
grid. An example of the project's own, not of the paper.
"""

from typing import Any

import ml_collections

from proteus_jax.configs import base


def get_config() -> ml_collections.ConfigDict:
    """The paper's recipe, with a second teacher of the class token and the patches."""
    config: Any = base.get_config()
    config.teacher = "dinov2_vitl14"
    config.teachers.teacher.standardize = True
    config.student = ("vit_base_patch16",)
    clip = base.add_teacher(config, "clip", "clip_vitl14")
    # CLIP's patches have no norm of their own, and it was never trained to say anything by them.
    clip.loss_weights.patch = 0.0
    return config
