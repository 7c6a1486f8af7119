"""Files on a disk, or on gs:// and s3:// through pyarrow: lists and reads, whole or in part."""

import errno
import fnmatch
import functools
import glob
import os
import re
import shutil
import stat
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.fs

from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime.console import waiting

SCHEMES = ("gs", "s3", "file")
# What a library tries again on gs:// it gives up after so many seconds.
RETRY_SECONDS = 60
# A store that has not answered after so many may be one of which requests fail.
PATIENCE = 10.0


def is_remote(path: str) -> bool:
    """Returns True for a path that names a store rather than a disk."""
    return "://" in path


@functools.lru_cache(maxsize=8)
def _bucket(root: str) -> tuple[pyarrow.fs.FileSystem, str]:
    parts = urllib.parse.urlsplit(root)
    if parts.scheme not in SCHEMES:
        raise InputError(f"{root}: expected an address on gs:// or s3://, found {parts.scheme}://")
    if parts.password is not None:
        raise InputError(
            f"{parts.scheme}://...@{parts.hostname}: an address must not hold a password, as logs "
            "and config.json keep addresses; give it by the environment, as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    if parts.scheme == "gs" and "retry_limit_seconds" not in parts.query:
        query = f"{parts.query}&" if parts.query else ""
        root = parts._replace(query=f"{query}retry_limit_seconds={RETRY_SECONDS}").geturl()
    try:
        return pyarrow.fs.FileSystem.from_uri(root)
    except (OSError, ValueError) as error:
        raise InputError(f"{root}: cannot be opened: {error}") from None


def _store(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of an address, one for all that lies in a bucket, and the path in it."""
    parts = urllib.parse.urlsplit(path)
    store, base = _bucket(parts._replace(path="/", fragment="").geturl())
    return store, base.rstrip("/") + urllib.parse.unquote(parts.path)


def local(path: str | Path) -> Path:
    """A path of a disk with ~ expanded."""
    return Path(path).expanduser()


def absolute(path: str) -> str:
    """A path that means the same from everywhere."""
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def open_regular(path: str | Path) -> BinaryIO:
    """A file of a disk, to be read; OSError for what is none, as a pipe, which would be waited for
    without end.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "no file with content", str(path))
    return open(number, "rb")


def read(root: str, name: str) -> bytes:
    """The whole of a file below a root; Unreadable where that cannot be had."""
    try:
        if is_remote(root):
            store, base = _store(root)
            with store.open_input_stream(f"{base}/{name}") as file:
                return file.read()
        with open_regular(os.path.join(root, name)) as file:
            return file.read()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None


def open_file(path: str) -> Any:
    """A file to seek in, local or remote, with read, seek and tell."""
    if not is_remote(path):
        return open(path, "rb")
    store, base = _store(path)
    return store.open_input_file(base)


def copy_here(address: str, target: Path) -> None:
    """Fetches a file from a store; InputError where that cannot be had."""
    store, base = _store(address)
    size = size_and_time(address)[0]
    print(f"fetching {address}", flush=True)

    def done() -> str:
        here = target.stat().st_size if target.exists() else 0
        return f"{here / 1e6:.0f} of {size / 1e6:.0f} MB"

    try:
        with (
            waiting(f"fetching {address}", done=done),
            store.open_input_stream(base) as source,
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 24)
    except OSError as error:
        raise InputError(f"{address}: cannot be fetched: {_reason(error)}") from None


def size_and_time(path: str) -> tuple[int, int]:
    """A file's size in bytes and time of change in nanoseconds; InputError where it is missing."""
    try:
        if is_remote(path):
            store, base = _store(path)
            info = store.get_file_info(base)
            if not info.is_file:
                raise FileNotFoundError(2, "No such file", path)
            return int(info.size), int(info.mtime_ns or 0)
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def remote_listing(root: str) -> Iterator[tuple[str, int]]:
    """The name and the size in bytes of every file below a root on a store."""
    store, base = _store(root)
    try:
        with waiting(f"listing {root}", done=_tried_again()):
            listed = store.get_file_info(pyarrow.fs.FileSelector(base, recursive=True))
        for info in listed:
            if info.is_file:
                yield info.path[len(base) :].lstrip("/"), int(info.size)
    except OSError as error:
        raise InputError(f"{root}: cannot be listed: {_reason(error)}") from None


def _tried_again() -> Callable[[], str]:
    """Words for a store that takes long: its library does not tell of what it tries."""
    began = time.monotonic()

    def attempts() -> str:
        if time.monotonic() - began < PATIENCE:
            return ""
        return "requests that fail are tried again, up to two minutes"

    return attempts


def _reason(error: OSError) -> str:
    """The last thing that a store said, without the accounts of its library."""
    match = re.search(
        r"Status\((\w+): .*? last message of (.*?) error_info=", str(error), re.DOTALL
    )
    return ": ".join(match.groups()) if match else str(error)


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand(pattern: str) -> list[str]:
    """The files that a path names: {000..146} counts, * and ? match on a disk; sorted.

    InputError where none is there.
    """
    match = _RANGE.search(pattern)
    if match:
        first, last = match.groups()
        if int(first) > int(last):
            raise InputError(f"{pattern}: expected {{first..last}}, found nothing to count")
        numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
        return [
            name
            for number in numbers
            for name in expand(pattern[: match.start()] + number + pattern[match.end() :])
        ]
    if is_remote(pattern):
        return _remote_matches(pattern)
    path = str(local(pattern))
    if os.path.exists(path):
        return [path]
    names = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    missing = [name for name in names if not os.path.exists(name)]
    if missing or not names:
        raise InputError(f"{missing[0] if missing else pattern}: no such file")
    return names


def _remote_matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    root, _, last = pattern.rpartition("/")
    if glob.has_magic(root):
        raise InputError(f"{pattern}: on a store only the last part may have * or ?")
    names = fnmatch.filter((name for name, _ in remote_listing(root)), last)
    names = [name for name in names if "/" not in name]
    if not names:
        raise InputError(f"{pattern}: no such file")
    return [f"{root}/{name}" for name in sorted(names)]
