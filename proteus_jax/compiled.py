"""Compiled programs are kept on disk: the second start of a run does not compile again."""

import hashlib
import platform
from pathlib import Path

import jax

from proteus_jax.downloads import cache_directory


def keep_compiled_programs() -> None:
    """Turns JAX's persistent cache on, in this project's cache, unless the user has one elsewhere.

    Programs for a CPU hold its own instructions, which JAX's key does not tell apart: machines of
    another kind that share a home have another folder.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        directory = cache_directory() / "compiled" / _machine()
        jax.config.update("jax_compilation_cache_dir", str(directory))


def _machine() -> str:
    """A name for the kind of processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    described = f"{platform.machine()} {platform.processor()} {features}"
    return hashlib.sha256(described.encode()).hexdigest()[:16]
