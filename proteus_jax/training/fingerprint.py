"""The facts that must be the same for a run to go on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proteus_jax.checkpoint.items import FORMAT, VERSION
from proteus_jax.models.normalization import Normalization
from proteus_jax.runtime.filesystem import sha256
from proteus_jax.training.builder import (
    Assembly,
)
from proteus_jax.training.config import InitConfig, TrainConfig
from proteus_jax.training.inputs import Inputs
from proteus_jax.training.resume import CARD, CONFIGURATION
from proteus_jax.weights.model_card import license_of
from proteus_jax.weights.model_dir import WEIGHTS, ModelCard


def teacher_facts(assembly: Assembly, directories: Mapping[str, Path]) -> dict[str, Any]:
    """The facts that must be the same of the teachers, by name."""
    return {
        name: {
            "weights": sha256(directories[name] / WEIGHTS),
            # Its grid follows the crop, which is a fact of its own.
            "spec": {**each.backbone.spec.to_json(), "grid": None},
            "normalization": _listed(each.normalization),
            "side": each.side,
        }
        for name, each in assembly.teachers.items()
    }


def fingerprint(
    config: TrainConfig,
    inputs: Inputs,
    assembly: Assembly,
    cards: Mapping[str, ModelCard],
    start: ModelCard | None,
) -> dict[str, Any]:
    """The facts that must be the same for a run to go on, and, as `card`, what its student carries
    on.
    """
    return {
        FORMAT: VERSION,
        "data": inputs.split.training.fingerprint,
        "seed": config.seed,
        "batch": config.batch,
        "crop": config.data.crop,
        "weights": list(config.data.weights),
        "repeated_aug": config.data.repeated_aug,
        "randaugment": config.data.randaugment._asdict(),
        "erasing": config.data.erasing,
        "student": list(config.student),
        "student_specs": {name: each.spec.to_json() for name, each in assembly.students.items()},
        # None where it is the only one that there once was: such runs go on.
        "init": _fitted(config.init),
        "optimizer": None if config.optimizer.name == "adamw" else config.optimizer.name,
        "start": None if inputs.start is None else sha256(inputs.start / WEIGHTS),
        "normalization": _listed(assembly.normalization),
        "method": {"name": config.method.name, **assembly.method.fingerprint()},
        "teachers": teacher_facts(assembly, inputs.teachers),
        "teacher_widths": {
            name: each.backbone.spec.width for name, each in assembly.teachers.items()
        },
        "mu_dtype": config.optimizer.mu_dtype,
        "averaged": config.ema_decay > 0,
        CONFIGURATION: config.as_json,
        CARD: {
            "licence": license_of(cards, start),
            "families": {name: _family(name, start) for name in config.student},
        },
        "standardized": [name for name, each in assembly.teachers.items() if each.standardize],
    }


def _fitted(init: InitConfig) -> dict[str, Any] | None:
    """Returns what a start that was fitted to images depends on."""
    if not (init.slices or init.fits_heads):
        return None
    return {name: value for name, value in init._asdict().items() if name != "source"}


def _family(student: str, start: ModelCard | None) -> str:
    """The family whose code has a place for a student: that of the model it started from, or by its
    name.
    """
    if start is not None:
        return start.family
    return next((family for family in ("synclr", "clip") if family in student.split("_")), "dinov2")


def _listed(normalization: Normalization) -> list[list[float]]:
    return [list(part) for part in normalization]
