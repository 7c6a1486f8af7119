"""Probes of class tokens while a student trains: neighbours and a ridge probe on images with
classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from proteus_jax.data.datasets.labeled import LabeledDataset, TrainTestSplit
from proteus_jax.evaluation import per_class
from proteus_jax.evaluation.classifiers import knn, ridge
from proteus_jax.evaluation.feature_extraction import FeatureTable

NEIGHBOURS, TEMPERATURE = 20, 0.07


class Scores(NamedTuple):
    """Percent right on the test images, and its mean over classes."""

    knn: float
    ridge: float
    knn_balanced: float
    ridge_balanced: float


def scores(
    pair: TrainTestSplit, tokens: Callable[[LabeledDataset], FeatureTable], mesh: Mesh
) -> Scores:
    """Scores class tokens by one pass over each part: by NEIGHBOURS, or as many as there are images
    to learn from, and by the ridge probe.
    """
    rows, labels = [], []
    for part in (pair.train, pair.test):
        features = tokens(part)
        rows.append(features.values)
        labels.append(part.labels[features.numbers])
    neighbours = min(NEIGHBOURS, len(rows[0]))
    voted = knn.predictions(
        rows[0],
        labels[0],
        rows[1],
        neighbours=(neighbours,),
        temperature=TEMPERATURE,
        mesh=mesh,
    )
    predicted = voted[neighbours], ridge.fit(rows[0], labels[0])(rows[1])
    right = [each == labels[1] for each in predicted]
    return Scores(
        *(100 * float(np.mean(each)) for each in right),
        *(per_class.balanced(each, labels[1]) for each in right),
    )
