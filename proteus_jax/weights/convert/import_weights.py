"""A weight file, or a directory of another library, becomes a model directory."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from proteus_jax.errors import InputError, refusing
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.normalization import Normalization
from proteus_jax.runtime.filesystem import sha256
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert.detection import Detected, detect_architecture
from proteus_jax.weights.convert.hf_directory import read_directory
from proteus_jax.weights.convert.name_maps import DINOV2
from proteus_jax.weights.convert.readers import Arrays, Weights, read_weights
from proteus_jax.weights.convert.selection import Choice, choose
from proteus_jax.weights.model_dir import NO_LICENSE, OPTIONAL, ModelCard, save_model


def read_model(
    source: Path,
    *,
    prefix: str | None = None,
    key: str | None = None,
    family: str | None = None,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[Detected, dict[str, Any]]:
    """The ViT of a weight file or directory under canonical names, and where it is from.

    It is found by itself where there is one alone; where there are several, a `prefix` of its
    names or a `key` on the way to it chooses. `grid` are rows and columns of a position table that
    is no square. InputError says what does not fit.
    """
    source = Path(source).expanduser()
    with prefixed(source):
        choice, weights, settings, files = _read_selected(source, prefix, key)
    digests = {file.name: sha256(file) for file in files}
    (digest, *more) = digests.values()
    facts: dict[str, Any] = {"file": source.name, "sha256": digests if more else digest}
    if weights.precision != "float32":
        facts["stored_as"] = weights.precision
    with prefixed(source):
        if weights.card:
            detected, facts["license"] = _of_card(weights.card, weights.arrays)
        else:
            with refusing("its arrays are those of no ViT"):
                detected = detect_architecture(
                    weights.arrays,
                    settings,
                    family=family,
                    heads=heads,
                    prefix=choice.prefix,
                    grid=grid,
                )
    if choice.prefix:
        facts["prefix"] = choice.prefix
    ignored = [*choice.ignored, *detected.ignored_keys]
    detected = detected._replace(ignored_keys=tuple(ignored))
    if ignored:
        facts["left_out"] = ignored
    return detected, facts


def _read_selected(
    source: Path, prefix: str | None, key: str | None
) -> tuple[Choice, Weights, dict[str, Any], tuple[Path, ...]]:
    """What is chosen of a file or a directory, its arrays, what the directory says, and files."""
    chosen: list[Choice] = []

    def choose_names(names: Sequence[str]) -> Mapping[str, str]:
        chosen.append(choose(names, prefix, key))
        return chosen[0].names

    if not source.is_dir():
        weights = read_weights(source, choose_names)
        return chosen[0], weights, {}, (source,)
    settings, weights, files = read_directory(source)
    names = choose_names(list(weights.arrays))
    arrays = {used: weights.arrays[name] for name, used in names.items()}
    return chosen[0], weights._replace(arrays=arrays), settings, files


@contextlib.contextmanager
def prefixed(source: Path) -> Iterator[None]:
    """Puts a source before the problems that the block raises, where they do not name it."""
    try:
        yield
    except InputError as error:
        path = str(source)
        raise InputError(
            [each if each.startswith(path) else f"{path}: {each}" for each in error.problems]
        ) from None


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
    key: str | None = None,
    grid: tuple[int, int] | None = None,
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
    detected, facts = read_model(
        file, prefix=prefix, key=key, family=family, heads=heads, grid=grid
    )
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
