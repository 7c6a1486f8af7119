"""How far a student has come towards its teacher, on images it was never trained on, without
labels.

Tokens of one model share a large mean, so that a constant already has a raw cosine of 0.6 to 0.8
to a DINOv2 teacher. Here the teacher's mean token over the held-out views is subtracted from both
sides first.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from proteus_jax.models.student import Predictions
from proteus_jax.models.vit import Features

NEIGHBOURS = 5


class Agreement(NamedTuple):
    """Centred cosine of class and of patch tokens, -1 to 1, and the share of nearest neighbours in
    common, 0 to 1.
    """

    cls: float
    patch: float
    neighbours: float


class TeacherTokens(NamedTuple):
    """The teacher's class [M, D] and patch tokens [M, N, D] of the held-out views, float32 on the
    host.
    """

    cls: np.ndarray
    patches: np.ndarray


def teacher_tokens(
    teacher: Callable[[np.ndarray], Features], views: np.ndarray, batch: int
) -> TeacherTokens:
    """Once a run: views uint8 [M, H, W, 3] through the teacher, `batch` at a time."""
    parts = [teacher(images) for images in _batches(views, batch)]
    return TeacherTokens(
        _joined([part.cls for part in parts], len(views)),
        _joined([part.patches for part in parts], len(views)),
    )


def measure(
    student: Callable[[np.ndarray], Predictions],
    target: TeacherTokens,
    views: np.ndarray,
    batch: int,
) -> Agreement:
    """The agreement of a student: through its heads for the cosines, with its own class tokens for
    neighbours.
    """
    parts = [student(images) for images in _batches(views, batch)]
    count = len(views)
    token = _joined([part.token for part in parts], count)
    feature = _joined([part.feature for part in parts], count)
    own = _joined([part.features.cls for part in parts], count)
    return Agreement(
        cls=centred_cosine(token, target.cls),
        patch=centred_cosine(
            feature.reshape(-1, feature.shape[-1]), target.patches.reshape(-1, feature.shape[-1])
        ),
        neighbours=neighbour_overlap(own, target.cls, NEIGHBOURS),
    )


def centred_cosine(student: np.ndarray, teacher: np.ndarray) -> float:
    """Mean cosine of [M, D] tokens after the mean of the teacher's is subtracted from both."""
    mean = teacher.mean(axis=0, dtype=np.float64).astype(np.float32)
    student, teacher = student - mean, teacher - mean
    norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    cosines = np.einsum("md,md->m", student, teacher) / np.maximum(norms, np.finfo(np.float32).tiny)
    return float(cosines.mean(dtype=np.float64))


def neighbour_overlap(student: np.ndarray, teacher: np.ndarray, neighbours: int) -> float:
    """Mean share of each view's nearest others by cosine that both models agree on; class tokens
    [M, D].
    """
    neighbours = min(neighbours, len(student) - 1)
    if neighbours < 1:
        return 1.0
    ours, theirs = _nearest(student, neighbours), _nearest(teacher, neighbours)
    shared = [len(np.intersect1d(a, b)) for a, b in zip(ours, theirs, strict=True)]
    return float(np.mean(shared) / neighbours)


def _nearest(tokens: np.ndarray, neighbours: int) -> np.ndarray:
    unit = tokens / np.maximum(
        np.linalg.norm(tokens, axis=1, keepdims=True), np.finfo(np.float32).tiny
    )
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :neighbours]


def _batches(views: np.ndarray, batch: int) -> list[np.ndarray]:
    """Equal batches, so that one compiled function serves all; the last is filled up with its own
    last view.
    """
    padded = np.concatenate([views, np.repeat(views[-1:], -len(views) % batch, axis=0)])
    return np.split(padded, len(padded) // batch)


def _joined(parts: list, count: int) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.float32) for part in parts])[:count]
