"""The fast recipe, not the paper's: a ViT-S/14 cut out of DINOv2-B, its blocks and heads fitted to
it, then trained for a tenth of the paper's epochs. Say where the images are: --config.data.root=DIR

docs/fast.md explains it, and says what was measured of it and what was not.
"""

from typing import Any

import ml_collections

from proteus_jax.configs import vits14


def apply(config: Any) -> Any:
    """Turns a recipe into the fast one of the same pair."""
    config.unlock()
    config.init.method = "slice"
    config.init.heads = "least_squares"
    config.init.images = 4096
    config.init.stream_scale = 8.0
    config.epochs = 30.0
    config.learning_rate = 2e-4
    config.optimizer.warmup_epochs = 3.0
    config.ema_decay = 0.999
    return config.lock()


def get_config() -> ml_collections.ConfigDict:
    """ViT-S/14 from DINOv2-B."""
    return apply(vits14.get_config())
