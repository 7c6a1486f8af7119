"""Sums arrays over all devices of all hosts, and says how fast they hear each other."""

from proteus_jax.cli.arguments import Arguments, process_info
from proteus_jax.cli.versions import versions
from proteus_jax.errors import InputError
from proteus_jax.runtime import device_check, distributed
from proteus_jax.runtime.console import Console


def run(read: Arguments, console: Console) -> int:
    """Has all hosts meet, and all devices hear each other; returns the exit code."""
    others = [*read.paths, *read.planning, *(read.flags - {"--devices", "--offline"})]
    others += [f"--config.{field}" for field, _ in read.overrides]
    problems = [*read.problems, *(f"{name}: not with --devices" for name in others)]
    place, seconds = process_info(read.place, problems)
    if problems:
        raise InputError(problems)
    with distributed.initialize_distributed(
        place, versions(), timeout=seconds, progress=console.progress, say=console.error
    ):
        console.quiet = place.host > 0
        device_check.check_devices(console.line, console.error)
    return 0
