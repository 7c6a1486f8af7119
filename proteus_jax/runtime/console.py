"""The terminal: this project's own lines, a live line where there is a terminal, and no library's
chatter.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TextIO

# Without a terminal a line of progress comes this often, in seconds.
PLAIN_INTERVAL = 8.0
LIVE_INTERVAL = 0.2
# So many bytes of what a library said are shown where it ends the process.
LAST_WORDS = 4000
# What is waited for is said again after so many seconds.
WAITING_INTERVAL = 2.0


class Console:
    """Prints to standard output. Standard error, where libraries write, goes to a file from the
    start.

    A library in C++ may end the process before there is a log, as XLA does at a flag that it does
    not know. With `watched` a child process sees that, and says the library's last words.
    """

    def __init__(self, *, watched: bool = False):
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Names of files may hold bytes that are no Unicode.
            sys.stdout.reconfigure(errors="backslashreplace")
        # Of several hosts only the first one speaks; errors are said by each.
        self.quiet = False
        self._live = sys.stdout.isatty()
        self._shown = False
        self._last = -float("inf")
        sys.stderr.flush()
        self._stderr = os.dup(2)
        self._log = _temporary()
        self._watcher = _watch(self._log, self._stderr) if watched else None
        os.dup2(self._log.fileno(), 2)

    def dismiss_watcher(self) -> None:
        """From here on whatever ends the process is said by itself, or stands in the log."""
        if self._watcher is not None:
            with contextlib.suppress(OSError):
                os.write(self._watcher, b".")
            os.close(self._watcher)
            self._watcher = None

    def keep_log(self, path: Path) -> None:
        """From now on standard error is appended to `path`, after what came so far."""
        sys.stderr.flush()
        with open(path, "ab", buffering=0) as file:
            self._log.seek(0)
            shutil.copyfileobj(self._log, file)
            os.dup2(file.fileno(), 2)
        self._log.close()
        self.dismiss_watcher()

    def line(self, text: str = "") -> None:
        """A line that stays."""
        if self.quiet:
            self.log(text)
            return
        self._clear()
        _print(text + "\n", sys.stdout)

    def log(self, text: str) -> None:
        """Text for the log file alone."""
        _print(text + "\n", sys.stderr)

    def error(self, text: str) -> None:
        """A line on the real standard error."""
        self._clear()
        self.dismiss_watcher()
        # Nobody may read it any more: what is to follow, as an end of the process, still does.
        with contextlib.suppress(OSError):
            os.write(self._stderr, (text + "\n").encode(errors="backslashreplace"))

    def progress(self, text: str, *, last: bool = False) -> None:
        """The state of a long work: one line that renews itself, or without a terminal a line now
        and then. That all is done ("9 of 9") is always said.
        """
        now, last = time.monotonic(), last or _ALL.search(text) is not None
        if self.quiet:
            return
        if not last and now - self._last < (LIVE_INTERVAL if self._live else PLAIN_INTERVAL):
            return
        self._last = now
        if not self._live:
            _print(text + "\n", sys.stdout)
            return
        width = shutil.get_terminal_size().columns - 1
        _print("\r\x1b[2K" + text[:width], sys.stdout)
        self._shown = True
        if last:
            _print("\n", sys.stdout)
            self._shown = False

    def _clear(self) -> None:
        if self._shown:
            _print("\r\x1b[2K", sys.stdout)
            self._shown = False


_ALL = re.compile(r"(?<!\d)(\d+) of \1(?!\d)")


def _watch(log: IO[bytes], stderr: int) -> int:
    """Starts the child that waits for this process to end; returns what to write to for it to end
    in silence.
    """
    reader, writer = os.pipe()
    if os.fork():
        os.close(reader)
        return writer
    try:
        # Signals to the group are the parent's to answer.
        os.setsid()
        os.close(writer)
        if not os.read(reader, 1):
            size = os.fstat(log.fileno()).st_size
            words = os.pread(log.fileno(), LAST_WORDS, max(0, size - LAST_WORDS))
            os.write(stderr, words)
    finally:
        os._exit(0)


def _temporary() -> IO[bytes]:
    """A file until there is a log; where nothing can be written what comes before it is lost."""
    try:
        return tempfile.TemporaryFile("w+b")
    except OSError:
        return open(os.devnull, "w+b")


def _print(text: str, stream: TextIO) -> None:
    """A run goes on where nobody reads any more, or a full disk takes no more of its output."""
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()


class PlainProgress:
    """Progress for what has no console: a line now and then on standard output."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        """Prints a line where the last one is old enough."""
        if time.monotonic() - self._last >= PLAIN_INTERVAL:
            self._last = time.monotonic()
            _print(text + "\n", sys.stdout)


@contextlib.contextmanager
def waiting(
    what: str,
    progress: Callable[[str], None] | None = None,
    done: Callable[[], str] = lambda: "",
) -> Iterator[None]:
    """Says every few seconds what is waited for, how far it is, and for how long: nothing that may
    take minutes is silent, even while a library does not return.
    """
    progress = PlainProgress() if progress is None else progress
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(WAITING_INTERVAL):
            parts = [part for part in (done(), duration(time.monotonic() - began)) if part]
            progress(f"{what}: {', '.join(parts)}")

    thread = threading.Thread(target=tell, daemon=True, name="waiting")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    whole = max(int(seconds), 0)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
