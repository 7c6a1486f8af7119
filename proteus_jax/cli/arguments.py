"""The arguments of the commands that take a configuration, all problems with them in one list.

A library would stop at the first problem; --config.FIELD=VALUE is checked by the schema of the
configuration, which is not known while arguments are read.
"""

from typing import NamedTuple

from proteus_jax.errors import InputError
from proteus_jax.runtime.cluster_env import ALONE, ProcessInfo, detect_cluster_env

PATHS = ("--config", "--workdir", "--output", "--replay")
PLACE = ("--hosts", "--host", "--coordinator")
WAIT, WAIT_SECONDS, LONGEST_WAIT = "--wait", "600", 7 * 24 * 3600
FLAGS = ("--doctor", "--profile", "--plan", "--prepare", "--devices", "--offline")
PLAN = ("--topology", "--mfu", "--price", "--hlo")


class Arguments(NamedTuple):
    """The arguments as read, and what of them was not understood."""

    paths: dict[str, str]
    place: dict[str, str]
    planning: dict[str, str]
    overrides: list[tuple[str, str | None]]
    flags: set[str]
    problems: list[str]


def parse(arguments: list[str]) -> Arguments:
    """Reads --config, --workdir and the others, and --config.FIELD, each as `--name=value` or
    `--name value`; and flags.
    """
    read = Arguments({}, {}, {}, [], set(), [])
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name in FLAGS and not equals:
            read.flags.add(name)
            continue
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        _keep(read, name, value if equals else None)
    return read._replace(problems=[*read.problems, *_check(read)])


def _keep(read: Arguments, name: str, value: str | None) -> None:
    if name.startswith("--config."):
        read.overrides.append((name.removeprefix("--config."), value))
    elif name in PATHS:
        read.paths[name] = value or ""
    elif name in PLAN:
        read.planning[name] = value or ""
    elif name in PLACE or name == WAIT:
        read.place[name] = value or ""
    else:
        read.problems.append(f"{name}: unknown argument")


def _check(read: Arguments) -> list[str]:
    """Lists arguments that are missing, and those that do not go together."""
    problems = []
    needed = _needed(read)
    if "--output" in read.paths and "--doctor" not in read.flags and "--config" in needed:
        problems.append("--output: only --doctor writes there")
    if "--plan" not in read.flags:
        problems += [f"{name}: only --plan asks for it" for name in read.planning]
    # What a launch file prepares with is the run's own command line.
    beside = {"--offline", "--profile"} if "--prepare" in read.flags else {"--offline"}
    flags = [name for name in FLAGS if name in read.flags and name not in beside]
    if len(flags) > 1:
        problems.append(f"{' and '.join(flags)}: expected one of them")
    problems += [
        f"{name}: expected a path"
        for name in PATHS
        if not read.paths.get(name) and name in needed | read.paths.keys()
    ]
    return problems


def _needed(read: Arguments) -> set[str]:
    """Selects the paths that must be there."""
    if "--replay" in read.paths or "--devices" in read.flags:
        return set()
    # The file of --doctor lies in the workdir, where nothing else is said.
    if {"--plan", "--prepare"} & read.flags or (
        "--doctor" in read.flags and read.paths.get("--output")
    ):
        return {"--config"}
    return {"--config", "--workdir"}


def process_info(flags: dict[str, str], problems: list[str]) -> tuple[ProcessInfo, float]:
    """Finds this host's place and how long it waits for the others; what is wrong is added to
    `problems`.

    InputError at once on one of several hosts, where something is wrong already: nobody waits.
    """
    place, seconds = ALONE, flags.get(WAIT, WAIT_SECONDS)
    try:
        place = detect_cluster_env({name: text for name, text in flags.items() if name != WAIT})
    except InputError as error:
        problems += error.problems
    if not seconds.isdecimal() or not 0 < int(seconds) <= LONGEST_WAIT:
        problems.append(f"{WAIT}: expected seconds from 1 to {LONGEST_WAIT}, found {seconds!r}")
        seconds = WAIT_SECONDS
    if problems and place.hosts > 1:
        raise InputError(problems)
    return place, float(seconds)
