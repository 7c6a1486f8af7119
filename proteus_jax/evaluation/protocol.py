"""The context that every protocol is given."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import FrozenBackbone, LoaderConfig
from proteus_jax.weights.feature_extractor import Model


class Context(NamedTuple):
    """A configuration, the model that it names, where it runs, and to whom it speaks."""

    config: EvalConfig
    model: Model
    frozen: FrozenBackbone
    mesh: Mesh
    workdir: Path
    view: CenterCrop
    reading: LoaderConfig
    say: Callable[[str], None]
    progress: Callable[[str], None]
