"""Rules for the fields of a configuration that trains."""

import math
import re
from typing import Any

from proteus_jax.data.reading_rules import READING_RULES
from proteus_jax.evaluation.protocols.registry import PROTOCOLS
from proteus_jax.evaluation.schema import evaluation_schema
from proteus_jax.methods.config import NATIVE, PRIMARY
from proteus_jax.methods.registry import METHODS
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
    one_of,
    share,
    up_to,
)
from proteus_jax.training.config import (
    COPY,
    LEAST_SQUARES,
    RANDOM,
    SLICE,
    TrainConfig,
    resolve,
)
from proteus_jax.training.optimizer import PARTS

_OPTIONAL = (
    "steps",
    "learning_rate",
    "optimizer.warmup_steps",
    "hosts",
    "devices",
    "data.epoch",
    "data.workers",
    "keep_every",
)
# Fields that had another name.
_RENAMED = {
    "teacher_normalisation": "teachers.teacher.normalization",
    "teacher_crop": "teachers.teacher.image_size",
    "standardise": "teachers.teacher.standardize",
    "loss.token": "method.loss_weights.token",
    "loss.feature": "method.loss_weights.feature",
    "loss.patch": "method.loss_weights.patch",
    "mask_ratio": "method.mask_ratio",
    "start": "init.source",
    "warmup_epochs": "optimizer.warmup_epochs",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "first_moment": "optimizer.mu_dtype",
    "accumulate": "grad_accum_steps",
    "stop_within": "preemption_timeout_s",
    "data.repeats": "data.repeated_aug",
    "data.unreadable": "data.max_corrupt_fraction",
}
_RULES: dict[str, Rule] = {
    "student": Rule(
        lambda names: (
            0 < len(names) == len(set(names))
            and all(isinstance(name, str) and named_spec(name) for name in names)
        ),
        f"one or more different names out of {', '.join(SPECS)}, each perhaps with _<n>blocks",
    ),
    "init.method": one_of(RANDOM, COPY, SLICE),
    "init.heads": one_of(RANDOM, LEAST_SQUARES),
    "init.images": at_least(64),
    "init.stream_scale": ABOVE_ZERO,
    "init.source": Rule(lambda value: isinstance(value, str), "a model, or nothing"),
    "teachers": Rule(
        lambda value: hasattr(value, "items") and PRIMARY in value and all(map(_is_name, value)),
        f"teachers by name, one of them {PRIMARY!r}, names of small letters, digits and _ that are "
        "not taken",
    ),
    "seed": SEED,
    "batch": at_least(1),
    "epochs": ABOVE_ZERO,
    "steps": at_least(1),
    "learning_rate": ABOVE_ZERO,
    "optimizer.name": one_of("adamw", "muon"),
    "optimizer.muon_learning_rate": ABOVE_ZERO,
    **{f"optimizer.rates.{part}": at_least(0) for part in PARTS},
    "optimizer.warmup_epochs": at_least(0),
    "optimizer.warmup_steps": at_least(0),
    "optimizer.weight_decay": at_least(0),
    "optimizer.mu_dtype": one_of(*PRECISIONS[1:]),
    "ema_decay": share(below_one=True),
    "drop_path": share(below_one=True),
    "method.name": one_of(*METHODS),
    "precision": one_of(*PRECISIONS),
    "teacher_precision": one_of(*PRECISIONS, "float16"),
    "fsdp": at_least(1),
    "grad_accum_steps": at_least(1),
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
    **READING_RULES,
    "data.subset.classes": Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "data.subset.images": Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "data.epoch": at_least(1),
    "data.repeated_aug": at_least(1),
    "data.crop": at_least(1),
    "data.randaugment.operations": at_least(0),
    "data.randaugment.magnitude": Rule(lambda value: 0 <= value <= 10, "from 0 to 10"),
    "data.randaugment.deviation": at_least(0),
    "data.randaugment.probability": share(),
    "data.erasing": share(),
    "data.workers": up_to(MOST_WORKERS),
    "data.threads": up_to(MOST_WORKERS),
    "data.max_corrupt_fraction": share(),
    "data.held_out.share": share(below_one=True),
    "data.held_out.minimum": at_least(1),
    "data.held_out.maximum": at_least(1),
    "data.held_out.views": at_least(1),
    "eval.root": Rule(lambda value: isinstance(value, str), "a place of images, or nothing"),
    "eval.protocols": Rule(
        lambda names: set(names) <= set(PROTOCOLS) and len(set(names)) == len(names),
        f"different names out of {', '.join(PROTOCOLS)}",
    ),
    "log_every": at_least(1),
    "eval_every": at_least(1),
    "checkpoint_every": at_least(1),
    "max_skipped": at_least(1),
    "keep_checkpoints": at_least(1),
    "keep_every": at_least(1),
    "max_failed_saves": at_least(0),
    "preemption_timeout_s": ABOVE_ZERO,
}


# Each teacher's, below teachers.NAME.
_TEACHER: dict[str, Rule] = {
    "source": Rule(lambda value: isinstance(value, str) and bool(value), "a model"),
    "normalization": one_of(NATIVE, *STATISTICS),
    "image_size": at_least(1),
    "standardize": BOOLEAN,
}
_OPTIONAL_OF_TEACHER = re.compile(r"teachers\.\w+\.(image_size|loss_weights\.\w+)")


def _is_name(name: str) -> bool:
    return name not in TAKEN and re.fullmatch("[a-z][a-z0-9_]*", name) is not None


def _check(config: TrainConfig) -> list[str]:
    """Lists what two fields make wrong only together."""
    specs = [named_spec(name) for name in config.student]
    patch_sizes = {spec.patch_size for spec in specs if spec is not None}
    problems = _check_init(config)
    # With a model to start from the patches are that model's, which is not open yet.
    if config.init.method == RANDOM:
        problems += _check_patches(config, patch_sizes)
    method = config.make_method()
    if config.batch % method.group:
        problems.append(
            f"--config.batch: expected a multiple of {method.group}, as the method takes so many "
            f"images together, found {config.batch}"
        )
    return problems + _check_data(config)


def _check_init(config: TrainConfig) -> list[str]:
    if config.init.method == COPY and not config.init.source:
        return ["--config.init.source: expected a model to copy, found nothing"]
    if config.init.method == RANDOM and config.init.source:
        return [
            f"--config.init.source: {config.init.source} counts for nothing with random weights; "
            f"give --config.init.method={COPY} or {SLICE} as well"
        ]
    return []


def _check_patches(config: TrainConfig, patch_sizes: set[int]) -> list[str]:
    """Lists what the students' patches make wrong."""
    problems = []
    if len(patch_sizes) > 1:
        problems.append("--config.student: expected one patch size of all, to share their targets")
    patch, crop = min(patch_sizes), config.data.crop
    if crop % patch:
        problems.append(
            f"--config.data.crop: expected a multiple of the patch size {patch}, found {crop}"
        )
    reasons = config.make_method().problems((crop // patch) ** 2)
    return problems + [f"--config.method.{reason}" for reason in reasons]


def _check_data(config: TrainConfig) -> list[str]:
    problems, data = [], config.data
    if data.weights and len(data.weights) != len(data.root):
        problems.append(
            f"--config.data.weights: expected one for each of the {len(data.root)} roots, "
            f"found {len(data.weights)}"
        )
    if data.held_out.minimum > data.held_out.maximum:
        problems.append("--config.data.held_out: expected minimum to be at most maximum")
    return problems


def _is_optional(field: str) -> bool:
    return field in _OPTIONAL or _OPTIONAL_OF_TEACHER.fullmatch(field) is not None


def training_schema(config: Any) -> Schema:
    """Makes the schema of a configuration that trains, by its teachers' names and its method."""
    method = METHODS.get(_group(config, "method").get("name"))
    own = {} if method is None else method.rules
    # A teacher may have factors of its own for the method's losses.
    weights = {field: rule for field, rule in own.items() if field.startswith("loss_weights.")}
    rules = {
        **_RULES,
        **{
            f"teachers.{name}.{field}": rule
            for name in _group(config, "teachers")
            for field, rule in {**_TEACHER, **weights}.items()
        },
        **{f"method.{field}": rule for field, rule in own.items()},
    }
    return Schema(rules, resolve, _check, _is_optional, numbers=("data.weights",), renamed=_RENAMED)


def _group(config: Any, name: str) -> Any:
    """Returns a group of fields; an empty one where a file has none of that name."""
    group = config.get(name)
    return group if hasattr(group, "items") else {}


def schema_of(config: Any) -> Schema:
    """Chooses the schema of a configuration: whether it trains or evaluates shows in its fields."""
    return evaluation_schema(config) if "protocol" in config else training_schema(config)
