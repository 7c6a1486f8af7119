"""results.json: what was measured, of what, with which constants."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import proteus_jax
from proteus_jax.errors import InputError
from proteus_jax.feature_extractor import Model
from proteus_jax.models.functional import Params
from proteus_jax.runtime.filesystem import write_atomically

FILE = "results.json"


def weights_digest(params: Params) -> str:
    """Returns a digest of weights that does not depend on where they lie."""
    digest = hashlib.sha256()
    for path, array in sorted(
        (jax.tree_util.keystr(path), array)
        for path, array in jax.tree_util.tree_leaves_with_path(params)
    ):
        digest.update(path.encode() + np.ascontiguousarray(np.asarray(array)).tobytes())
    return digest.hexdigest()


def describe(name: str, model: Model) -> dict[str, Any]:
    """Describes a model, with the digest of its weights."""
    return {
        "name": name,
        "weights_sha256": weights_digest(model.params),
        "spec": dataclasses.asdict(model.spec),
        "source": model.card.source,
    }


def write_results(workdir: Path, results: Mapping[str, Any]) -> None:
    """Writes results.json, whole or not at all."""
    text = json.dumps(
        {"proteus_jax": proteus_jax.__version__, **results}, indent=2, allow_nan=False
    )
    write_atomically(workdir / FILE, text + "\n")


def read_results(workdir: Path) -> dict[str, Any]:
    """The results in a workdir; InputError where there are none."""
    path = workdir / FILE
    if not path.is_file():
        raise InputError(f"{workdir}: no {FILE} in it")
    try:
        results = json.loads(path.read_text())
        if not isinstance(results["protocol"], str):
            raise TypeError("protocol")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the results of an evaluation: {error!r}") from None
    return results
