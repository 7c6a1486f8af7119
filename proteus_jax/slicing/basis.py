"""The directions of a model's stream that a narrower one keeps.

A narrower LayerNorm takes the mean over its own channels away. So the stream's components are
turned into a space in which the sum over channels is 0: then both norms see the same.
"""

import numpy as np
from jaxtyping import Float


def zero_mean_basis(width: int) -> Float[np.ndarray, "d e"]:
    """Makes [width, width - 1] orthonormal columns, each with the sum 0 (Helmert's)."""
    numbers = np.arange(1, width)
    basis = np.triu(np.ones((width, width - 1)))
    basis[numbers, numbers - 1] = -numbers
    return basis / np.sqrt(numbers * (numbers + 1.0))


def principal_basis(covariance: Float[np.ndarray, "d d"], width: int) -> Float[np.ndarray, "d e"]:
    """Makes Q [d, width]: stream @ Q is the stream along its width - 1 principal components, with
    the mean 0 over channels. Of a model's own width it keeps all there is.
    """
    _, vectors = np.linalg.eigh(covariance.astype(np.float64))
    components = vectors[:, ::-1][:, : width - 1]
    # An eigenvector's sign is the library's choice: the largest entry is made positive.
    largest = components[np.abs(components).argmax(axis=0), np.arange(width - 1)]
    components = components * np.where(largest < 0, -1.0, 1.0)
    return (components @ zero_mean_basis(width).T).astype(np.float32)
