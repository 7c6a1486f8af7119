"""How far a student has come toward its teacher, on images it was never trained on, without
labels.

Tokens of one model share a large mean, so that a constant already has a raw cosine of 0.6 to 0.8
to a DINOv2 teacher. Here the teacher's mean token over the held-out views is subtracted from both
sides first.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from proteus_jax.evaluation.cka import linear_cka
from proteus_jax.models.vit import Features

NEIGHBORS = 5


class Agreement(NamedTuple):
    """Centered cosine of class and of patch tokens, -1 to 1; the share of nearest neighbors in
    common and the linear CKA of class tokens, 0 to 1.
    """

    cls: float
    patch: float
    neighbors: float
    cka: float


class TeacherTokens(NamedTuple):
    """The teacher's class [M, D] and patch tokens [M, N, D] of the held-out views, float32 on the
    host.
    """

    cls: np.ndarray
    patches: np.ndarray


class StudentOutputs(NamedTuple):
    """A student's outputs for a batch: its own features, and its answers to the first teacher in
    that teacher's own scale.
    """

    features: Features
    token: jax.Array | np.ndarray
    feature: jax.Array | np.ndarray


class StudentTokens(NamedTuple):
    """A student's tokens of the views in the teacher's space, [M, T] and [M, N, T], and its own
    class tokens [M, D]; float32 on the host.
    """

    token: np.ndarray
    feature: np.ndarray
    own: np.ndarray


def teacher_tokens(
    teacher: Callable[[np.ndarray], Features], views: np.ndarray, batch: int
) -> TeacherTokens:
    """Once a run: views uint8 [M, H, W, 3] through the teacher, `batch` at a time."""
    parts = [teacher(images) for images in _batches(views, batch)]
    return TeacherTokens(
        _joined([part.cls for part in parts], len(views)),
        _joined([part.patches for part in parts], len(views)),
    )


def student_tokens(
    student: Callable[[np.ndarray], StudentOutputs], views: np.ndarray, batch: int
) -> StudentTokens:
    """Views through a student and its heads, `batch` at a time."""
    parts = [student(images) for images in _batches(views, batch)]
    return StudentTokens(
        _joined([part.token for part in parts], len(views)),
        _joined([part.feature for part in parts], len(views)),
        _joined([part.features.cls for part in parts], len(views)),
    )


def measure(student: StudentTokens, target: TeacherTokens) -> Agreement:
    """The agreement of a student: through its heads for the cosines, with its own class tokens for
    neighbors and CKA.
    """
    width = student.feature.shape[-1]
    return Agreement(
        cls=centered_cosine(student.token, target.cls),
        patch=centered_cosine(
            student.feature.reshape(-1, width), target.patches.reshape(-1, width)
        ),
        neighbors=neighbor_overlap(student.own, target.cls, NEIGHBORS),
        cka=linear_cka(student.own, target.cls),
    )


def centered_cosine(student: np.ndarray, teacher: np.ndarray) -> float:
    """Mean cosine of [M, D] tokens after the mean of the teacher's is subtracted from both."""
    mean = teacher.mean(axis=0, dtype=np.float64).astype(np.float32)
    student, teacher = student - mean, teacher - mean
    norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    cosines = np.einsum("md,md->m", student, teacher) / np.maximum(norms, np.finfo(np.float32).tiny)
    return float(cosines.mean(dtype=np.float64))


def neighbor_overlap(student: np.ndarray, teacher: np.ndarray, neighbors: int) -> float:
    """Mean share of each view's nearest others by cosine that both models agree on; class tokens
    [M, D].
    """
    neighbors = min(neighbors, len(student) - 1)
    if neighbors < 1:
        return 1.0
    ours, theirs = nearest(student, neighbors), nearest(teacher, neighbors)
    shared = [len(np.intersect1d(a, b)) for a, b in zip(ours, theirs, strict=True)]
    return float(np.mean(shared) / neighbors)


def nearest(tokens: np.ndarray, neighbors: int) -> np.ndarray:
    """Indices [M, neighbors] of each row's nearest others by cosine, the nearest first."""
    unit = tokens / np.maximum(
        np.linalg.norm(tokens, axis=1, keepdims=True), np.finfo(np.float32).tiny
    )
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :neighbors]


def _batches(views: np.ndarray, batch: int) -> list[np.ndarray]:
    """Equal batches, so that one compiled function serves all; the last is filled up with its own
    last view.
    """
    padded = np.concatenate([views, np.repeat(views[-1:], -len(views) % batch, axis=0)])
    return np.split(padded, len(padded) // batch)


def _joined(parts: list, count: int) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.float32) for part in parts])[:count]
