"""Neighbors, ridge and similarity against scikit-learn and numpy."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors
from small import clusters

from proteus_jax.evaluation.cka import effective_rank, linear_cka, spectrum
from proteus_jax.evaluation.classifiers import knn, ridge
from proteus_jax.evaluation.protocols import fine_grained
from proteus_jax.runtime import sharding


def voted(train, labels, test, k: int, temperature: float) -> np.ndarray:
    """DINOv2's vote by scikit-learn's search."""
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(train)
    distance, index = search.kneighbors(test)
    weights = np.exp((1 - distance) / temperature)
    votes = np.stack([(weights * (labels[index] == c)).sum(axis=1) for c in range(4)], axis=1)
    return votes.argmax(axis=1)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_neighbors_are_scikit_learns(
    rng: np.random.Generator, fsdp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces: several chunks on each of eight devices, several rounds of queries."""
    monkeypatch.setattr(knn, "BANK_ROWS", 7)
    monkeypatch.setattr(knn, "QUERIES", 16)
    train, labels = clusters(rng, 205)
    test, _ = clusters(rng, 41)
    # Directions alone count, of what is searched and of what is asked for.
    train, test = (
        rows * rng.uniform(0.2, 9, (len(rows), 1)).astype(np.float32) for rows in (train, test)
    )
    # Few of the nearest count, or nearly all as much.
    for temperature in (0.07, 1.0):
        found = knn.predictions(
            train,
            labels,
            test,
            neighbors=(10, 1, 20, 205, 206),
            temperature=temperature,
            mesh=sharding.make_mesh(fsdp),
        )
        assert sorted(found) == [1, 10, 20, 205]
        for k, predicted in found.items():
            expected = voted(train, labels, test, k, temperature)
            np.testing.assert_array_equal(predicted, expected)


def test_more_neighbors_than_images(rng: np.random.Generator) -> None:
    train, labels = clusters(rng, 5)
    mesh = sharding.make_mesh()
    assert knn.predictions(train, labels, train, neighbors=(6,), temperature=1, mesh=mesh) == {}
    found = knn.predictions(train, labels, train, neighbors=(1, 6), temperature=0.07, mesh=mesh)
    assert list(found) == [1]
    np.testing.assert_array_equal(found[1], labels)


def test_ridge_is_scikit_learns_and_leaves_each_image_out_once(rng: np.random.Generator) -> None:
    features, labels = clusters(rng, 60)
    probe = ridge.fit(features, labels)
    standard = (features.astype(np.float64) - probe.mean) / probe.deviation
    target = np.eye(4)[labels]
    scale = np.linalg.eigvalsh(standard.T @ standard).mean()
    right = {}
    for regularizer in ridge.REGULARIZERS:
        alpha = regularizer * scale
        count = 0
        for out in range(60):
            kept = np.arange(60) != out
            # The mean of all images is the bias, as it is for the whole.
            model = Ridge(alpha=alpha, fit_intercept=False)
            shifted = np.concatenate([standard, np.full((60, 1), 1.0)], axis=1)
            # An unpenalised bias: a column so large that its penalty is nothing.
            shifted[:, -1] *= 1e6
            model.fit(shifted[kept], target[kept])
            count += int(model.predict(shifted[out : out + 1]).argmax() == labels[out])
        right[regularizer] = count
    best = max(ridge.REGULARIZERS[::-1], key=lambda regularizer: right[regularizer])
    assert probe.regularizer == pytest.approx(best)
    whole = Ridge(alpha=best * scale).fit(standard, target)
    np.testing.assert_allclose(probe.weights, whole.coef_.T, atol=1e-8)
    test, _ = clusters(rng, 50)
    expected = whole.predict((test - probe.mean) / probe.deviation).argmax(axis=1)
    np.testing.assert_array_equal(probe(test), expected)


def test_of_regularizers_that_are_as_good_the_largest_is_taken(rng: np.random.Generator) -> None:
    """Two classes far apart: each is right with all of them."""
    labels = np.arange(40) % 2
    features = rng.normal(size=(40, 3)) * 0.1 + np.array([[-5.0], [5.0]])[labels]
    probe = ridge.fit(features, labels)
    assert probe.regularizer == ridge.REGULARIZERS.max() == pytest.approx(100)
    np.testing.assert_array_equal(probe(features), labels)


def test_a_dimension_that_never_changes_says_nothing(rng: np.random.Generator) -> None:
    """In the ridge probe and in the protocol of fine-grained data sets."""
    train, labels = clusters(rng, 60)
    test, wanted = clusters(rng, 30)
    still = [np.concatenate([rows, np.full((len(rows), 1), 3.0)], 1) for rows in (train, test)]
    probe = ridge.fit(still[0], labels)
    assert np.isfinite(probe.weights).all()
    assert np.mean(probe(still[1]) == wanted) > 0.5
    scores = [
        fine_grained._scores(
            fine_grained.Features(one.astype(np.float32), labels),
            fine_grained.Features(other.astype(np.float32), wanted),
            np.array([1.0]),
        )
        for one, other in ((train, test), still)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_a_spectrum_is_of_variances() -> None:
    centered = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    features = centered + np.array([7.0, -2.0])
    np.testing.assert_allclose(spectrum(features), [0.9, 0.1])
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert effective_rank(features) == pytest.approx(np.exp(entropy))
    assert not spectrum(np.ones((4, 2))).any()


def test_alignment_and_rank(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(300, 6)), rng.normal(size=(300, 9))
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0)
    assert linear_cka(x, y) < 0.1
    assert linear_cka(np.ones((5, 2)), x[:5]) == 0.0
    # By the definition on Gram matrices.
    centering = np.eye(300) - 1 / 300
    k, n = (centering @ (each @ each.T) @ centering for each in (x, y))
    hsic = np.sum(k * n) / np.sqrt(np.sum(k * k) * np.sum(n * n))
    assert linear_cka(x, y) == pytest.approx(hsic)
    assert effective_rank(np.outer(np.arange(9.0), np.ones(4))) == pytest.approx(1.0)
    assert effective_rank(np.concatenate([np.eye(5), -np.eye(5)])) == pytest.approx(5.0)
    assert spectrum(x).sum() == pytest.approx(1.0)
