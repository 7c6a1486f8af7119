"""Which heads and hidden units a narrower model keeps: those whose span explains most of what all
of them write into the stream, found one after the other.
"""

import numpy as np
from jaxtyping import Float

# Units are taken in so many rounds: the best of a round are taken together, as a round for each
# would take minutes a block.
ROUNDS = 64
_SMALLEST = 1e-6


def choose_groups(
    covariance: Float[np.ndarray, "n n"],
    outputs: Float[np.ndarray, "n d"],
    size: int,
    count: int,
) -> np.ndarray:
    """Chooses `count` groups of `size` neighboring inputs (1 for units, the channels of a head for
    heads); their numbers in ascending order.

    `covariance` is that of the inputs, `outputs` is the kernel through which they are written.
    """
    groups = len(covariance) // size
    if count >= groups:
        return np.arange(groups)
    remaining = covariance.astype(np.float64)
    # Covariance of each input with what all of them write together.
    cross = remaining @ outputs.astype(np.float64)
    floor = _SMALLEST * np.trace(remaining) / len(remaining)
    chosen: list[int] = []
    while len(chosen) < count:
        gains = _gains(remaining, cross, size, floor)
        gains[chosen] = -np.inf
        best = np.argsort(-gains, kind="stable")[: min(_round(count, size), count - len(chosen))]
        chosen += best.tolist()
        members = (best[:, None] * size + np.arange(size)).reshape(-1)
        block = remaining[np.ix_(members, members)] + floor * np.eye(len(members))
        taken = np.linalg.solve(block, np.hstack([remaining[members], cross[members]]))
        columns = remaining[:, members].copy()
        remaining -= columns @ taken[:, : len(remaining)]
        cross -= columns @ taken[:, len(remaining) :]
    return np.sort(np.asarray(chosen))


def _round(count: int, size: int) -> int:
    return 1 if size > 1 else max(1, count // ROUNDS)


def _gains(remaining: np.ndarray, cross: np.ndarray, size: int, floor: float) -> np.ndarray:
    """How much of the output's variance each group would explain beyond those taken already."""
    if size == 1:
        return (cross**2).sum(axis=1) / np.maximum(np.diag(remaining), floor)
    groups = len(remaining) // size
    gains = np.empty(groups)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        block = remaining[part, part] + floor * np.eye(size)
        gains[group] = np.sum(cross[part] * np.linalg.solve(block, cross[part]))
    return gains
