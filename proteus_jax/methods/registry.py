"""The methods that a configuration can name; a new one is a module and a line here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from proteus_jax.methods import proteus
from proteus_jax.methods.base import Method
from proteus_jax.methods.config import MethodConfig, TeacherConfig
from proteus_jax.schema import Rule


class MethodSpec(NamedTuple):
    """How a method is made from a configuration.

    `make` takes the fields of `config.method` and the teachers by name, the primary one among
    them. `rules` are those of the fields, by their dotted names.
    """

    make: Callable[[Mapping[str, Any], Mapping[str, TeacherConfig]], Method]
    rules: Mapping[str, Rule]


METHODS: dict[str, MethodSpec] = {"proteus": MethodSpec(proteus.from_config, proteus.RULES)}


def make_method(config: MethodConfig, teachers: Mapping[str, TeacherConfig]) -> Method:
    """Makes the method that a configuration names."""
    return METHODS[config.name].make(config.fields, teachers)
