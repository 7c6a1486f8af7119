"""Rules for the fields of a configuration, and the faults that they find."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# Processes or threads that decode, more than any machine has a use for: a digit too many would
# fill its table of processes.
MOST_WORKERS = 1024


class Rule(NamedTuple):
    """A condition on the value of a field, and what to say is expected."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(least: float) -> Rule:
    """A finite number that is not smaller."""
    return Rule(lambda value: least <= value < math.inf, f"at least {least:g}")


def up_to(most: int) -> Rule:
    """A number from 0 on that is not larger."""
    return Rule(lambda value: 0 <= value <= most, f"from 0 to {most}")


def share(below_one: bool = False) -> Rule:
    """A part of a whole."""
    if below_one:
        return Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
    return Rule(lambda value: 0 <= value <= 1, "from 0 to 1")


def numbers(least: float, *, whole: bool = False) -> Rule:
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


ABOVE_ZERO = Rule(lambda value: 0 < value < math.inf, "above 0")
BOOLEAN = Rule(lambda value: isinstance(value, bool), "true or false")
SEED = Rule(lambda value: 0 <= value < 2**32, "from 0 to 4294967295")


def one_of(*choices: str) -> Rule:
    """One out of a few texts."""
    return Rule(lambda value: value in choices, f"one of {', '.join(choices)}")


class Schema(NamedTuple):
    """The rules of a kind of configuration, and what only fields together make wrong.

    `make` makes the record that the program reads of JSON values that keep the rules, and
    `together` lists what is wrong with that. `optional` are fields that may be left without a
    value: another one decides then. `numbers` are lists of numbers; every other list is one of
    texts. `renamed` has the names of today by those of before.
    """

    rules: Mapping[str, Rule]
    make: Callable[[Any], Any]
    together: Callable[[Any], list[str]]
    optional: Callable[[str], bool] = lambda _: False
    numbers: tuple[str, ...] = ()
    # The names that fields once had, and have now.
    renamed: Mapping[str, str] = MappingProxyType({})

    def fault(self, field: str, value: Any) -> str | None:
        """Returns what is wrong with a value, in words; None where nothing is."""
        absent = value is None and self.optional(field)
        return None if absent or field not in self.rules else fault(field, value, self.rules[field])


def fault(field: str, value: Any, rule: Rule) -> str | None:
    """Returns how a value breaks a rule, in words; None where it keeps it. No value keeps none."""
    if value is not None and rule.holds(value):
        return None
    # Of a group of fields their names say enough.
    shown = repr(value) if not hasattr(value, "items") else ", ".join(sorted(value or ()))
    return f"--config.{field}: expected {rule.expected}, found {shown}"
