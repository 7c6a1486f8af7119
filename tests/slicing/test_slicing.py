"""Slices of models: exact where nothing is left out, better than a guess where something is, and
refused where they do not fit.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shuffled
from sklearn.linear_model import Ridge

from proteus_jax.models.config import CLIP, ViTSpec
from proteus_jax.models.functional import BackboneFunction, without_layer_scale
from proteus_jax.models.normalization import IMAGENET
from proteus_jax.runtime import sharding
from proteus_jax.slicing.basis import principal_basis, zero_mean_basis
from proteus_jax.slicing.fit import taken_blocks
from proteus_jax.slicing.folding import without_key_bias
from proteus_jax.slicing.least_squares import (
    RIDGES,
    Sums,
    add_rows,
    no_sums,
    solve,
    solve_validated,
    squared_error,
)
from proteus_jax.slicing.outer import scaled
from proteus_jax.slicing.selection import choose_groups
from proteus_jax.slicing.sizes import sliced_spec
from proteus_jax.slicing.slicer import Slicer
from proteus_jax.slicing.source import SourceModel

SOURCE = ViTSpec(width=48, depth=3, heads=6, grid=3, patch_size=8)
FAMILIES: dict[str, dict[str, Any]] = {
    "dinov2": {},
    "giant": {"feed_forward": "swiglu", "registers": 3, "layer_scale": False},
    "clip": CLIP,
    "dinov3": {"positions": "rotary", "registers": 2, "key_bias": False, "norm_epsilon": 1e-5},
    "siglip": {"class_token": False, "pooling": "attention", "activation": "gelu_tanh"},
    "mean": {"pooling": "mean", "final_norm": "class", "class_position": False},
}


def sums_of(x: np.ndarray, y: np.ndarray, chosen: np.ndarray | None = None) -> Sums:
    zero = no_sums(x.shape[1], y.shape[1])
    picked = None if chosen is None else jnp.asarray(chosen)
    return add_rows(zero, jnp.asarray(x), jnp.asarray(y), picked)


def slicer_of(spec: ViTSpec) -> tuple[Slicer, np.ndarray]:
    """A slicer of a random model, and its images."""
    flat = dataclasses.replace(spec, layer_scale=False)
    params = shuffled(BackboneFunction(spec).init(jax.random.key(0)))
    params = without_layer_scale(jax.device_get(params))
    side = spec.grid * spec.patch_size
    rng = np.random.default_rng(3)
    # Images as they are: neighbors alike, some bright and some dark.
    coarse = rng.normal(size=(5, 16, 6, 6, 3)).repeat(side // 6, 2).repeat(side // 6, 3)
    images = (128 + 50 * coarse + 5 * rng.normal(size=coarse.shape)).clip(0, 255).astype(np.uint8)
    function = BackboneFunction(flat)
    source = SourceModel(params, function, jnp.asarray(images), IMAGENET, sharding.make_mesh())
    return Slicer(source), images[0]


def features(spec: ViTSpec, params: Any, images: np.ndarray) -> Any:
    params = jax.tree.map(jnp.asarray, params)
    return BackboneFunction(spec)(params, IMAGENET(jnp.asarray(images)))


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_every_family(family: str) -> None:
    """One of the same size is the model turned: all products of tokens with each other are as
    before. A smaller one keeps most, and its stream may have any scale.
    """
    spec = dataclasses.replace(SOURCE, **FAMILIES[family])
    slicer, images = slicer_of(spec)
    same = slicer.slice(spec)
    # Not zero: the ridge of a thousandth shrinks directions of little variance, block by block.
    assert same.errors[-1].missed < 2e-3
    assert abs(same.errors[-1].lost) < 1e-5
    params, flat = slicer.source.params, slicer.source.spec
    plain = {**params, "norm": {"scale": np.ones(48), "bias": np.zeros(48)}}
    ours, theirs = features(spec, same.params, images), features(flat, plain, images)
    if spec.pooling == "attention":
        # It reads the last norm's tokens, and is turned on its own.
        theirs = theirs._replace(cls=features(flat, params, images).cls)
    for own, target in zip(ours[:2], theirs[:2], strict=True):
        rows, wanted = (np.asarray(each).reshape(-1, 48) for each in (own, target))
        wanted = wanted - wanted.mean(axis=1, keepdims=True)
        products, expected = rows @ rows.T, wanted @ wanted.T
        # Two in a thousand of the energy are up to 2 * sqrt(0.002) of a product.
        assert np.abs(products - expected).max() < 0.1 * np.abs(expected).max()
    student = sliced_spec(spec, 24, width=32, depth=2)
    made = slicer.slice(student)
    shapes = jax.tree.map(lambda array: array.shape, BackboneFunction(student).shapes)
    assert jax.tree.map(lambda array: array.shape, made.params) == shapes
    assert all(0 <= error.lost <= error.missed < 0.7 for error in made.errors)
    assert len(made.errors) == 2
    larger = features(student, scaled(made.params, 8.0), images)
    for own, other in zip(features(student, made.params, images), larger, strict=True):
        factor = 8.0 if spec.final_norm == "class" and own.ndim == 3 and own.shape[1] else 1.0
        np.testing.assert_allclose(own * factor, other, rtol=2e-3, atol=2e-3 * factor)


def test_a_slice_is_the_same_each_time() -> None:
    student = sliced_spec(SOURCE, 24, width=32, depth=2)
    first, again = (slicer_of(SOURCE)[0].slice(student) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.errors == again.errors


def test_which_blocks_are_taken() -> None:
    assert taken_blocks(12, 12) == list(range(12))
    assert taken_blocks(12, 6) == [1, 3, 5, 7, 9, 11]
    assert taken_blocks(40, 24)[-1] == 39
    assert taken_blocks(7, 3) == [1, 4, 6]


def test_sizes() -> None:
    spec = ViTSpec(width=384, depth=12, heads=6, grid=37)
    tiny = sliced_spec(spec, 224, name="vit_tiny")
    assert (tiny.width, tiny.heads, tiny.hidden, tiny.depth, tiny.grid) == (192, 3, 768, 12, 16)
    assert tiny.inner == 0
    assert sliced_spec(spec, 224, heads=4).width == 256
    assert sliced_spec(spec, 224, width=128).heads == 2
    assert sliced_spec(spec, 224, width=128, hidden=300).hidden == 300
    assert sliced_spec(spec, 224, depth=7) == dataclasses.replace(spec, depth=7, grid=16)
    giant = ViTSpec(width=1536, depth=40, heads=24, feed_forward="swiglu")
    large = sliced_spec(giant, 224, name="vit_large")
    assert (large.width, large.depth, large.hidden) == (1024, 24, 2736)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"name": "vit_base"}, "vit_base: width: expected from 1 to the 384"),
        ({"width": 100}, "width 100 with 1 heads: expected heads of 64 channels"),
        ({"heads": 7}, "heads: expected from 1 to the 6"),
        ({"depth": 13}, "depth: expected from 1 to the 12"),
        ({"width": 192, "hidden": 4000}, "hidden: expected from 1 to the 1536"),
        ({"name": "vit_x"}, "no student has that name"),
    ]
    for wrong, words in refused:
        with pytest.raises(ValueError, match=words):
            sliced_spec(spec, 224, **wrong)
    with pytest.raises(ValueError, match="do not divide images of 100 px"):
        sliced_spec(spec, 100, name="vit_tiny")


def test_ridge_is_scikit_learns(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(200, 7)).astype(np.float32), rng.normal(size=(200, 3))
    x += 2.0
    y = (x @ rng.normal(size=(7, 3)) + 0.1 * y).astype(np.float32)
    sums = sums_of(x[::2], y[::2])
    sums = add_rows(sums, jnp.asarray(x[1::2]), jnp.asarray(y[1::2]))
    found = solve(sums, 0.1)
    alpha = 0.1 * np.trace(np.cov(x.T, bias=True)) / 7 * 200
    expected = Ridge(alpha).fit(x, y)
    np.testing.assert_allclose(found.kernel, expected.coef_.T, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.bias, expected.intercept_, rtol=1e-3, atol=1e-3)
    error = np.mean(np.sum((x @ found.kernel + found.bias - y) ** 2, axis=1))
    assert squared_error(found, sums) == pytest.approx(error, rel=1e-3)
    chosen = rng.random(200) < 0.5
    some, alone = sums_of(x, y, chosen), sums_of(x[chosen], y[chosen])
    for part, other in zip(some, alone, strict=True):
        np.testing.assert_allclose(part, other, rtol=1e-5, atol=1e-3)


def test_the_penalty_is_the_one_that_does_best_on_what_was_held_out(
    rng: np.random.Generator,
) -> None:
    """Of twelve noisy rows of ten inputs a large one, of clear ones the smallest."""
    x, kernel = rng.normal(size=(60, 10)).astype(np.float32), 0.1 * rng.normal(size=(10, 2))
    noise = rng.normal(size=(60, 2))
    some, others = slice(12), slice(12, 60)

    def alpha(ridge: float, rows: np.ndarray) -> float:
        return ridge * np.trace(np.cov(rows.T, bias=True)) / 10 * len(rows)

    best = []
    for scale in (1.0, 0.0):
        y = (x @ kernel + scale * noise).astype(np.float32)
        errors = [
            np.mean(
                (Ridge(alpha(r, x[some])).fit(x[some], y[some]).predict(x[others]) - y[others]) ** 2
            )
            for r in RIDGES
        ]
        best.append(RIDGES[int(np.argmin(errors))])
        found = solve_validated(sums_of(x[some], y[some]), sums_of(x[others], y[others]))
        expected = Ridge(alpha(best[-1], x)).fit(x, y)
        np.testing.assert_allclose(found.kernel, expected.coef_.T, rtol=1e-2, atol=1e-4)
    assert best[0] >= 0.1
    assert best[1] == RIDGES[0]


def test_a_bias_that_keys_do_not_have_is_their_norms(rng: np.random.Generator) -> None:
    norm = {"scale": np.ones(6, np.float32), "bias": np.zeros(6, np.float32)}
    kernel = rng.normal(size=(6, 18)).astype(np.float32)
    qkv = {"kernel": kernel, "bias": rng.normal(size=18).astype(np.float32)}
    moved, made = without_key_bias(norm, qkv)
    assert not made["bias"][6:12].any()
    rows = rng.normal(size=(5, 6)).astype(np.float32)
    found = (rows + moved["bias"]) @ made["kernel"] + made["bias"]
    np.testing.assert_allclose(found, rows @ kernel + qkv["bias"], rtol=1e-3, atol=1e-3)


def test_the_basis_keeps_the_largest_directions(rng: np.random.Generator) -> None:
    basis = zero_mean_basis(6)
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(basis.sum(axis=0), 0, atol=1e-12)
    rows = rng.normal(size=(500, 8)) * np.arange(1, 9)
    rows -= rows.mean(axis=1, keepdims=True)
    found = principal_basis(rows.T @ rows, 4)
    kept = rows @ found
    singular = np.linalg.svd(rows, compute_uv=False)
    assert np.sum(kept**2) == pytest.approx(np.sum(singular[:3] ** 2), rel=1e-5)
    np.testing.assert_allclose(kept.sum(axis=1), 0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_what_explains_most_is_chosen(rng: np.random.Generator, size: int) -> None:
    """Copies are not taken beside what they copy; the best pair of few is found by trying all."""
    groups = 5
    values = rng.normal(size=(400, groups * size)) * np.repeat([3, 1, 2, 0.5, 0.1], size)
    outputs = rng.normal(size=(groups * size, 6))
    values[:, -size:] = values[:, :size]
    covariance = np.cov(values.T, bias=True)
    found = choose_groups(covariance, outputs, size, 2)

    def explained(chosen: tuple[int, int]) -> float:
        columns = np.concatenate([np.arange(size) + group * size for group in chosen])
        target = (values - values.mean(axis=0)) @ outputs
        inputs = values[:, columns] - values[:, columns].mean(axis=0)
        fit = np.linalg.lstsq(inputs, target, rcond=None)[0]
        return -float(np.sum((target - inputs @ fit) ** 2))

    pairs = [(a, b) for a in range(groups) for b in range(a)]
    best = max(pairs, key=explained)
    assert explained(tuple(found)) == pytest.approx(explained(best), rel=1e-6)
    assert set(choose_groups(covariance, outputs, size, 5)) == set(range(5))
