"""Rules for the fields of a configuration that trains."""

import math
import re
from typing import Any

from proteus_jax.errors import InputError
from proteus_jax.evaluation.schema import EVALUATION
from proteus_jax.methods.teacher_config import NATIVE, PRIMARY, masks, teacher_configs
from proteus_jax.models.attention import IMPLEMENTATIONS
from proteus_jax.models.config import SPECS, named_spec
from proteus_jax.models.normalization import STATISTICS
from proteus_jax.models.precision import PRECISIONS
from proteus_jax.models.remat import REMAT
from proteus_jax.models.student import TAKEN
from proteus_jax.schema import (
    ABOVE_ZERO,
    BOOLEAN,
    MOST_WORKERS,
    SEED,
    Rule,
    Schema,
    at_least,
    fault,
    one_of,
    share,
    up_to,
)

_OPTIONAL = (
    "teacher_crop",
    "steps",
    "learning_rate",
    "warmup_steps",
    "hosts",
    "devices",
    "data.epoch",
    "data.workers",
    "keep_every",
)
_RULES: dict[str, Rule] = {
    "student": Rule(
        lambda names: (
            0 < len(names) == len(set(names))
            and all(isinstance(name, str) and named_spec(name) for name in names)
        ),
        f"one or more different names out of {', '.join(SPECS)}, each perhaps with _<n>blocks",
    ),
    "start": Rule(lambda value: isinstance(value, str), "a model, or nothing"),
    "teacher": Rule(lambda value: isinstance(value, str) and bool(value), "a model"),
    "teacher_normalisation": one_of(NATIVE, *STATISTICS),
    "teacher_crop": at_least(1),
    "more_teachers": Rule(lambda value: hasattr(value, "items"), "teachers by name"),
    "standardise": BOOLEAN,
    "seed": SEED,
    "batch": at_least(1),
    "epochs": ABOVE_ZERO,
    "steps": at_least(1),
    "learning_rate": ABOVE_ZERO,
    "warmup_epochs": at_least(0),
    "warmup_steps": at_least(0),
    "weight_decay": at_least(0),
    "ema_decay": share(below_one=True),
    "drop_path": share(below_one=True),
    "loss.token": at_least(0),
    "loss.feature": at_least(0),
    "loss.patch": at_least(0),
    "mask_ratio": share(),
    "precision": one_of(*PRECISIONS),
    "teacher_precision": one_of(*PRECISIONS, "float16"),
    "first_moment": one_of(*PRECISIONS[1:]),
    "fsdp": at_least(1),
    "accumulate": at_least(1),
    "attention": one_of("auto", *IMPLEMENTATIONS),
    "remat": one_of(*REMAT),
    "hosts": at_least(1),
    "devices": at_least(1),
    "data.root": Rule(
        lambda roots: all(isinstance(root, str) and root for root in roots),
        "one or more places of images",
    ),
    "data.weights": Rule(
        lambda weights: all(isinstance(w, float | int) and 0 < w < math.inf for w in weights),
        "numbers above 0",
    ),
    "data.subset.classes": Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "data.subset.images": Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "data.epoch": at_least(1),
    "data.repeats": at_least(1),
    "data.crop": at_least(1),
    "data.randaugment.operations": at_least(0),
    "data.randaugment.magnitude": Rule(lambda value: 0 <= value <= 10, "from 0 to 10"),
    "data.randaugment.deviation": at_least(0),
    "data.randaugment.probability": share(),
    "data.erasing": share(),
    "data.workers": up_to(MOST_WORKERS),
    "data.threads": up_to(MOST_WORKERS),
    "data.unreadable": share(),
    "data.held_out.share": share(below_one=True),
    "data.held_out.minimum": at_least(1),
    "data.held_out.maximum": at_least(1),
    "data.held_out.views": at_least(1),
    "eval.root": Rule(lambda value: isinstance(value, str), "a place of images, or nothing"),
    "log_every": at_least(1),
    "eval_every": at_least(1),
    "checkpoint_every": at_least(1),
    "max_skipped": at_least(1),
    "keep_checkpoints": at_least(1),
    "keep_every": at_least(1),
    "max_failed_saves": at_least(0),
    "stop_within": ABOVE_ZERO,
}


def _check(config: Any) -> list[str]:
    """Lists what two fields make wrong only together; InputError where that cannot be told."""
    problems = _check_teachers(config.more_teachers)
    if problems:
        # Nothing else can be looked at.
        raise InputError(problems)
    specs = [named_spec(name) for name in config.student]
    patches = {spec.patch_size for spec in specs if spec is not None}
    # With a model to start from the patches are that model's, which is not open yet.
    if not config.start and len(patches) > 1:
        problems.append(
            "--config.student: expected one patch size of all, to mask the same patches"
        )
    patch = min(patches)
    if not config.start and config.data.crop % patch:
        problems.append(
            f"--config.data.crop: expected a multiple of the patch size {patch}, found "
            f"{config.data.crop}"
        )
    for name, each in teacher_configs(config).items():
        if not any(each.weights):
            where = "loss" if name == PRIMARY else f"more_teachers.{name}.loss"
            problems.append(
                f"--config.{where}: expected a factor above 0 for one of token, feature and patch"
            )
    if masks(config):
        if config.batch % 2:
            problems.append(
                "--config.batch: expected an even number, as half of the images are masked, "
                f"found {config.batch}"
            )
        if not config.start and int((config.data.crop // patch) ** 2 * config.mask_ratio) < 1:
            problems.append(
                f"--config.mask_ratio: {config.mask_ratio} masks no patch of a "
                f"{config.data.crop} px crop"
            )
    if config.data.weights and len(config.data.weights) != len(config.data.root):
        problems.append(
            f"--config.data.weights: expected one for each of the {len(config.data.root)} roots, "
            f"found {len(config.data.weights)}"
        )
    if config.data.held_out.minimum > config.data.held_out.maximum:
        problems.append("--config.data.held_out: expected minimum to be at most maximum")
    return problems


# A further teacher's fields, by the rules of the first's.
_MORE = {
    "teacher": "teacher",
    "normalisation": "teacher_normalisation",
    "crop": "teacher_crop",
    "standardise": "standardise",
    "loss.token": "loss.token",
    "loss.feature": "loss.feature",
    "loss.patch": "loss.patch",
}


def _check_teachers(more: Any) -> list[str]:
    problems = []
    for name in more:
        if name in TAKEN | {PRIMARY} or not re.fullmatch("[a-z][a-z0-9_]*", name):
            problems.append(
                f"--config.more_teachers: expected a name of small letters, digits and _ that is "
                f"not taken, found {name!r}"
            )
            continue
        for field, rule in _MORE.items():
            value = more[name]
            try:
                for part in field.split("."):
                    value = value[part]
                absent = value is None and rule in _OPTIONAL
                place = f"more_teachers.{name}.{field}"
                wrong = None if absent else fault(place, value, _RULES[rule])
            except (KeyError, TypeError):
                wrong = (
                    f"--config.more_teachers.{name}.{field}: missing or of another type; make one "
                    "with base.add_teacher"
                )
            problems += [wrong] if wrong else []
    return problems


def _is_optional(field: str) -> bool:
    return field in _OPTIONAL or re.fullmatch(r"more_teachers\.\w+\.crop", field) is not None


TRAINING = Schema(_RULES, _check, _is_optional, numbers=("data.weights",))


def schema_of(config: Any) -> Schema:
    """Chooses the schema of a configuration: whether it trains or evaluates shows in its fields."""
    return EVALUATION if "protocol" in config else TRAINING
