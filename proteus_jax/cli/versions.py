"""The versions that all hosts of a run must have in common."""

from importlib.metadata import version

import proteus_jax


def versions() -> dict[str, str]:
    """Lists them by name."""
    installed = {f"version of {name}": version(name) for name in ("jax", "jaxlib", "flax")}
    return {"version": proteus_jax.__version__} | installed
