"""Logistic regression against scikit-learn's."""

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from small import clusters

from proteus_jax.evaluation.classifiers import logistic_regression

DECAYS = np.logspace(-4, 4, 12)


def standardized(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    features, labels = clusters(rng, count)
    return (features - features.mean(axis=0)) / features.std(axis=0), labels


def value(weights, biases, features, labels, decay: float) -> float:
    """scikit-learn's objective over the number of images, in numpy."""
    scores = features.astype(np.float64) @ weights + biases
    scores -= scores.max(axis=1, keepdims=True)
    entropy = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(labels)), labels]
    return entropy.mean() + 0.5 * decay / len(labels) * np.sum(weights**2)


@pytest.fixture(scope="module")
def reference():
    """scikit-learn's solution for each decay."""
    rng = np.random.default_rng(0)
    features, labels = standardized(rng, 300)
    test, _ = standardized(rng, 400)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for decay in DECAYS:
            model = LogisticRegression(C=1 / decay, tol=1e-12, max_iter=10000)
            found.append(model.fit(features.astype(np.float64), labels))
    return features, labels, test, found


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-6), ("float32", 1e-5)])
def test_every_fit_is_scikit_learns(reference, dtype: str, close: float) -> None:
    features, labels, test, models = reference
    found = logistic_regression.fit(features, labels, DECAYS, dtype=np.dtype(dtype))
    assert found.weights.dtype == dtype
    for number, (decay, model) in enumerate(zip(DECAYS, models, strict=True)):
        ours = value(found.weights[number], found.biases[number], features, labels, decay)
        theirs = value(model.coef_.T, model.intercept_, features, labels, decay)
        assert ours == pytest.approx(theirs, rel=close), decay
        predicted = found.scores(test)[number].argmax(axis=1)
        assert np.mean(predicted == model.predict(test)) >= 0.999, decay


def test_several_labels_at_once_are_classifiers_of_their_own(rng: np.random.Generator) -> None:
    features, classes = standardized(rng, 200)
    targets = np.eye(4)[classes]
    targets[:, 0] = np.maximum(targets[:, 0], targets[:, 1])
    found = logistic_regression.fit(features, targets, np.array([2.0]))
    for column in range(4):
        model = LogisticRegression(C=0.5, tol=1e-12, max_iter=10000)
        model.fit(features.astype(np.float64), targets[:, column])
        np.testing.assert_allclose(found.weights[0, :, column], model.coef_[0], atol=1e-4)
    assert found.slope.max() <= 1e-7
