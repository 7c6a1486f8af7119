"""What the fields of a configuration may hold: one table for training, one for evaluation."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from proteus_jax.errors import InputError
from proteus_jax.methods.teacher_config import FIRST, OWN, lessons, masks
from proteus_jax.models.attention import IMPLEMENTATIONS
from proteus_jax.models.config import SPECS, named_spec
from proteus_jax.models.normalization import STATISTICS
from proteus_jax.models.remat import REMAT
from proteus_jax.models.student import TAKEN

PRECISIONS = ("auto", "float32", "bfloat16")
FINEGRAINED = (
    *("aircraft", "caltech101", "cars", "cifar10", "cifar100", "dtd", "flowers", "food", "pets"),
    *("sun397", "voc2007", "cub"),
)
PROTOCOLS = ("knn", "linear", "finegrained", "robustness", "analysis")
# Fields that may be left without a value: another one decides then.
OPTIONAL = (
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
# Lists of numbers; every other list is one of texts.
NUMBERS = ("data.weights", "knn.neighbours", "linear.learning_rates", "linear.blocks")
# Processes or threads that decode, more than any machine has a use for: a digit too many would
# fill its table of processes.
MOST_WORKERS = 1024


class Rule(NamedTuple):
    """A condition on the value of a field, and what to say is expected."""

    holds: Callable[[Any], bool]
    expected: str


def _at_least(least: float) -> Rule:
    return Rule(lambda value: least <= value < math.inf, f"at least {least:g}")


def _up_to(most: int) -> Rule:
    return Rule(lambda value: 0 <= value <= most, f"from 0 to {most}")


def _share(below_one: bool = False) -> Rule:
    if below_one:
        return Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
    return Rule(lambda value: 0 <= value <= 1, "from 0 to 1")


def _numbers(least: float, *, whole: bool = False) -> Rule:
    """One or more different numbers; above `least` where they need not be whole."""

    def holds(values: Any) -> bool:
        fits = [
            isinstance(value, int | float)
            and value < math.inf
            and (least <= value == int(value) if whole else least < value)
            for value in values
        ]
        return bool(fits) and all(fits) and len(set(values)) == len(values)

    kind = f"whole numbers of at least {least:g}" if whole else f"numbers above {least:g}"
    return Rule(holds, f"different {kind}")


_ABOVE_ZERO = Rule(lambda value: 0 < value < math.inf, "above 0")
_TRAINING: dict[str, Rule] = {
    "student": Rule(
        lambda names: (
            0 < len(names) == len(set(names))
            and all(isinstance(name, str) and named_spec(name) for name in names)
        ),
        f"one or more different names out of {', '.join(SPECS)}, each perhaps with _<n>blocks",
    ),
    "start": Rule(lambda value: isinstance(value, str), "a model, or nothing"),
    "teacher": Rule(lambda value: isinstance(value, str) and bool(value), "a model"),
    "teacher_normalisation": Rule(
        lambda value: value in (OWN, *STATISTICS), f"one of {', '.join((OWN, *STATISTICS))}"
    ),
    "teacher_crop": _at_least(1),
    "more_teachers": Rule(lambda value: hasattr(value, "items"), "teachers by name"),
    "standardise": Rule(lambda value: isinstance(value, bool), "true or false"),
    "seed": Rule(lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
    "batch": _at_least(1),
    "epochs": _ABOVE_ZERO,
    "steps": _at_least(1),
    "learning_rate": _ABOVE_ZERO,
    "warmup_epochs": _at_least(0),
    "warmup_steps": _at_least(0),
    "weight_decay": _at_least(0),
    "ema_decay": _share(below_one=True),
    "drop_path": _share(below_one=True),
    "loss.token": _at_least(0),
    "loss.feature": _at_least(0),
    "loss.patch": _at_least(0),
    "mask_ratio": _share(),
    "precision": Rule(lambda value: value in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "teacher_precision": Rule(
        lambda value: value in (*PRECISIONS, "float16"), f"one of {', '.join(PRECISIONS)}, float16"
    ),
    "first_moment": Rule(
        lambda value: value in PRECISIONS[1:], f"one of {', '.join(PRECISIONS[1:])}"
    ),
    "fsdp": _at_least(1),
    "accumulate": _at_least(1),
    "attention": Rule(
        lambda value: value in ("auto", *IMPLEMENTATIONS),
        f"one of auto, {', '.join(IMPLEMENTATIONS)}",
    ),
    "remat": Rule(lambda value: value in REMAT, f"one of {', '.join(REMAT)}"),
    "hosts": _at_least(1),
    "devices": _at_least(1),
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
    "data.epoch": _at_least(1),
    "data.repeats": _at_least(1),
    "data.crop": _at_least(1),
    "data.randaugment.operations": _at_least(0),
    "data.randaugment.magnitude": Rule(lambda value: 0 <= value <= 10, "from 0 to 10"),
    "data.randaugment.deviation": _at_least(0),
    "data.randaugment.probability": _share(),
    "data.erasing": _share(),
    "data.workers": _up_to(MOST_WORKERS),
    "data.threads": _up_to(MOST_WORKERS),
    "data.unreadable": _share(),
    "data.held_out.share": _share(below_one=True),
    "data.held_out.minimum": _at_least(1),
    "data.held_out.maximum": _at_least(1),
    "data.held_out.views": _at_least(1),
    "eval.root": Rule(lambda value: isinstance(value, str), "a place of images, or nothing"),
    "log_every": _at_least(1),
    "eval_every": _at_least(1),
    "checkpoint_every": _at_least(1),
    "max_skipped": _at_least(1),
    "keep_checkpoints": _at_least(1),
    "keep_every": _at_least(1),
    "max_failed_saves": _at_least(0),
    "stop_within": _ABOVE_ZERO,
}


_EVALUATION: dict[str, Rule] = {
    "protocol": Rule(lambda value: value in PROTOCOLS, f"one of {', '.join(PROTOCOLS)}"),
    "model": Rule(bool, "a model: a directory, a run, or a known name"),
    "seed": _TRAINING["seed"],
    "batch": _at_least(1),
    "precision": _TRAINING["precision"],
    "data.root": Rule(lambda value: isinstance(value, str), "a place of images"),
    "data.resize": _at_least(1),
    "data.crop": _at_least(1),
    "data.workers": _up_to(MOST_WORKERS),
    "data.threads": _up_to(MOST_WORKERS),
    "knn.neighbours": _numbers(1, whole=True),
    "knn.temperature": _ABOVE_ZERO,
    "linear.epochs": _ABOVE_ZERO,
    "linear.learning_rates": _numbers(0),
    "linear.blocks": _numbers(1, whole=True),
    "linear.held_out": _share(below_one=True),
    "linear.cache": Rule(lambda value: isinstance(value, bool), "true or false"),
    "robustness.head": Rule(lambda value: isinstance(value, str), "a folder, or nothing"),
    "analysis.teacher": Rule(lambda value: isinstance(value, str), "a model, or nothing"),
    "analysis.images": _at_least(2),
    "finegrained.datasets": Rule(
        lambda names: set(names) <= set(FINEGRAINED) and len(set(names)) == len(names),
        f"different names out of {', '.join(FINEGRAINED)}",
    ),
}


class Schema(NamedTuple):
    """The rules of a kind of configuration, and what only fields together make wrong."""

    rules: dict[str, Rule]
    together: Callable[[Any], list[str]]


def schema_of(config: Any) -> Schema:
    """Whether a configuration trains or evaluates shows in its fields."""
    if "protocol" in config:
        return Schema(_EVALUATION, _check_evaluation)
    return Schema(_TRAINING, _check_training)


def fault(field: str, value: Any, rules: dict[str, Rule]) -> str | None:
    """What is wrong with a value, in words."""
    if value is None and field in OPTIONAL:
        return None
    rule = rules.get(field)
    if rule is None or (value is not None and rule.holds(value)):
        return None
    return f"--config.{field}: expected {rule.expected}, found {value!r}"


def _check_evaluation(config: Any) -> list[str]:
    problems = []
    if config.data.crop > config.data.resize:
        problems.append(
            f"--config.data.crop: expected at most data.resize, {config.data.resize}, found "
            f"{config.data.crop}"
        )
    return problems


def _check_training(config: Any) -> list[str]:
    """What only two fields together make wrong; InputError where that cannot be told."""
    problems = _check_more_teachers(config.more_teachers)
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
    for name, lesson in lessons(config).items():
        if not any(lesson.weights):
            where = "loss" if name == FIRST else f"more_teachers.{name}.loss"
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


def _check_more_teachers(more: Any) -> list[str]:
    problems = []
    for name in more:
        if name in TAKEN | {FIRST} or not re.fullmatch("[a-z][a-z0-9_]*", name):
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
                wrong = (
                    None
                    if rule in OPTIONAL and value is None
                    else fault(
                        f"more_teachers.{name}.{field}",
                        value,
                        {f"more_teachers.{name}.{field}": _TRAINING[rule]},
                    )
                )
            except (KeyError, TypeError):
                wrong = (
                    f"--config.more_teachers.{name}.{field}: missing or of another type; make one "
                    "with base.add_teacher"
                )
            problems += [wrong] if wrong else []
    return problems
