import jax.numpy as jnp
import numpy as np
import pytest

from proteus_jax.evaluation.reporting.figures import CELL, GAP, HEADING, agreement_picture
from proteus_jax.evaluation.teacher_agreement import (
    NEIGHBORS,
    Agreement,
    StudentOutputs,
    StudentTokens,
    TeacherTokens,
    centered_cosine,
    measure,
    neighbor_overlap,
    student_tokens,
    teacher_tokens,
)
from proteus_jax.models.vit import Features


def test_a_constant_student_agrees_in_nothing(rng: np.random.Generator) -> None:
    """The reason for centering: by the raw cosine a constant looks good."""
    teacher = rng.normal(size=(500, 64)).astype(np.float32) + 2.0
    constant = np.broadcast_to(teacher.mean(axis=0) + 0.01, teacher.shape)
    raw = np.sum(teacher * constant, axis=1)
    raw /= np.linalg.norm(teacher, axis=1) * np.linalg.norm(constant, axis=1)
    assert raw.mean() > 0.8
    assert abs(centered_cosine(constant, teacher)) < 0.01
    assert centered_cosine(teacher, teacher) == pytest.approx(1.0)
    # Scale is forgiven, direction is not.
    mean = teacher.mean(axis=0)
    assert centered_cosine(mean + 3 * (teacher - mean), teacher) == pytest.approx(1.0, abs=1e-4)
    assert centered_cosine(mean - (teacher - mean), teacher) == pytest.approx(-1.0, abs=1e-4)


def test_a_student_at_the_mean_itself_is_no_division_by_zero() -> None:
    teacher = np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)
    assert centered_cosine(np.zeros((2, 2), np.float32), teacher) == 0.0


def test_neighbors_written_out(rng: np.random.Generator) -> None:
    ours, theirs = rng.normal(size=(2, 30, 8)).astype(np.float32)

    def nearest(tokens: np.ndarray, row: int) -> set[int]:
        cosine = tokens @ tokens[row] / np.linalg.norm(tokens, axis=1)
        return set(np.argsort(-cosine)[:6]) - {row}

    expected = np.mean([len(nearest(ours, i) & nearest(theirs, i)) / 5 for i in range(30)])
    assert neighbor_overlap(ours, theirs, 5) == pytest.approx(expected)
    assert neighbor_overlap(theirs, 3 * theirs, 5) == 1.0
    assert neighbor_overlap(ours[:3], theirs[:3], 5) == 1.0


def test_what_is_measured_of_which_tokens(rng: np.random.Generator) -> None:
    """Cosines through the heads; neighbors and CKA of the student's own class tokens, which have a
    width of their own.
    """
    token, feature, own = (
        rng.normal(size=shape).astype(np.float32) for shape in ((24, 6), (24, 3, 6), (24, 4))
    )
    target = TeacherTokens(token + rng.normal(size=(24, 6)).astype(np.float32), feature[::-1])
    found = measure(StudentTokens(token, feature, own), target)

    def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
        ours, theirs = (
            each.reshape(-1, 6) - theirs.reshape(-1, 6).mean(0) for each in (ours, theirs)
        )
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        return float(np.mean((ours * theirs).sum(axis=1) / lengths))

    centering = np.eye(24) - 1 / 24
    k, n = (centering @ (each @ each.T) @ centering for each in (own, target.cls))
    assert found.cls == pytest.approx(cosine(token, target.cls), abs=1e-6)
    assert found.patch == pytest.approx(cosine(feature, target.patches), abs=1e-6)
    assert found.cka == pytest.approx(
        np.sum(k * n) / np.sqrt(np.sum(k * k) * np.sum(n * n)), abs=1e-6
    )
    shared = []
    for row in range(24):
        nearest = []
        for tokens in (own, target.cls):
            similarity = tokens @ tokens[row] / np.linalg.norm(tokens, axis=1)
            similarity[row] = -np.inf
            nearest.append(set(np.argsort(-similarity)[:NEIGHBORS].tolist()))
        shared.append(len(nearest[0] & nearest[1]) / NEIGHBORS)
    assert found.neighbors == pytest.approx(np.mean(shared))


def test_each_batch_gives_what_it_is_asked_for(rng: np.random.Generator) -> None:
    """Answers of both heads, and the student's own class token, which are three things."""
    views = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)

    def student(images: np.ndarray) -> StudentOutputs:
        bright = jnp.asarray(images[:, 0, 0, :1], jnp.float32)
        features = Features(bright + 1, bright[:, None] + 2, jnp.zeros((len(bright), 0, 1)))
        return StudentOutputs(features, bright + 3, bright[:, None] + 4)

    found = student_tokens(student, views, 2)
    bright = views[:, 0, 0, :1].astype(np.float32)
    np.testing.assert_array_equal(found.token, bright + 3)
    np.testing.assert_array_equal(found.feature, bright[:, None] + 4)
    np.testing.assert_array_equal(found.own, bright + 1)


def test_the_last_batch_counts_once(rng: np.random.Generator) -> None:
    """Ten views in batches of four equal ten in one, and batches have one size."""
    views = rng.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    weights = rng.normal(size=(3, 6)).astype(np.float32)
    sizes = set()

    def tokens(images: np.ndarray, shift: float) -> tuple[np.ndarray, np.ndarray]:
        sizes.add(len(images))
        values = np.sin(images.reshape(len(images), 16, 3) @ weights + shift).astype(np.float32)
        return values[:, 0], values

    def teacher(images: np.ndarray) -> Features:
        cls, patches = tokens(images, 0.0)
        return Features(jnp.asarray(cls), jnp.asarray(patches), jnp.zeros((len(cls), 0, 6)))

    def student(images: np.ndarray) -> StudentOutputs:
        cls, patches = tokens(images, 0.3)
        features = Features(jnp.asarray(cls), jnp.asarray(patches), jnp.zeros((len(cls), 0, 6)))
        return StudentOutputs(features, cls, patches)

    found: list[Agreement] = []
    for batch in (4, 10):
        target = teacher_tokens(teacher, views, batch)
        assert isinstance(target, TeacherTokens)
        assert target.patches.shape == (10, 16, 6)
        found.append(measure(student_tokens(student, views, batch), target))
    assert found[0] == pytest.approx(found[1])
    assert sizes == {4, 10}
    assert 0.5 < found[0].cls < 1
    assert 0.5 < found[0].cka < 1


def test_the_picture_has_the_teachers_colors(rng: np.random.Generator) -> None:
    """A student that equals its teacher looks like it; one at the teacher's mean has no color."""
    views = rng.integers(0, 256, (3, 28, 56, 3), dtype=np.uint8)
    teacher = rng.normal(size=(3, 8, 16)).astype(np.float32)
    mean = np.broadcast_to(teacher.mean(axis=(0, 1)), teacher.shape)
    sheet = np.asarray(agreement_picture(views, teacher, [("same", teacher), ("mean", mean)]))
    columns = [
        sheet[HEADING:, start : start + 2 * CELL]
        for start in range(0, sheet.shape[1], 2 * CELL + GAP)
    ]
    assert len(columns) == 4
    np.testing.assert_array_equal(columns[1], columns[2])
    assert columns[1].std() > 40
    assert columns[3][:CELL].std(axis=(0, 1)).max() < 1
