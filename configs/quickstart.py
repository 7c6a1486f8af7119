"""A ViT-Ti/14 cut out of a trained DINOv2 ViT-S/14, and trained on nineteen pictures, on two CPU
cores, in minutes: the fast recipe, not the paper's (docs/fast.md).

Nothing has to be fetched but two wheels of the package index. --config.data.root=DIR takes any
folder instead. configs/quickstart_paper.py is the paper's recipe on the same pictures.
"""

from typing import Any

import ml_collections

from proteus_jax.configs import quickstart_paper


def get_config() -> ml_collections.ConfigDict:
    """Half of the steps, from a slice of the teacher, and gentle with it."""
    config: Any = quickstart_paper.get_config()
    config.unlock()
    config.init.method = "slice"
    config.init.heads = "least_squares"
    config.init.stream_scale = 8.0
    config.steps = 130
    config.learning_rate = 3e-5
    config.optimizer.warmup_steps = 20
    config.eval_every = 65
    config.checkpoint_every = 65
    return config.lock()
