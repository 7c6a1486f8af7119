"""Cuts a smaller ViT out of a larger one along the principal components of its stream, and fits it
block by block to what the larger one computes on unlabeled images: a student before any training.

Related: SliceGPT (arXiv 2401.15024), Low-Rank Clone (arXiv 2505.12781). docs/fast.md explains it.
"""

from collections.abc import Callable

import numpy as np

from proteus_jax.models.config import ViTSpec
from proteus_jax.slicing.basis import principal_basis
from proteus_jax.slicing.fit import Fit, Slice
from proteus_jax.slicing.source import SourceModel


class Slicer:
    """Slices one model to any number of sizes, on the same images."""

    def __init__(self, source: SourceModel):
        self.source = source
        self._covariance: np.ndarray | None = None

    def slice(self, student: ViTSpec, progress: Callable[[str], None] = lambda text: None) -> Slice:
        """Slices to a spec of `sizes.sliced_spec`. `progress` hears of each block."""
        if self._covariance is None:
            self._covariance = self.source.input_covariance(progress)
        basis = principal_basis(self._covariance, student.width)
        return Fit(self.source, student, basis).run(progress)
