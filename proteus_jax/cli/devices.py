"""Sums arrays over all devices of all hosts, and says how fast they hear each other."""

import jax

from proteus_jax.cli.arguments import Arguments
from proteus_jax.cli.hosts import all_hosts
from proteus_jax.errors import InputError
from proteus_jax.runtime import device_check
from proteus_jax.runtime.console import Console


def run(read: Arguments, console: Console) -> int:
    """Has all hosts meet, and all devices hear each other; returns the exit code."""
    others = [*read.paths, *read.planning, *(read.flags - {"--devices", "--offline"})]
    others += [f"--config.{field}" for field, _ in read.overrides]
    problems = [*read.problems, *(f"{name}: not with --devices" for name in others)]
    with all_hosts(read, problems, console, {}):
        # One of several hosts was refused before it met the others.
        if problems:
            raise InputError(problems)
        console.quiet = jax.process_index() > 0
        device_check.check_devices(console.line, console.error)
    return 0
