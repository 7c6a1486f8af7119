"""Measures of what two sets of features have in common, and of one set's shape; numpy, float64."""

import numpy as np


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Linear centered kernel alignment, 0 to 1, of features [N, D1] and [N, D2] of the same images.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), equation 3 with linear kernels.
    """
    x, y = (_centered(rows) for rows in (first, second))
    shared = np.linalg.norm(x.T @ y) ** 2
    own = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(shared / own) if own else 0.0


def spectrum(features: np.ndarray) -> np.ndarray:
    """Shares [min(N, D)] of the variance along the principal components, the largest first."""
    variances = np.linalg.svd(_centered(features), compute_uv=False) ** 2
    total = variances.sum()
    return variances / total if total else variances


def effective_rank(features: np.ndarray) -> float:
    """The exponential of the spectrum's entropy: 1 on a line, D where all directions are alike.

    Source: Roy and Vetterli 2007, on the shares of variance.
    """
    shares = spectrum(features)
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _centered(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows - rows.mean(axis=0)
