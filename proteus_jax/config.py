"""Configurations: a file that assigns, overrides from the command line, and one list of all that is
wrong.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from proteus_jax import configs
from proteus_jax.errors import InputError, about
from proteus_jax.schema import Schema

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
    path: str, overrides: Sequence[Override], schema_of: Callable[[Any], Schema]
) -> tuple[Any, list[str]]:
    """Reads the configuration of a file with overrides, and lists everything that is wrong with
    them.

    `schema_of` chooses the rules that a configuration keeps, and with them the record that is made
    of it. A wrong override changes nothing, so that the rest can still be looked at. InputError
    where the file itself gives no configuration with sensible values.
    """
    config = _run_file(path)
    schema, problems = schema_of(config), []
    for field, text in overrides:
        try:
            _assign(config, field, text, schema)
        except InputError as error:
            problems += error.problems
    # An override may have chosen other rules.
    schema = schema_of(config)
    faults = _check_fields(config, schema)
    if faults:
        raise InputError(problems + faults)
    record = schema.make(_json_values(config))
    return record, problems + schema.together(record)


def fields_of(path: str) -> list[str]:
    """Lists the dotted names of all fields that a file's configuration has."""
    return _fields(_run_file(path))


def values_of(path: str) -> dict[str, Any]:
    """Returns the value of every field of a file's configuration, by its dotted name."""
    config = _run_file(path)
    values = {}
    for field in _fields(config):
        parent, name = _parent(config, field)
        values[field] = parent[name]
    return values


def complete(values: dict[str, Any], schema_of: Callable[[Any], Schema]) -> Any:
    """Makes the record of a configuration that was written as JSON; InputError where a field is
    missing or wrong.
    """
    config = ml_collections.ConfigDict(values)
    schema = schema_of(config)
    faults = _check_fields(config, schema)
    record = None if faults else schema.make(_json_values(config))
    faults = faults or schema.together(record)
    if faults:
        raise InputError(faults)
    return record


def _json_values(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json())


def to_record(kind: type, values: Mapping[str, Any]) -> Any:
    """Makes a NamedTuple or a dataclass, and those inside it, of values by name; lists become
    tuples. Values that it has no field for are left out.
    """
    hints = typing.get_type_hints(kind)

    def converted(hint: Any, value: Any) -> Any:
        if _is_record(hint) and isinstance(value, Mapping):
            return to_record(hint, value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: converted(hints[name], values[name]) for name in hints if name in values})


def _is_record(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or hasattr(hint, "_fields")


def find_file(text: str) -> Path:
    """Finds the file that is meant: a path, or the name of one of this package's configurations, as
    "vitb14" or "eval/knn". InputError where there is none.
    """
    with about("--config"):
        file = Path(text).expanduser()
        if file.is_file():
            return file
        named = {
            str(each.relative_to(folder).with_suffix("")): each
            for folder in configs.__path__
            for each in sorted(Path(folder).rglob("*.py"))
            if not each.name.startswith("_")
        }
        if text in named:
            return named[text]
        close = difflib.get_close_matches(text, named, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        if "/" not in text and not text.endswith(".py"):
            hint = f", nor a configuration of that name (of {', '.join(named)})"
        raise InputError(f"no such file: {text}{hint}")


def _run_file(path: str) -> ml_collections.ConfigDict:
    file = find_file(path)
    specification = importlib.util.spec_from_file_location("proteus_jax_run_config", file)
    if specification is None or specification.loader is None:
        raise InputError(f"--config: expected a Python file, found {path}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    try:
        specification.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:
        raise InputError(
            f"--config: {path} does not give a configuration: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"--config: get_config of {path} should return a ConfigDict, found "
            f"{type(config).__name__}"
        )
    return config


def _assign(
    config: ml_collections.ConfigDict, field: str, text: str | None, schema: Schema
) -> None:
    known = _fields(config)
    inside = [name for name in known if name.startswith(field + ".")]
    if inside:
        raise InputError(f"--config.{field}: expected one of its fields: {', '.join(inside)}")
    if field not in known:
        if field in schema.renamed:
            now = schema.renamed[field]
            raise InputError(f"--config.{field}: this field is called --config.{now} now")
        close = difflib.get_close_matches(field, known, n=1)
        hint = f"; did you mean --config.{close[0]}?" if close else ""
        raise InputError(f"--config.{field}: unknown field{hint}")
    parent, name = _parent(config, field)
    kind = parent.get_type(name)
    if text is None and kind is not bool:
        raise InputError(f"--config.{field}: expected {_TYPE_NAMES[kind]} after it, found nothing")
    absent = schema.optional(field) and text in ("None", "none")
    try:
        value = None if absent else _parse(kind, text)
        if field in schema.numbers:
            value = tuple(float(part) for part in value or ())
    except (ValueError, SyntaxError, KeyError, RecursionError, MemoryError):
        raise InputError(
            f"--config.{field}: expected {_TYPE_NAMES[kind]}, found {text!r}"
        ) from None
    wrong = schema.fault(field, value)
    if wrong:
        raise InputError(wrong)
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
        if os.path.exists(os.path.expanduser(text)):  # noqa: PTH110, PTH111
            value = [text]  # one path, whatever commas and brackets it has
        elif text.strip().startswith(("(", "[")):
            value = [str(part) for part in ast.literal_eval(text)]
        else:
            value = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(value)
    return kind(text)


def _check_fields(config: ml_collections.ConfigDict, schema: Schema) -> list[str]:
    """Faults of single values, as a configuration's own file may have them."""
    problems = []
    for field in schema.rules:
        try:
            parent, name = _parent(config, field)
            wrong = schema.fault(field, parent[name])
        except (KeyError, TypeError):
            wrong = (
                f"--config.{field}: missing or of another type; a configuration starts from "
                "configs/base.py, and has the fields of a method that it chooses"
            )
        if wrong:
            problems.append(wrong)
    return problems
