"""The command `proteus`, and `python main.py`."""

import os
import sys
from collections.abc import Sequence

import proteus_jax
from proteus_jax.cli.arguments import Arguments, parse
from proteus_jax.cli.commands import CONFIGURED, OTHERS
from proteus_jax.cli.ending import end, end_at_a_signal, ending
from proteus_jax.errors import InputError, exit_code
from proteus_jax.runtime import process
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.download import go_offline


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given and given[0] in CONFIGURED | OTHERS else ""
    if command in OTHERS:
        return _run_other(command, given[1:])
    rest = given[1:] if command else given
    if {"--help", "-h"} & set(rest):
        return _help(command, rest)
    if rest == ["--version"]:
        print(proteus_jax.__version__)
        return 0
    process.begin()
    console = Console(watched=True)
    end_at_a_signal(console)
    return ending(lambda: run(rest, console, command), console)


def _help(command: str, arguments: list[str]) -> int:
    from proteus_jax.cli import usage

    try:
        print(usage.of(command, arguments), flush=True)
    except BrokenPipeError:
        # Whoever read it has seen enough, as `head` has; Python's own last flush would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return exit_code(error)
    return 0


def script() -> None:
    """Runs the console script `proteus`."""
    if len(sys.argv) == 1:
        from proteus_jax.cli import usage

        print(usage.of("", []))
        sys.exit(InputError.EXIT_CODE)
    end(main())


def run(arguments: list[str], console: Console, command: str = "") -> int:
    """Checks everything, then does what the arguments ask for; returns the exit code.

    Without a command the arguments are those of `python main.py`.
    """
    read = parse([*_flags(command, arguments), *arguments])
    if "--offline" in read.flags:
        # Before any library reads it.
        go_offline()
    if "--prepare" in read.flags:
        # A host of many has none of its devices to itself.
        os.environ["JAX_PLATFORMS"] = "cpu"
    return _run_configured(read, console, command)


def _flags(command: str, arguments: list[str]) -> tuple[str, ...]:
    """Returns the flags that a command stands for; none beside --devices."""
    flags = CONFIGURED[command].flags if command else ()
    return () if "--devices" in arguments else flags


def _run_configured(read: Arguments, console: Console, command: str) -> int:
    if "--replay" in read.paths:
        from proteus_jax.cli import replay

        return replay.run(read, console)
    if "--devices" in read.flags:
        from proteus_jax.cli import devices

        return devices.run(read, console)
    if not read.paths.get("--config"):
        raise InputError(read.problems)
    from proteus_jax import config
    from proteus_jax.cli import doctor, evaluate, plan, train
    from proteus_jax.evaluation.config import EvalConfig
    from proteus_jax.training.schema import schema_of

    overrides = [config.Override(*override) for override in read.overrides]
    configuration, problems = config.load(read.paths["--config"], overrides, schema_of)
    problems = [*read.problems, *problems]
    evaluates = isinstance(configuration, EvalConfig)
    if command and evaluates != (command == "evaluate"):
        other = "evaluate" if evaluates else "train, plan and doctor"
        problems.append(f"--config: {read.paths['--config']} is a configuration for {other}")
    if evaluates:
        return evaluate.run(configuration, read, problems, console)
    if "--doctor" in read.flags:
        return doctor.run(configuration, read, problems, console)
    if "--plan" in read.flags:
        return plan.run(configuration, read, problems, console)
    return train.run(configuration, read, problems, console)


def _run_other(command: str, arguments: list[str]) -> int:
    from importlib import import_module

    process.begin()
    return import_module(f"proteus_jax.cli.{command}").main(arguments)
