"""A directory that can be believed: sealed with the digest of every file once it is complete.

Orbax restores a flipped bit without a word, so a checkpoint counts only while it equals its seal
(docs/decisions/0015-checkpoints-are-sealed.md).
"""

import concurrent.futures
import errno
import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from etils import epath

from proteus_jax.errors import Interrupted
from proteus_jax.runtime.filesystem import synced, write_atomically

SEAL = "seal.json"
_PIECE = 2**22
_READERS = 4
# What the system says of nothing; and of a file that is not one, or lies on a broken place of the
# disk. Anything else says that the file system is away.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_OF_THE_FILE = (*_ABSENT, errno.EISDIR, errno.EIO)


def write_checksums(folder: epath.PathLike, what: str) -> None:
    """Writes the digests of all files of a directory that is complete, last of all. `what` names
    it: a directory under another name is not what was sealed.

    OSError where it cannot be written; then there is no seal.
    """
    directory = epath.Path(folder)
    files = sorted(_files(directory))
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        digests = readers.map(lambda name: _digest(directory / name), files)
        checksums = dict(zip(files, digests, strict=True))
    if _is_local(directory):
        # The names too: those of the files, and the directory's own.
        inside = {parent for name in files for parent in PurePosixPath(name).parents}
        for each in (*(directory / parent for parent in inside), directory.parent):
            synced(each)
    body = json.dumps({"of": what, "files": checksums}, sort_keys=True)
    text = f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n"
    write_whole(directory / SEAL, text)


def verify_checksums(folder: epath.PathLike, what: str) -> str | None:
    """Compares a directory with its checksums. Returns what is wrong with it, None where nothing
    is.

    Interrupted where it cannot be read, as of a store that is away: that says nothing about it.
    """
    directory = epath.Path(folder)
    try:
        sealed = _read_seal(directory, what)
        missing = [name for name in sealed if not _is_file(directory / name)]
        if missing:
            return f"{missing[0]} is missing"
        with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
            digests = readers.map(lambda name: _digest(directory / name, sync=False), sealed)
            for (name, expected), digest in zip(sealed.items(), digests, strict=True):
                if digest["bytes"] != expected["bytes"]:
                    return f"{name}: expected {expected['bytes']} bytes, found {digest['bytes']}"
                if digest != expected:
                    return f"{name}: expected sha256 {expected['sha256'][:16]}..., found " + (
                        f"{digest['sha256'][:16]}..."
                    )
    except ValueError as error:
        return str(error)
    except Interrupted:
        raise
    except Exception as error:  # Each file system has its own.
        if isinstance(error, OSError) and error.errno in _OF_THE_FILE:
            return f"it cannot be read: {error}"
        raise Interrupted(f"{directory} cannot be read: {type(error).__name__}: {error}") from None
    return None


def is_sealed(directory: epath.Path) -> bool:
    """Returns True where there is a file of checksums, whole or not."""
    return path_exists(directory / SEAL)


def _is_file(path: epath.Path) -> bool:
    # Anything else might be waited for without end, as a pipe.
    return path_exists(path) and path.is_file()


def path_exists(path: epath.Path) -> bool:
    """Returns True where something is at a path. Interrupted where that cannot be told: exists()
    says no of what lies on a file system that is away.
    """
    if not _is_local(path):
        return path.exists()
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise Interrupted(f"{path} cannot be looked at: {error.strerror}") from None
    return True


def write_whole(path: epath.Path, text: str) -> None:
    """The old file or the whole new one, never a part; on an address a write is so by itself."""
    if not _is_local(path):
        path.write_text(text)
        return
    write_atomically(Path(os.fspath(path)), text)
    synced(path.parent)


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


def _files(directory: epath.Path) -> list[str]:
    """Names below a directory, without its seal and what begins with a dot."""
    names = []
    for path in directory.iterdir():
        if path.name == SEAL or path.name.startswith("."):
            continue
        if path.is_dir():
            names += [f"{path.name}/{name}" for name in _files(path)]
        else:
            names.append(path.name)
    return names


def _digest(path: epath.Path, *, sync: bool = True) -> dict[str, Any]:
    """Digest of one file; with `sync` it is on the disk itself first, and read back from there
    where the system lets go of its copy in memory.
    """
    digest, count = hashlib.sha256(), 0
    with path.open("rb") as file:
        if sync and _is_local(path):
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := file.read(_PIECE):
            digest.update(piece)
            count += len(piece)
    return {"bytes": count, "sha256": digest.hexdigest()}


def _read_seal(directory: epath.Path, what: str) -> dict[str, dict[str, Any]]:
    """The digests by name; ValueError, in words, where the seal is missing, broken or another's."""
    if not _is_file(directory / SEAL):
        raise ValueError(f"no {SEAL}: a save that was not finished")
    head, _, body = (directory / SEAL).read_bytes().partition(b"\n")
    body = body.removesuffix(b"\n")
    if head.decode(errors="replace") != hashlib.sha256(body).hexdigest():
        raise ValueError(f"{SEAL} is damaged")
    content = json.loads(body)
    if content["of"] != what:
        raise ValueError(f"{SEAL} is that of {content['of']}")
    return content["files"]
