"""Ridge regression onto classes: many regularizers from one eigendecomposition, chosen by leaving
one image out, which costs nothing more.
"""

from typing import NamedTuple

import numpy as np

# Relative to the mean eigenvalue of the features' covariance.
REGULARIZERS = 10.0 ** np.linspace(-6, 2, 17)


class Probe(NamedTuple):
    """A linear classifier of standardized features."""

    mean: np.ndarray
    deviation: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    regularizer: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """The class [M] of features [M, D]."""
        standard = (features.astype(np.float64) - self.mean) / self.deviation
        return (standard @ self.weights + self.bias).argmax(axis=1)


def fit(features: np.ndarray, labels: np.ndarray) -> Probe:
    """The probe of features [N, D] and classes [N] that is right most often on images left out;
    float64.

    Of regularizers that are as good, the largest.
    """
    features = features.astype(np.float64)
    mean, deviation = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    standard = (features - mean) / deviation
    target = np.eye(int(labels.max()) + 1)[labels]
    bias = target.mean(axis=0)
    target = target - bias
    values, vectors = np.linalg.eigh(standard.T @ standard)
    values = np.maximum(values, 0.0)
    rotated = standard @ vectors
    correlation = rotated.T @ target
    best, best_right = None, -1.0
    for regularizer in REGULARIZERS[::-1]:
        shrunk = 1.0 / (values + regularizer * values.mean() + np.finfo(np.float64).tiny)
        fitted = rotated @ (shrunk[:, None] * correlation)
        # The share of itself in each fitted value, the bias included.
        own = np.einsum("nd,d,nd->n", rotated, shrunk, rotated) + 1.0 / len(features)
        held_out = target - (target - fitted) / np.maximum(1.0 - own, 1e-9)[:, None]
        right = float(np.mean((held_out + bias).argmax(axis=1) == labels))
        if right > best_right:
            best, best_right = (regularizer, shrunk), right
    assert best is not None
    weights = vectors @ (best[1][:, None] * correlation)
    return Probe(mean, deviation, weights, bias, float(best[0]))
