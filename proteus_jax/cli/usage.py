"""The help of a command: what it does, and every field of its configuration."""

import re
from collections.abc import Iterator, Sequence
from importlib import import_module

from proteus_jax import config
from proteus_jax.cli import commands

# The configurations whose comments say what a field means.
BASES = {"train": "base", "evaluate": "eval/base", "plan": "base", "doctor": "base"}
_FIELD = re.compile(r"    (config|teacher)\.([\w.]+) = (?!ml_collections)")


def of(command: str, arguments: Sequence[str]) -> str:
    """Returns the help of a command, with the defaults of the configuration that the arguments
    name; of the program itself where there is none.
    """
    if not command:
        return _overview()
    module = import_module(f"proteus_jax.cli.{command}")
    named = _configuration(arguments) or BASES[command]
    lines = [(module.__doc__ or "").strip(), "", f"Fields, with their values in {named}:", ""]
    return "\n".join([*lines, *_fields(BASES[command], named)])


def _overview() -> str:
    described = {**commands.CONFIGURED, **commands.OTHERS}
    lines = [f"  proteus {name:10} {each.meaning}" for name, each in described.items()]
    return "\n".join([(commands.__doc__ or "").strip(), "", *lines])


def _configuration(arguments: Sequence[str]) -> str | None:
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            return value if equals else next(iter(arguments[number + 1 :]), None)
    return None


def _fields(base: str, named: str) -> Iterator[str]:
    values = config.values_of(named)
    # A file may have fields of its own, with comments like those of the base.
    meanings = field_meanings(base) | field_meanings(named)
    order = {field: number for number, field in enumerate(meanings)}
    for field in sorted(values, key=lambda field: order.get(_described(field), len(order))):
        value = values[field]
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        yield f"--config.{field}={'None' if shown is None else shown}"
        yield f"    {meanings.get(_described(field)) or 'a field of this configuration'}"


def _described(field: str) -> str:
    """The field that says what a field means: of a further teacher it is the primary one's."""
    return re.sub(r"^teachers\.\w+\.", "teachers.teacher.", field)


def field_meanings(base: str) -> dict[str, str]:
    """Returns what each field means, in one line: the first sentence of its comment."""
    meanings: dict[str, str] = {}
    comment: list[str] = []
    for line in config.find_file(base).read_text("utf-8").splitlines():
        field = _FIELD.match(line)
        if line.startswith("    # "):
            comment.append(line.removeprefix("    # "))
        elif field:
            above = "" if field[1] == "config" else "teachers.teacher."
            sentence = " ".join(comment).partition(". ")[0].rstrip(".")
            if sentence:
                meanings[above + field[2]] = sentence
            comment = []
        elif not line.strip().startswith("config."):
            comment = []
    return meanings
