"""Model directories: `model.safetensors` in DINOv2's official names, and `config.json` that says
what it is.

A teacher's converted weights and a student's exported ones are the same kind of directory.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from proteus_jax.errors import InputError
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import Params
from proteus_jax.models.normalization import IMAGENET, Normalization
from proteus_jax.runtime.filesystem import atomic_directory, sha256, write_atomically
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert.families import FAMILIES

FORMAT = "proteus_jax model 1"
# What a teacher does not need, so that many files go without.
OPTIONAL = ("mask_token",)
WEIGHTS, CARD = "model.safetensors", "config.json"
README, NO_LICENSE = "README.md", "not stated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model's config.json: sizes, normalization, and where the weights come from.

    `source` is free-form ("url", "sha256", "teacher", ...); `absent` names parameters that the
    source did not have and that are zeros here. `verified` is what the last comparison with other
    code found.
    """

    spec: ViTSpec
    family: str = "dinov2"
    normalization: Normalization = IMAGENET
    license: str = NO_LICENSE
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()
    verified: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The card as JSON values."""
        return {
            "format": FORMAT,
            "family": self.family,
            "spec": self.spec.to_json(),
            "patch_size": self.spec.patch_size,
            "registers": self.spec.registers,
            "normalisation": {
                "mean": list(self.normalization.mean),
                "std": list(self.normalization.std),
            },
            "licence": self.license,
            "source": self.source,
            "absent": list(self.absent),
            "verified": self.verified,
        }

    @classmethod
    def from_json(cls, card: dict[str, Any]) -> "ModelCard":
        """The inverse of `to_json`; ValueError where it is no such card."""
        if card.get("format") != FORMAT:
            raise ValueError(f"format should be {FORMAT!r}, found {card.get('format')!r}")
        statistics = card["normalisation"]
        made = cls(
            spec=ViTSpec.from_json(card["spec"]),
            family=card["family"],
            normalization=Normalization.checked(statistics["mean"], statistics["std"]),
            license=card["licence"],
            source=card["source"],
            absent=tuple(card["absent"]),
            # Cards of before it was kept have none.
            verified=card.get("verified", {}),
        )
        kinds = {"family": str, "licence": str, "source": dict, "verified": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(card.get(name, {}), kind)]
        wrong += ["family"] if made.family not in FAMILIES else []
        wrong += ["absent"] if not set(made.absent) <= set(OPTIONAL) else []
        if wrong:
            raise ValueError(f"{wrong[0]}: {card[wrong[0]]!r}")
        return made


def save_model(
    directory: Path,
    params: Params,
    card: ModelCard,
    *,
    replace: bool = False,
    readme: str | None = None,
) -> None:
    """Writes a model directory, whole or not at all; `readme` is what README.md says of it."""
    arrays = state_dict.from_params(jax.device_get(params), card.spec)
    with atomic_directory(directory, replace=replace) as temporary:
        weights = temporary / WEIGHTS
        try:
            safetensors.numpy.save_file(
                {k: v.astype(np.float32) for k, v in arrays.items()}, weights
            )
        except safetensors.SafetensorError as error:
            system = re.search(r"os error (\d+)", str(error))
            if system is None:
                raise
            number = int(system.group(1))
            raise OSError(number, os.strerror(number), str(directory / WEIGHTS)) from None
        text = json.dumps(card.to_json() | {"weights_sha256": sha256(weights)}, indent=2)
        (temporary / CARD).write_text(text + "\n")
        if readme is not None:
            (temporary / README).write_text(readme)


def update_card(directory: Path, **changes: Any) -> None:
    """Changes what a model directory says of itself; its weights stay."""
    card, digest = _read_card(Path(directory))
    card = dataclasses.replace(card, **changes)
    text = json.dumps(card.to_json() | {"weights_sha256": digest}, indent=2)
    write_atomically(Path(directory) / CARD, text + "\n")


def load_card(directory: Path) -> ModelCard:
    """The card of a model directory; InputError where there is none that makes sense."""
    return _read_card(Path(directory))[0]


def load_model(directory: Path) -> tuple[Params, ModelCard]:
    """Nested float32 numpy arrays and the card; InputError where anything is missing, changed or
    misshapen.
    """
    directory = Path(directory)
    card, digest = _read_card(directory)
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{directory}: {WEIGHTS} is missing")
    checksum = sha256(weights)
    if checksum != digest:
        raise InputError(
            f"{weights}: changed since it was written: its sha256 should be {digest}, found "
            f"{checksum}"
        )
    try:
        arrays = safetensors.numpy.load_file(weights)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{weights}: not a readable safetensors file ({error})") from None
    try:
        return state_dict.to_params(arrays, card.spec), card
    except InputError as error:
        raise InputError([f"{weights}: {problem}" for problem in error.problems]) from None


def _read_card(directory: Path) -> tuple[ModelCard, str]:
    path = directory / CARD
    if not path.is_file():
        raise InputError(f"{directory}: not a model directory: it has no {CARD}")
    try:
        text = json.loads(path.read_text())
        return ModelCard.from_json(text), text["weights_sha256"]
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise InputError(f"{path}: not a model's card: {error!r}"[:500]) from None
