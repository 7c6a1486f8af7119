"""Configurations: a file that assigns, overrides from the command line, and one list of all that is
wrong.
"""

import ast
import difflib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from proteus_jax.errors import InputError
from proteus_jax.models.specs import SPECS
from proteus_jax.models.vit import REMAT

PRECISIONS = ("auto", "float32", "bfloat16")
# Fields that may be left without a value: another one decides then.
_OPTIONAL = (
    "steps",
    "learning_rate",
    "warmup_steps",
    "hosts",
    "devices",
    "data.epoch",
    "data.workers",
)
# Lists of numbers; every other list is one of texts.
_NUMBERS = ("data.weights",)
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    tuple: "a list",
}


class Override(NamedTuple):
    """--config.<field>=<text>; the text is None where the command line had none."""

    field: str
    text: str | None


def load(
    path: str, overrides: Sequence[Override]
) -> tuple[ml_collections.FrozenConfigDict, list[str]]:
    """The configuration of a file with overrides, and everything that is wrong with them.

    A wrong override changes nothing, so that the rest can still be looked at. InputError where the
    file itself gives no configuration with sensible values.
    """
    config = _run_file(path)
    problems = []
    for field, text in overrides:
        try:
            _assign(config, field, text)
        except InputError as error:
            problems += error.problems
    faults = _check_fields(config)
    if faults:
        raise InputError(problems + faults)
    return ml_collections.FrozenConfigDict(config), problems + _check_together(config)


def _run_file(path: str) -> ml_collections.ConfigDict:
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"--config: no such file: {path}")
    specification = importlib.util.spec_from_file_location("proteus_jax_run_config", file)
    if specification is None or specification.loader is None:
        raise InputError(f"--config: expected a Python file, found {path}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    try:
        specification.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise InputError(
            f"--config: {path} does not give a configuration: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"--config: get_config of {path} should return a ConfigDict, found "
            f"{type(config).__name__}"
        )
    return config


def _assign(config: ml_collections.ConfigDict, field: str, text: str | None) -> None:
    known = _fields(config)
    inside = [name for name in known if name.startswith(field + ".")]
    if inside:
        raise InputError(f"--config.{field}: expected one of its fields: {', '.join(inside)}")
    if field not in known:
        close = difflib.get_close_matches(field, known, n=1)
        hint = f"; did you mean --config.{close[0]}?" if close else ""
        raise InputError(f"--config.{field}: unknown field{hint}")
    parent, name = _parent(config, field)
    kind = parent.get_type(name)
    if text is None and kind is not bool:
        raise InputError(f"--config.{field}: expected {_TYPE_NAMES[kind]} after it, found nothing")
    absent = field in _OPTIONAL and text in ("None", "none")
    try:
        value = None if absent else _parse(kind, text)
        if field in _NUMBERS:
            value = tuple(float(part) for part in value or ())
    except (ValueError, SyntaxError):
        raise InputError(
            f"--config.{field}: expected {_TYPE_NAMES[kind]}, found {text!r}"
        ) from None
    fault = _fault(field, value)
    if fault:
        raise InputError(fault)
    parent[name] = value


def _parent(config: Any, field: str) -> tuple[Any, str]:
    """The group that a field lies in, and its name there."""
    *above, name = field.split(".")
    for part in above:
        config = config[part]
    return config, name


def _fields(config: ml_collections.ConfigDict, above: str = "") -> list[str]:
    names: list[str] = []
    for name in config:
        value = config.get_oneway_ref(name).get()
        inside = isinstance(value, ml_collections.ConfigDict)
        names += _fields(value, f"{above}{name}.") if inside else [above + name]
    return names


def _parse(kind: type, text: str | None) -> Any:
    if kind is bool:
        return {None: True, "true": True, "1": True, "false": False, "0": False}[
            None if text is None else text.lower()
        ]
    assert text is not None
    if kind is tuple:
        if text.strip().startswith(("(", "[")):
            value = [str(part) for part in ast.literal_eval(text)]
        else:
            value = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(value)
    return kind(text)


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    expected: str


def _at_least(least: float) -> _Rule:
    return _Rule(lambda value: least <= value < math.inf, f"at least {least:g}")


def _share(below_one: bool = False) -> _Rule:
    if below_one:
        return _Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
    return _Rule(lambda value: 0 <= value <= 1, "from 0 to 1")


_ABOVE_ZERO = _Rule(lambda value: 0 < value < math.inf, "above 0")
_RULES: dict[str, _Rule] = {
    "student": _Rule(
        lambda names: 0 < len(names) == len(set(names)) and all(name in SPECS for name in names),
        f"one or more different names out of {', '.join(SPECS)}",
    ),
    "seed": _Rule(lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
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
    "precision": _Rule(lambda value: value in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "teacher_precision": _Rule(
        lambda value: value in PRECISIONS, f"one of {', '.join(PRECISIONS)}"
    ),
    "first_moment": _Rule(
        lambda value: value in PRECISIONS[1:], f"one of {', '.join(PRECISIONS[1:])}"
    ),
    "fsdp": _at_least(1),
    "accumulate": _at_least(1),
    "remat": _Rule(lambda value: value in REMAT, f"one of {', '.join(REMAT)}"),
    "hosts": _at_least(1),
    "devices": _at_least(1),
    "data.root": _Rule(
        lambda roots: all(isinstance(root, str) and root for root in roots),
        "one or more places of images",
    ),
    "data.weights": _Rule(
        lambda weights: all(isinstance(w, float | int) and 0 < w < math.inf for w in weights),
        "numbers above 0",
    ),
    "data.subset.classes": _Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "data.subset.images": _Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "data.epoch": _at_least(1),
    "data.repeats": _at_least(1),
    "data.crop": _at_least(1),
    "data.randaugment.operations": _at_least(0),
    "data.randaugment.magnitude": _Rule(lambda value: 0 <= value <= 10, "from 0 to 10"),
    "data.randaugment.deviation": _at_least(0),
    "data.randaugment.probability": _share(),
    "data.erasing": _share(),
    "data.workers": _at_least(0),
    "data.threads": _at_least(0),
    "data.unreadable": _share(),
    "data.held_out.share": _share(below_one=True),
    "data.held_out.minimum": _at_least(1),
    "data.held_out.maximum": _at_least(1),
    "data.held_out.views": _at_least(1),
    "log_every": _at_least(1),
    "eval_every": _at_least(1),
    "checkpoint_every": _at_least(1),
    "keep_checkpoints": _at_least(1),
}


def _fault(field: str, value: Any) -> str | None:
    if value is None and field in _OPTIONAL:
        return None
    rule = _RULES.get(field)
    if rule is None or (value is not None and rule.holds(value)):
        return None
    return f"--config.{field}: expected {rule.expected}, found {value!r}"


def _check_fields(config: ml_collections.ConfigDict) -> list[str]:
    """What is wrong with single values, as a configuration's own file may have it."""
    problems = []
    for field in _RULES:
        try:
            parent, name = _parent(config, field)
            fault = _fault(field, parent[name])
        except (KeyError, TypeError):
            fault = (
                f"--config.{field}: missing or of another type; a configuration starts from "
                "configs/base.py"
            )
        if fault:
            problems.append(fault)
    return problems


def _check_together(config: Any) -> list[str]:
    """What only two fields together make wrong."""
    problems = []
    patch = SPECS[config.student[0]].patch_size
    if config.data.crop % patch:
        problems.append(
            f"--config.data.crop: expected a multiple of the patch size {patch}, found "
            f"{config.data.crop}"
        )
    if not any((config.loss.token, config.loss.feature, config.loss.patch)):
        problems.append(
            "--config.loss: expected a factor above 0 for one of token, feature and patch"
        )
    if config.loss.patch:
        if config.batch % 2:
            problems.append(
                "--config.batch: expected an even number, as half of the images are masked, "
                f"found {config.batch}"
            )
        if int((config.data.crop // patch) ** 2 * config.mask_ratio) < 1:
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
