"""The place of a run: a folder, or an address on gs:// with a folder that stands for it meanwhile.

Checkpoints go to an address directly, through orbax. Small files are written locally and uploaded
at every checkpoint; the address is the truth, and what a machine had of its own is not looked for.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import fsspec

from proteus_jax.errors import InputError, Interrupted, about
from proteus_jax.runtime.console import waiting
from proteus_jax.runtime.filesystem import remove_leftovers, write_atomically
from proteus_jax.runtime.heartbeat import FILE as HEARTBEAT
from proteus_jax.runtime.heartbeat import is_stopping, living

SCHEMES = ("gs",)
CHECKPOINTS, LOCK = "checkpoints", ".lock"
# By which hosts see whether they share a folder, and the seconds that news of it may take.
MEETING, NEWS = ".meeting", 10.0
# Where exported students lie, and averages of them.
STUDENTS = ("student", "student_ema")
# What a resumed run goes on with; the rest is written anew.
CONTINUED = ("metrics.jsonl", "log*.txt", "agreement.png", "report/*.png", "report/*/*.png")
# An upload is tried again after so many seconds.
PAUSES = (1.0, 4.0, 16.0)
# What file systems say that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclasses.dataclass
class Workdir:
    """`local` is the folder to write to; `remote` the address that it is uploaded to, or empty."""

    local: Path
    remote: str = ""

    def __post_init__(self) -> None:
        self._uploaded: dict[Path, tuple[int, int]] = {}

    @property
    def checkpoints(self) -> str:
        """The directory that orbax writes to."""
        return self.address_of(self.local / CHECKPOINTS)

    def compare(self, host: int, of_all_hosts: Callable[[str], list[str]]) -> None:
        """InputError on every host where they do not all see one workdir: they would wait for each
        other in the first checkpoint.

        The first host leaves a word there, for which the others look. `of_all_hosts` tells each
        host what all of them say.
        """
        first = of_all_hosts(os.urandom(8).hex())[0]
        left = self.local / MEETING
        if host == 0 and not self.remote:
            with about("--workdir"):
                self.local.mkdir(parents=True, exist_ok=True)
                write_atomically(left, first)
        address = of_all_hosts(self.remote)[0]
        on_store = bool(self.remote or address)
        seen = self.remote == address if on_store else _is_there(left, first)
        name = self.remote or str(self.local.absolute())
        answers_of_hosts = of_all_hosts(
            f"{'sees' if seen else 'misses'} {socket.gethostname()}: {name}"
        )
        if host == 0:
            left.unlink(missing_ok=True)
        if any(word.startswith("misses") for word in answers_of_hosts):
            places = [
                f"host {n} ({word.partition(' ')[2]})" for n, word in enumerate(answers_of_hosts)
            ]
            raise InputError(
                f"--workdir: the hosts do not see the same one: {'; '.join(places)}; give a folder "
                "that all of them share, or an address on gs://"
            )

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Nobody else's as long as the block lasts, or this process; InputError where it is
        somebody's already. One that has been asked to stop is waited for.

        A record lock: it ends with its process however that ends, and no child inherits it. Where
        there are none, as on an address, it is somebody's as long as a heartbeat comes.
        """
        if self.remote:
            self._refuse_while_it_lives(say)
        with about("--workdir"):
            self.local.mkdir(parents=True, exist_ok=True)
            file = open(self.local / LOCK, "a+")  # noqa: SIM115  (just below)
        with file:
            self._lock(file, say)
            for folder in ("", *STUDENTS):
                remove_leftovers(self.local / folder)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def _lock(self, file: IO[str], say: Callable[[str], None]) -> None:
        waiting = False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    self._refuse_while_it_lives(say)
                    return
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise InputError(
                        f"--workdir: {self.local} cannot be locked: {error.strerror}"
                    ) from None
                file.seek(0)
                owner = file.read().strip()
                if not is_stopping(self._heartbeat()):
                    raise _in_use(str(self.local), owner) from None
                if not waiting:
                    say(f"waiting for {owner}, which is stopping")
                waiting = True
                time.sleep(1.0)
            else:
                return

    def _refuse_while_it_lives(self, say: Callable[[str], None]) -> None:
        owner = living(self._heartbeat, say)
        if owner is not None:
            raise _in_use(self.remote or str(self.local), owner)

    def _heartbeat(self) -> str:
        """The first host's, as others see it; nothing where none can be read."""
        try:
            if not self.remote:
                return (self.local / HEARTBEAT).read_text()
            system, root = fsspec.url_to_fs(self.remote)
            return system.cat_file(f"{root}/{HEARTBEAT}").decode()
        except Exception:  # Each file system has its own.
            return ""

    def publish(self, path: Path) -> None:
        """Brings one file to the address, where that can be reached."""
        with contextlib.suppress(Exception):
            system, root = fsspec.url_to_fs(self.remote)
            system.makedirs(root, exist_ok=True)
            system.put_file(str(path), f"{root}/{path.relative_to(self.local).as_posix()}")

    def address_of(self, path: Path) -> str:
        """The name of a path under `local` that is the same on all hosts, for orbax."""
        return self.named(path) if self.remote else str(path.absolute())

    def named(self, path: Path) -> str:
        """A path under `local` as its user should know it."""
        if not self.remote:
            return str(path)
        return f"{self.remote}/{path.relative_to(self.local).as_posix()}"

    def upload(self) -> str | None:
        """Brings the address up to date: every file that has changed since the last time.

        Why it cannot be reached, where several tries failed; the next call goes on from there.
        """
        if not self.remote:
            return None
        return _persistently(self._upload, f"uploading to {self.remote}")

    def _upload(self) -> None:
        system, root = fsspec.url_to_fs(self.remote)
        for path, state in self._files():
            if self._uploaded.get(path) != state:
                target = f"{root}/{path.relative_to(self.local).as_posix()}"
                system.makedirs(target.rpartition("/")[0], exist_ok=True)
                system.put_file(str(path), target)
                self._uploaded[path] = state

    def download(self) -> None:
        """Fetches what a resumed run goes on with; Interrupted where that fails."""
        with waiting(f"reading {self.remote}"):
            reason = _persistently(self._download, f"reading {self.remote}")
        if reason is not None:
            raise Interrupted(f"what the run goes on with cannot be fetched: {reason}")

    def _download(self) -> None:
        system, root = fsspec.url_to_fs(self.remote)
        for name in CONTINUED:
            for path in system.glob(f"{root}/{name}"):
                target = self.local / path.removeprefix(root.rstrip("/")).lstrip("/")
                if not target.resolve().is_relative_to(self.local.resolve()):
                    # A name with .. in it is nothing that this project wrote.
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(path, str(target))
        self._uploaded = dict(self._files())

    def _files(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        """Every file, with what changes when it does."""
        for path in sorted(self.local.rglob("*")):
            # A name that begins with a dot is one of a file that is still being written.
            hidden = any(part.startswith(".") for part in path.relative_to(self.local).parts)
            if path.is_file() and not hidden:
                status = path.stat()
                yield path, (status.st_mtime_ns, status.st_size)


def _is_there(path: Path, text: str) -> bool:
    """Returns True where a file with that text is there, or comes: NFS shows a new file after a
    while.
    """
    deadline = time.monotonic() + NEWS
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _in_use(name: str, owner: str) -> InputError:
    return InputError(
        f"--workdir: {name} is in use by another run ({owner}); wait for it, or give another "
        "workdir"
    )


def _persistently(act: Callable[[], None], what: str) -> str | None:
    """Does it, and again after a while where it fails, which is said; why it failed at last."""
    for pause in (*PAUSES, None):
        try:
            act()
            break
        except Exception as error:  # Each file system has its own.
            reason = f"{type(error).__name__}: {error}"
            if pause is None:
                return reason
            print(f"{what}: {reason}; again in {pause:.0f} s", flush=True)
            time.sleep(pause)
    return None


def is_remote(text: str) -> bool:
    """True for an address with a scheme, whether it is one that can be used or not."""
    return "://" in text


@contextlib.contextmanager
def opened_workdir(text: str) -> Iterator[Workdir]:
    """The folder of a run; that of an address holds what a resumed run goes on with.

    It is uploaded for the last time at the end, however the block ends. Where that fails the folder
    is kept, and named in Interrupted or in a note on what the block ended with.
    """
    if not is_remote(text):
        yield Workdir(Path(text).expanduser())
        return
    folder = Path(tempfile.mkdtemp(prefix="proteus-workdir-"))
    workdir = Workdir(folder, text.rstrip("/"))
    try:
        workdir.download()
    except Interrupted:
        shutil.rmtree(folder)
        raise
    try:
        yield workdir
    except BaseException as error:
        left = _left(workdir)
        if left is not None:
            error.add_note(left)
        raise
    left = _left(workdir)
    if left is not None:
        raise Interrupted(left)


def _left(workdir: Workdir) -> str | None:
    """Uploads for the last time and removes the folder; in words, where it has to stay."""
    with waiting(f"uploading to {workdir.remote}"):
        reason = workdir.upload()
    if reason is not None:
        return f"the last files were not uploaded, and stay in {workdir.local}: {reason}"
    shutil.rmtree(workdir.local)
    return None
