"""Looks at a place before a run writes there."""

from collections.abc import Sequence
from pathlib import Path

import fsspec

from proteus_jax.runtime import workdir
from proteus_jax.runtime.console import waiting
from proteus_jax.runtime.filesystem import why_unwritable
from proteus_jax.runtime.workdir import is_remote

EXTRA = "gcs"


def why_no_workdir(text: str) -> str | None:
    """Why a run cannot lie there; None where it can. Nothing is made."""
    if not is_remote(text):
        return why_unwritable(Path(text).expanduser())
    schemes = workdir.SCHEMES
    if text.partition("://")[0] not in schemes:
        return f"expected a folder or an address on {', '.join(schemes)}://, found {text}"
    try:
        with waiting(f"asking for {text}"):
            system, root = fsspec.url_to_fs(text.rstrip("/"))
            system.exists(root)
    except ImportError as error:
        return f"{text} needs more packages: pip install '.[{EXTRA}]' ({error})"
    except Exception as error:  # Each file system has its own.
        return f"{text} cannot be reached: {type(error).__name__}: {error}"
    return None


def first_of(text: str, names: Sequence[str]) -> str | None:
    """The first of some names that lies in a folder or under an address; None where none does."""
    if not is_remote(text):
        return next((n for n in names if (Path(text).expanduser() / n).exists()), None)
    system, root = fsspec.url_to_fs(text.rstrip("/"))
    return next((name for name in names if system.exists(f"{root}/{name}")), None)
