"""The hosts of a command: where this one stands among them, and what all must have in common."""

import contextlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version

import proteus_jax
from proteus_jax.cli.arguments import Arguments, process_info
from proteus_jax.runtime import distributed
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.rendezvous import ProcessGroup


@contextlib.contextmanager
def all_hosts(
    read: Arguments, problems: list[str], console: Console, common: Mapping[str, str]
) -> Iterator[ProcessGroup | None]:
    """Connects the hosts for as long as the block lasts; they must have the same versions, and the
    same `common` texts. What is wrong with the place of this one is added to `problems`.
    """
    place, seconds = process_info(read.place, problems)
    installed = {f"version of {name}": version(name) for name in ("jax", "jaxlib", "flax")}
    about = {"version": proteus_jax.__version__, **installed, **common}
    with distributed.initialize_distributed(
        place, about, timeout=seconds, progress=console.progress, say=console.error
    ) as group:
        yield group


@contextlib.contextmanager
def meet(problems: list[str], console: Console) -> Iterator[ProcessGroup | None]:
    """The same for a command without flags of its own for hosts: SLURM, a TPU pod and the like tell
    them by the environment.
    """
    place, seconds = process_info({}, problems)
    about = {"version": proteus_jax.__version__}
    with distributed.initialize_distributed(
        place, about, timeout=seconds, progress=console.progress, say=console.error
    ) as group:
        console.quiet = place.host != 0
        yield group
