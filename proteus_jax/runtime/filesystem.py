"""Files that are written whole or not at all, and their digests."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from proteus_jax.errors import InputError

# Beside a name, what is to get it once it is whole, or had it before.
BESIDE = ".{name}.unfinished-"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synced(path: str | os.PathLike[str]) -> None:
    """Waits until what was written of a file, or the names in a folder, is on the disk itself."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def as_open_as_any_other(path: Path) -> None:
    """Gives a file or folder the permissions that a new one has: a temporary one is private."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _umask() -> int:
    # It can only be read by setting it. Linux tells it, and no thread is disturbed.
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A file to write, which gets its name only when the block ends without an error."""
    with tempfile.NamedTemporaryFile(
        dir=target.parent,
        prefix=BESIDE.format(name=target.name),
        suffix=target.suffix,
        delete=False,
    ) as file:
        beside = Path(file.name)
    try:
        yield beside
        synced(beside)
        as_open_as_any_other(beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that is the old one or the whole new one, never a part."""
    with atomic_file(path) as beside:
        beside.write_text(text)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process was writing in a folder that nobody else writes to."""
    for path in folder.glob(BESIDE.format(name="*") + "*"):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def why_unwritable(directory: Path) -> str | None:
    """Why nothing can be written to a directory, which may have to be made; None where it can."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is no directory"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} cannot be written to"
    return None


@contextlib.contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty directory to fill, which gets its name only when the block ends without an error.
    With `replace` it takes the place of one of that name, but for what lies only in that.

    InputError where `target` exists with something in it and `replace` is off.
    """
    # A link is followed: what it leads to is what gets replaced.
    target = Path(target).expanduser().resolve()
    if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists already; give another name or remove it first")
    with made_folder(target.parent), _named_at_the_end(target) as temporary:
        yield temporary


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """A folder that is there; what had to be made of it is gone again after an error, if empty."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def _give_back(aside: Path, target: Path) -> None:
    """Removes what has been replaced, and puts back what has not."""
    for path in aside.iterdir():
        if not (target / path.name).exists():
            os.replace(path, target / path.name)
    shutil.rmtree(aside)


@contextlib.contextmanager
def _named_at_the_end(target: Path) -> Iterator[Path]:
    prefix = BESIDE.format(name=target.name)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            # Libraries write private files too.
            as_open_as_any_other(path)
            synced(path)
        if target.exists():
            # Under a name that nothing removes, as it may hold what somebody else put there.
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.before-", dir=target.parent))
            os.replace(target, aside)
            os.replace(temporary, target)
            _give_back(aside, target)
        else:
            os.replace(temporary, target)
        synced(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_directory() -> Path:
    """$PROTEUS_JAX_CACHE, or proteus_jax in the user's cache directory."""
    chosen = os.environ.get("PROTEUS_JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "proteus_jax"
