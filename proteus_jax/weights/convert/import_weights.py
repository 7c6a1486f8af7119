"""A weight file, or a directory of another library, becomes a model directory."""

import json
from pathlib import Path
from typing import Any

from proteus_jax.errors import InputError, refusing
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.normalization import Normalization
from proteus_jax.runtime.filesystem import sha256
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert.detection import Detected, detect_architecture, find_prefix
from proteus_jax.weights.convert.hf_directory import read_directory
from proteus_jax.weights.convert.name_maps import DINOV2
from proteus_jax.weights.convert.readers import Arrays, read_weights
from proteus_jax.weights.model_dir import NO_LICENSE, OPTIONAL, ModelCard, save_model


def read_model(
    source: Path,
    *,
    prefix: str | None = None,
    family: str | None = None,
    heads: int | None = None,
) -> tuple[Detected, dict[str, Any]]:
    """The ViT of a weight file or directory under canonical names, and where it is from.

    With a `prefix` only the names below it belong to the ViT; without one it is found, where there
    is one ViT alone. InputError says what does not fit.
    """
    source = Path(source).expanduser()
    settings: dict[str, Any] = {}
    if source.is_dir():
        settings, weights, files = read_directory(source)
    else:
        weights, files = read_weights(source), (source,)
    digests = {file.name: sha256(file) for file in files}
    (digest, *more) = digests.values()
    facts: dict[str, Any] = {"file": source.name, "sha256": digests if more else digest}
    if weights.precision != "float32":
        facts["stored_as"] = weights.precision
    try:
        before = find_prefix(list(weights.arrays)) if prefix is None else prefix
        arrays = {
            name.removeprefix(before): array
            for name, array in weights.arrays.items()
            if name.startswith(before)
        }
        if not arrays:
            raise InputError(f"no name begins with {before!r}")
        if weights.card:
            detected, facts["license"] = _of_card(weights.card, arrays)
        else:
            with refusing("its arrays are those of no ViT"):
                detected = detect_architecture(
                    arrays, settings, family=family, heads=heads, prefix=before
                )
    except InputError as error:
        raise InputError([f"{source}: {problem}" for problem in error.problems]) from None
    if before:
        facts["prefix"] = before
    if detected.ignored_keys:
        facts["left_out"] = list(detected.ignored_keys)
    return detected, facts


def _of_card(text: str, arrays: Arrays) -> tuple[Detected, str]:
    """The description in a file of this project, and its license."""
    with refusing("its card makes no sense"):
        card = ModelCard.from_json(json.loads(text))
    detected = Detected(card.family, arrays, card.spec, card.normalization, (), DINOV2)
    return detected, card.license


def import_weights(
    file: Path,
    target: Path,
    *,
    heads: int | None = None,
    prefix: str | None = None,
    family: str | None = None,
    normalization: Normalization | None = None,
    license: str = NO_LICENSE,
    source: dict[str, Any] | None = None,
    expected: ViTSpec | None = None,
    replace: bool = False,
) -> ModelCard:
    """Reads weights and writes a model directory; InputError lists all that does not fit.

    A mask token alone may be absent: a teacher does not need it. It becomes zeros, and the card
    says so. What is `expected` must be what is found.
    """
    detected, facts = read_model(file, prefix=prefix, family=family, heads=heads)
    try:
        params = state_dict.to_params(detected.arrays, detected.spec, optional=OPTIONAL)
    except InputError as error:
        raise InputError([f"{file}: {problem}" for problem in error.problems]) from None
    if expected is not None and detected.spec != expected:
        raise InputError(f"{file}: expected {expected}, found {detected.spec}")
    own_license = facts.pop("license", NO_LICENSE)
    card = ModelCard(
        spec=detected.spec,
        family=detected.family,
        normalization=normalization or detected.normalization,
        license=own_license if license == NO_LICENSE else license,
        source=facts
        | ({"left_out": list(detected.ignored_keys)} if detected.ignored_keys else {})
        | (source or {}),
        absent=tuple(name for name in OPTIONAL if name not in detected.arrays),
    )
    save_model(target, params, card, replace=replace)
    return card
