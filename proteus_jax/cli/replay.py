"""Makes a step again of which training diverged, and says what of it is not finite."""

from proteus_jax.cli.arguments import Arguments
from proteus_jax.errors import InputError, fitting
from proteus_jax.runtime.console import Console
from proteus_jax.training import nan_replay

LESS = "a step made again takes what it took in the run, over as many devices"


def run(read: Arguments, console: Console) -> int:
    """Replays a dump; nothing else is to be said with it. Diverged where the step did."""
    others = [*read.paths, *read.place, *read.planning, *read.flags]
    others += [f"--config.{field}" for field, _ in read.overrides]
    problems = [f"{name}: not with --replay" for name in others if name != "--replay"]
    if read.problems or problems:
        raise InputError([*read.problems, *problems])
    with fitting(LESS):
        nan_replay.replay(read.paths["--replay"], console)
    return 0
