"""Teachers of other statistics, sizes, grids and scales, several at once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from proteus_jax.methods.feature_standardization import (
    batch_moments,
    ema_update,
    init_moments,
    standardize,
    unstandardize,
)
from proteus_jax.methods.losses import LossWeights
from proteus_jax.methods.proteus import Proteus
from proteus_jax.methods.resample import renormalize, resize_images, resize_patch_grid
from proteus_jax.methods.teacher import Teacher
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.models.normalization import CLIP, HALF, IMAGENET, Normalization
from proteus_jax.models.vit import Features
from proteus_jax.training.optimizer import adamw
from proteus_jax.training.train_state import TrainState, init_state
from proteus_jax.training.train_step import TrainStep

BATCH, CROP = 8, 56
SMALL = ViTSpec(width=16, depth=1, heads=2, grid=4)


# A finer grid, registers, other statistics and a wider stream.
OTHER = ViTSpec(width=40, depth=1, heads=2, patch_size=7, grid=8, registers=3)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (BATCH, CROP, CROP, 3), dtype=np.uint8)


def trained(
    teachers: dict[str, Teacher],
    images: np.ndarray,
    steps: int = 1,
    skipped: int = 0,
    **changes: Any,
) -> tuple[TrainState, list[dict], dict]:
    """After some steps on the same images: state, rows of metrics, the teachers' parameters.
    `skipped` steps without an update come first.
    """
    widths = {name: teacher.backbone.spec.width for name, teacher in teachers.items()}
    students = {"small": StudentFunction(changes.pop("spec", SMALL), widths)}
    optimizer = adamw(1e-3)
    normalization = next(iter(teachers.values())).normalization
    weights = {name: LossWeights() for name in teachers} | changes.pop("weights", {})
    step = TrainStep(
        method=Proteus(loss_weights=weights, mask_ratio=0.5),
        teachers=teachers, students=students, optimizer=optimizer,
        schedule=lambda updates: 1e-3 / (1 + updates),
        normalization=normalization, ema_decay=0.0, seed=3, **changes,
    )  # fmt: skip
    params = {
        name: teacher.backbone.init(jax.random.key(number))
        for number, (name, teacher) in enumerate(teachers.items(), 1)
    }
    scaled = {name: widths[name] for name, each in teachers.items() if each.standardize}
    state = init_state(students, optimizer, ema=False, seed=3, standardize=scaled)
    state = state._replace(
        step=jnp.int32(skipped), skipped=state.skipped._replace(total=jnp.int32(skipped))
    )
    compiled, rows = jax.jit(step), []
    for _ in range(steps):
        state, metrics = compiled(state, params, images)
        rows.append(jax.device_get(metrics))
    return state, rows, params


def test_what_is_there_already_is_not_touched() -> None:
    """Equal sizes, statistics and grids give back the very same arrays."""
    pixels, tokens = jnp.ones((1, 56, 56, 3)), jnp.ones((1, 16, 5))
    features = Features(tokens[:, 0], tokens, tokens[:, :0])
    assert resize_images(pixels, 56) is pixels
    assert renormalize(pixels, IMAGENET, Normalization(*IMAGENET)) is pixels
    assert resize_patch_grid(features, 4) is features


def test_the_plain_path_is_bit_for_bit_the_same(images: np.ndarray) -> None:
    backbone = BackboneFunction(TINY)
    plain, rows, _ = trained({"teacher": Teacher(backbone, IMAGENET)}, images, steps=2)
    stated = Teacher(backbone, IMAGENET, side=CROP)
    again, same, _ = trained({"teacher": stated}, images, steps=2)
    assert rows == same
    jax.tree.map(np.testing.assert_array_equal, plain, again)


def test_other_statistics() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    moved = renormalize(IMAGENET(jnp.asarray(pixels)), IMAGENET, CLIP)
    np.testing.assert_allclose(moved, CLIP(jnp.asarray(pixels)), atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (7, 5)])
def test_grids_are_resampled_as_pytorch_resizes(old: int, new: int) -> None:
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    tokens = np.random.default_rng(0).normal(size=(2, old * old, 6)).astype(np.float32)
    features = Features(jnp.zeros((2, 6)), jnp.asarray(tokens), jnp.zeros((2, 3, 6)))
    found = resize_patch_grid(features, new)
    grid = torch.from_numpy(tokens.reshape(2, old, old, 6).transpose(0, 3, 1, 2))
    expected = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    expected = expected.numpy().transpose(0, 2, 3, 1).reshape(2, new * new, 6)
    np.testing.assert_allclose(found.patches, expected, atol=1e-5)
    assert found.registers is features.registers


def test_grids_are_resampled_antialiased() -> None:
    """Columns that take turns fade where three become one; a step between two halves stays."""
    taken = np.tile([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0], (9, 1))
    halves = np.repeat([[0.0] * 9, [1.0] * 9], [4, 5], axis=0)
    tokens = np.stack([taken, halves], axis=-1).reshape(1, 81, 2).astype(np.float32)
    features = Features(jnp.zeros((1, 2)), jnp.asarray(tokens), jnp.zeros((1, 0, 2)))
    found = np.asarray(resize_patch_grid(features, 3).patches).reshape(3, 3, 2)
    assert np.abs(found[..., 0]).max() < 0.2
    np.testing.assert_allclose(found[..., 1], found[:, :1, 1].repeat(3, axis=1), atol=1e-5)
    assert found[0, 0, 1] < 0.1
    assert found[2, 0, 1] > 0.9


def test_a_finer_grid_with_registers_teaches_a_coarser_one(images: np.ndarray) -> None:
    """The losses of the first step against the same written out by hand."""
    teacher = Teacher(BackboneFunction(OTHER), CLIP)
    weights = {"teacher": LossWeights(1.0, 1.0, 0.0)}
    _, (row,), params = trained({"teacher": teacher}, images, weights=weights)
    student = StudentFunction(SMALL, {"teacher": OTHER.width})
    values = student.init(jax.random.key(3))
    said = student(values, CLIP(jnp.asarray(images))).by_teacher["teacher"]
    target = teacher.backbone(params["teacher"], CLIP(jnp.asarray(images)))
    assert target.patches.shape == (BATCH, 64, OTHER.width)
    target = resize_patch_grid(target, 4)
    assert row["small/token_loss"] == pytest.approx(
        float(jnp.mean((said.token - target.cls) ** 2)), rel=1e-5
    )
    errors = jnp.concatenate(
        [(said.token - target.cls)[:, None] ** 2, (said.feature - target.patches) ** 2], axis=1
    )
    assert row["small/feature_loss"] == pytest.approx(float(jnp.mean(errors)), rel=1e-5)


def test_a_teacher_of_larger_images(images: np.ndarray) -> None:
    """The batch is as large as the teacher wants; the student's images are made of it."""
    large = np.random.default_rng(1).integers(0, 256, (BATCH, 84, 84, 3), dtype=np.uint8)
    backbone = BackboneFunction(dataclasses.replace(TINY, grid=6))
    teacher = Teacher(backbone, IMAGENET, side=84)
    _, (row,), params = trained({"teacher": teacher}, large)
    pixels = IMAGENET(jnp.asarray(large))
    target = backbone(params["teacher"], pixels)
    student = StudentFunction(SMALL, {"teacher": TINY.width})
    said = student(student.init(jax.random.key(3)), resize_images(pixels, CROP)).by_teacher[
        "teacher"
    ]
    expected = float(jnp.mean((said.token - target.cls) ** 2))
    assert row["small/token_loss"] == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(row["small/patch_loss"])


def test_several_teachers(images: np.ndarray) -> None:
    """Each has its heads and factors; the first learns as it does alone."""
    first = Teacher(BackboneFunction(TINY), IMAGENET)
    second = Teacher(BackboneFunction(OTHER), HALF)
    weights = {"other": LossWeights(2.0, 0.5, 0.0)}
    _, (alone,), _ = trained({"teacher": first}, images)
    state, (row,), _ = trained({"teacher": first, "other": second}, images, weights=weights)
    for key in ("token_loss", "feature_loss", "patch_loss"):
        assert row[f"small/{key}"] == pytest.approx(alone[f"small/{key}"], rel=1e-6)
    assert row["small/other_patch_loss"] == 0
    total = sum(row[f"small/{key}_loss"] for key in ("token", "feature", "patch"))
    total += 2 * row["small/other_token_loss"] + 0.5 * row["small/other_feature_loss"]
    assert row["small/loss"] == pytest.approx(total, rel=1e-5)
    assert set(state.params["small"]["heads"]) == {"teacher", "other"}


def test_standardized_tokens(images: np.ndarray) -> None:
    """Mean 0 and deviation 1 by the batch's own moments first, then by the running ones."""
    rng = np.random.default_rng(0)
    cls = jnp.asarray(rng.normal(5, 3, (64, 6)).astype(np.float32))
    patches = jnp.asarray(rng.normal(-2, 0.1, (64, 9, 6)).astype(np.float32))
    features = Features(cls, patches, cls[:, None][:, :0])
    moments = batch_moments(features)
    found = standardize(features, moments)
    for tokens in (found.cls, found.patches.reshape(-1, 6)):
        np.testing.assert_allclose(tokens.mean(axis=0), 0, atol=1e-3)
        np.testing.assert_allclose(tokens.std(axis=0), 1, atol=1e-2)
    back = unstandardize(found, moments)
    np.testing.assert_allclose(back.cls, cls, atol=1e-4)
    np.testing.assert_allclose(back.patches, patches, atol=1e-4)
    running = init_moments(6)
    for step in range(3):
        running = ema_update(jnp.asarray(step), running, batch_moments(features))
    np.testing.assert_allclose(running.cls, moments.cls, rtol=1e-5)

    scaled = Teacher(BackboneFunction(TINY), IMAGENET, standardize=True)
    state, rows, params = trained({"teacher": scaled}, images, steps=2)
    seen = tiny_features(params["teacher"], images)
    np.testing.assert_allclose(
        state.statistics["teacher"].cls, batch_moments(seen).cls, rtol=1e-4, atol=1e-5
    )
    # A student that says nothing of note is off by the targets' variance, 1, and its own.
    assert 0.9 < rows[0]["small/token_loss"] < 4
    # Steps without an update have left no moments, and no trace in the learning rate.
    later, (row,), _ = trained({"teacher": scaled}, images, skipped=3)
    np.testing.assert_allclose(later.statistics["teacher"].cls, batch_moments(seen).cls, rtol=1e-4)
    assert row["learning_rate"] == np.float32(1e-3)
    assert 0.9 < row["small/token_loss"] < 4


def tiny_features(params: Any, images: np.ndarray) -> Features:
    return jax.jit(BackboneFunction(TINY))(params, IMAGENET(jnp.asarray(images)))
