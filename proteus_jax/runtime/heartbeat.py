"""A thread beside the loop: it writes down that the run lives, and says so when a step is late."""

import collections
import contextlib
import datetime
import faulthandler
import json
import os
import resource
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from proteus_jax.runtime.filesystem import write_atomically

FILE = "heartbeat.json"
# Seconds between two beats, and between two lines in the log of what the process holds.
EVERY, LOGGED_EVERY = 10.0, 60.0
# Seconds between two copies of it that go to an address, and without a new one until a run is taken
# for dead.
PUBLISHED_EVERY, DEAD_AFTER = 20.0, 60.0
# A step is late after so many times the median of the last ones, and not before so many seconds.
LATE, PATIENCE = 10.0, 10.0
# What is no step, or one of the first, is worth a word after so many.
STILL = 600.0
REMEMBERED, ENOUGH = 100, 5
# States after which nothing more comes.
ENDED = ("stopped", "done", "failed")


class Heartbeat:
    """Knows how far the loop is. heartbeat.json (heartbeat.1.json on host 1) has `step`, `total`,
    `saved`, `time`, `host`, `process`, `step_seconds` (the median), `since_step` (seconds since the
    last one ended), `memory_bytes`, `descriptors`, `threads`, and `state`: starting, training,
    measuring, stopping, stopped, done or failed.

    Where a step is late the stacks of all threads go to the log, and `say` hears of it; with
    several hosts, `steps` says how far each is, and those that are behind are named. `stopping`
    says whether the run has been asked to; `publish` is given the file now and then, where it is to
    be seen from elsewhere.
    """

    def __init__(
        self,
        workdir: Path,
        total: int,
        *,
        host: int = 0,
        say: Callable[[str], None],
        log: Callable[[str], None],
        steps: Callable[[int], Mapping[str, int]] = lambda step: {},
        stopping: Callable[[], bool] = lambda: False,
        publish: Callable[[Path], None] | None = None,
    ):
        self._path = workdir / (f"heartbeat.{host}.json" if host else FILE)
        self._say, self._log, self._steps = say, log, steps
        self._stopping, self._publish = stopping, publish
        self._total, self._name = total, socket.gethostname()
        self._lock = threading.Lock()
        self._step: int | None = None
        self._saved: int | None = None
        self._state = self._shown = "starting"
        self._last = time.monotonic()
        self._times: collections.deque[float] = collections.deque(maxlen=REMEMBERED)
        self._told = False
        self._beaten = self._logged = self._published = -float("inf")
        self._end = threading.Event()
        self._beat()
        # Apart: a disk that takes its time must not keep the other from saying so.
        self._watching = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._writing = threading.Thread(target=self._write, daemon=True, name="heartbeat")
        self._watching.start()
        self._writing.start()

    def step(self, step: int) -> None:
        """The loop has ended a step."""
        now = time.monotonic()
        with self._lock:
            # The first one compiles.
            if self._state == "training":
                self._times.append(now - self._last)
            self._step, self._last, self._state, self._told = step, now, "training", False

    def resumed(self, step: int) -> None:
        """The loop goes on from a checkpoint."""
        self._step = self._saved = step

    def saved(self, step: int) -> None:
        """A checkpoint is complete."""
        self._saved = step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses the watch over steps: the block is no step, and may take its time."""
        with self._lock:
            before, self._state = self._state, "measuring"
            self._last, self._told = time.monotonic(), False
        try:
            yield
        finally:
            with self._lock:
                self._state, self._last, self._told = before, time.monotonic(), False

    def close(self, state: str) -> None:
        """The last beat."""
        self._end.set()
        self._watching.join()
        self._writing.join(EVERY)
        self._state = state
        # Where the disk stands still the process need not.
        if not self._writing.is_alive():
            self._beat()

    def _watch(self) -> None:
        while not self._end.wait(min(EVERY, 1.0)):
            # Other hosts hear of it.
            self._steps(self._step or 0)
            self._look(time.monotonic())

    def _write(self) -> None:
        while not self._end.wait(min(EVERY, 1.0)):
            now = time.monotonic()
            if now - self._beaten >= EVERY or self._shown != self._state_now():
                self._beat()
            if self._publish and now - self._published >= PUBLISHED_EVERY:
                self._published = now
                self._publish(self._path)

    def _look(self, now: float) -> None:
        """Warns once where the step that is being made is late, or where a pause takes too long."""
        with self._lock:
            since, state, step = now - self._last, self._state, self._step or 0
            known = state == "training" and len(self._times) >= ENOUGH
            median = statistics.median(self._times) if known else 0.0
            if self._told or since < (max(LATE * median, PATIENCE) if known else STILL):
                return
            self._told = True
        late = _behind(self._steps(step))
        what = f"{state}, at step {step}, takes {since:.0f} s so far"
        if known:
            what = f"step {step + 1} takes {since:.0f} s so far, others {median:.2g} s"
        self._say(f"{what}; the stacks of all threads of {self._name} are in the log{late}")
        self._log(f"{what} on {self._name}; the stacks of all threads:")
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _state_now(self) -> str:
        return "stopping" if self._stopping() and self._state not in ENDED else self._state

    def _beat(self) -> None:
        """Writes the file; a full disk is no reason to stop."""
        now, held = time.monotonic(), held_by_this_process()
        self._beaten, self._shown = now, self._state_now()
        with self._lock:
            beat: dict[str, Any] = {
                "step": self._step,
                "total": self._total,
                "saved": self._saved,
                "state": self._shown,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "host": self._name,
                "process": os.getpid(),
                "step_seconds": statistics.median(self._times) if self._times else None,
                "since_step": round(now - self._last, 1),
                **held,
            }
        with contextlib.suppress(OSError):
            write_atomically(self._path, json.dumps(beat, indent=2) + "\n")
        if now - self._logged >= LOGGED_EVERY:
            self._logged = now
            self._log(
                f"{beat['time']} step {self._step}: {held['memory_bytes'] / 2**20:.0f} MB resident,"
                f" {held['descriptors']} descriptors, {held['threads']} threads"
            )


def living(read: Callable[[], str], say: Callable[[str], None]) -> str | None:
    """Returns who writes a heartbeat, where a new one comes within DEAD_AFTER seconds; None, at
    once, where it is at its end or `read` finds none. One that is stopping is waited for.
    """
    text = read()
    if not writer_of(text):
        return None
    say(f"{writer_of(text)} may still be running there: waiting for a sign of life")
    end = time.monotonic() + DEAD_AFTER
    while time.monotonic() < end:
        time.sleep(min(1.0, DEAD_AFTER / 10))
        now = read()
        if now == text:
            continue
        if not is_stopping(now):
            return writer_of(now)
        text, end = now, time.monotonic() + DEAD_AFTER
    return None


def writer_of(text: str) -> str | None:
    """The writer of a heartbeat that has not come to its end."""
    beat = _read(text)
    if beat.get("state", ENDED[0]) in ENDED:
        return None
    return f"process {beat.get('process')} on {beat.get('host')}"


def is_stopping(text: str) -> bool:
    """Returns True where the run of a heartbeat has been asked to end, and has not ended."""
    return _read(text).get("state") == "stopping"


def _read(text: str) -> dict[str, Any]:
    try:
        beat = json.loads(text)
    except ValueError:
        return {}
    return beat if isinstance(beat, dict) else {}


def held_by_this_process() -> dict[str, int]:
    """memory_bytes (resident; the largest so far where the system does not say), descriptors (-1
    where it does not say, as where there are too many) and threads.
    """
    return {
        "memory_bytes": _resident(),
        "descriptors": _descriptors(),
        "threads": threading.active_count(),
    }


def _descriptors() -> int:
    for place in map(Path, ("/proc/self/fd", "/dev/fd")):
        # Where there are too many, not even this can be opened.
        with contextlib.suppress(OSError):
            return sum(1 for _ in place.iterdir())
    return -1


def _resident() -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _behind(steps: Mapping[str, int]) -> str:
    """The hosts that are behind the others."""
    if len(set(steps.values())) < 2:
        return ""
    least, most = min(steps.values()), max(steps.values())
    names = [name for name, step in steps.items() if step == least]
    return f"; {', '.join(names)} has come to step {least}, others to step {most}"
