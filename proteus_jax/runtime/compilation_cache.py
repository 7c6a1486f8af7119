"""Compiled programs are kept on disk: the second start of a run does not compile again."""

import hashlib
import platform
from pathlib import Path

import jax

from proteus_jax.runtime.filesystem import cache_directory

# Beside a run's checkpoints, where several hosts train.
FOLDER = "compiled"


def keep_compiled_programs(shared: str) -> None:
    """Turns JAX's persistent cache on, in this project's cache, unless the user has one elsewhere.

    Of several hosts only the first one writes it. Where they do not see the same cache, that one
    would find its programs after a restart while the others compile, which they do together on
    some platforms, and wait for it. So they keep them in `shared`, which all of them see.

    Programs for a CPU hold its own instructions, which JAX's key does not tell apart: machines of
    another kind that share a home have another folder. Several devices made of one CPU keep none:
    in the collectives of a program that was read from disk they wait for each other without end
    (jaxlib 0.10.2, two cores, a mesh of 2 x 2).
    """
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    directory = str(cache_directory() / "compiled" / _machine())
    if jax.process_count() > 1:
        directory = shared
    jax.config.update("jax_compilation_cache_dir", directory)


def _machine() -> str:
    """A name for the kind of processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    described = f"{platform.machine()} {platform.processor()} {features}"
    return hashlib.sha256(described.encode()).hexdigest()[:16]
