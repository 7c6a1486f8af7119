"""What the loop keeps an eye on: its time, who waits for whom, requests to stop, steps that are not
finite, and images that cannot be read.
"""

import collections
import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from proteus_jax.data.loader import Batch
from proteus_jax.errors import Diverged, InputError, Interrupted
from proteus_jax.runtime.process import REQUESTS

# So many images that cannot be read are named.
NAMED = 20
# So many images of a step are named.
SHOWN = 8
# A run is stopped when the share of them is too large by so many standard deviations.
CERTAIN = 3.0
# A wait for images of more than this share of the time is worth a word.
WORTH_A_WORD = 0.1


class Clock:
    """Time of an interval between two logged steps, and the share of it that the loop waited for
    images.
    """

    def __init__(self):
        self._start, self._waited, self._stood, self._step = time.monotonic(), 0.0, 0.0, None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is time without images."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Time in here belongs to no interval."""
        start = time.monotonic()
        yield
        self._stood += time.monotonic() - start

    def lap(self, step: int, batch: int) -> dict[str, float]:
        """images_per_second and data_wait since the last lap."""
        now = time.monotonic()
        elapsed = max(now - self._start - self._stood, 1e-9)
        steps = 1 if self._step is None else step - self._step
        result = {
            "images_per_second": steps * batch / elapsed,
            "data_wait": min(self._waited / elapsed, 1.0),
        }
        self._start, self._waited, self._stood, self._step = now, 0.0, 0.0, step
        return result


class Profiling:
    """A trace of a few steps, once those that compile and fill the queues are past."""

    FIRST, LAST = 5, 10

    def __init__(self, directory: Path, *, on: bool):
        self._directory, self._on, self._running = directory, on, False
        self.missed = on

    def after(self, count: int, values: Any) -> None:
        """Looks at the number of steps so far, the last one's results still on the device."""
        if self._on and count == self.FIRST:
            jax.block_until_ready(values)
            jax.profiler.start_trace(self._directory)
            self._running, self.missed = True, False
        elif self._running and count == self.LAST:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Writes the trace where one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class WaitNotice:
    """One line, once, where images come too slowly; not of the first steps, which compile."""

    def __init__(self, makers: str, first_step: int, say: Callable[[str], None]):
        self._makers, self._first, self._say, self._said = makers, first_step, say, False

    def lap(self, step: int, data_wait: float, images_per_second: float) -> None:
        """Looks at a logged interval that ended with `step`."""
        if self._said or step < self._first or data_wait <= WORTH_A_WORD:
            return
        self._said = True
        self._say(
            f"the device waits {data_wait:.0%} of the time: this host makes "
            f"{images_per_second:.0f} images a second with {self._makers}; docs/data.md says what "
            "helps"
        )


class Noted(NamedTuple):
    """A step that was made, its metrics on the device."""

    step: int
    metrics: Mapping[str, jax.Array]
    batch: Batch


class SkippedUpdates:
    """Names the steps whose updates were skipped on the device, as a loss or gradient was not
    finite, with their images; stops a run after `limit` of them in a row.

    Looked at a few steps late, so that the device never waits to be asked.
    """

    LATE = 4

    def __init__(self, name: Callable[[int], str], *, limit: int, say: Callable[[str], None]):
        self._name, self._limit, self._say = name, limit, say
        self._pending: collections.deque[Noted] = collections.deque()
        self._in_a_row = 0
        # The newest step that was looked at.
        self.last: Noted | None = None

    def note(self, step: int, metrics: Mapping[str, jax.Array], batch: Batch) -> None:
        """Takes a step's metrics, still on the device, and its images.

        Diverged where the count of an earlier step reached the limit and no good step came since.
        """
        self._pending.append(Noted(step, metrics, batch))
        if len(self._pending) > self.LATE:
            self._look()
        if self._in_a_row >= self._limit:
            self.settle()

    def settle(self) -> None:
        """Looks at all steps until now, as before a checkpoint; Diverged as in `note`."""
        while self._pending:
            self._look()
        if self._in_a_row >= self._limit:
            step = 0 if self.last is None else self.last.step
            raise Diverged(
                f"at step {step} a loss or gradient is not finite, as in the steps before, "
                f"{self._in_a_row} in a row: training diverged. No such update was made"
            )

    def _look(self) -> None:
        self.last = self._pending.popleft()
        self._in_a_row = int(jax.device_get(self.last.metrics["skipped_in_a_row"]))
        if self._in_a_row:
            numbers = dict.fromkeys(self.last.batch.numbers.tolist())
            names = [self._name(index) for index in numbers]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            self._say(
                f"step {self.last.step}: a loss or gradient is not finite; its update is skipped "
                f"({self._in_a_row} in a row). Its images here: {', '.join(names[:SHOWN])}{more}"
            )


class UnreadableImages:
    """Counts them, names each once, and stops a run that meets too many: `limit` is a share of the
    views.
    """

    def __init__(
        self,
        name: Callable[[int], str],
        *,
        limit: float,
        repeats: int,
        say: Callable[[str], None],
    ):
        self._name, self._limit, self._repeats, self._say = name, limit, repeats, say
        self._drawn = self._replaced = 0
        self.met: set[int] = set()

    def note(self, indices: np.ndarray) -> None:
        """Takes the account of one batch: the index of an image that could not be read, or -1, for
        each view.

        InputError where they are too many by now, beyond what chance explains.
        """
        lost = indices[indices >= 0].tolist()
        self._drawn += len(indices)
        self._replaced += len(lost)
        for index in sorted(set(lost) - self.met):
            self.met.add(index)
            if len(self.met) <= NAMED:
                self._say(f"{self._name(index)} cannot be read; another image takes its place")
        # Views of one image fail together.
        chance = CERTAIN * (self._replaced * self._repeats) ** 0.5
        if lost and self._replaced - chance > self._limit * self._drawn:
            raise InputError(
                f"--config.data.unreadable: {self._replaced} of {self._drawn} images could not be "
                f"read, the last one {self._name(lost[-1])}; expected at most {self._limit:.2%}. "
                "--doctor lists them all"
            )


class StopRequest:
    """A signal of REQUESTS, where not ignored (as by nohup), asks for an end after this step; a
    second one, later than REPEATED seconds, does not wait for it, and nor does this process longer
    than `deadline` seconds: it ends with 75. So it does at once until `waits` is set, as before the
    first step, which may compile for minutes: there is nothing to save.

    A thread hears of them. Python's own handlers wait for the main thread, which may be compiling,
    or waiting for a host that is lost.
    """

    # Beside the numbers of signals, to the thread.
    GOODBYE = b"\0"
    # In seconds: a signal to a group comes a second time from a script that passes it on.
    REPEATED = 0.5
    # Seconds until it ends whether or not what it says is read.
    UNREAD = 2.0

    def __init__(
        self,
        deadline: float,
        say: Callable[[str], None],
        before_end: Callable[[], None] = lambda: None,
    ):
        self.made = self.waits = False
        self._deadline, self._say, self._before_end = deadline, say, before_end

    def __enter__(self) -> "StopRequest":
        self._ears, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        # The number of each signal is written there the moment that it comes.
        self._wakeup_before = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, lambda *_: None)
            for number in REQUESTS
            if signal.getsignal(number) != signal.SIG_IGN
        }
        self._thread = threading.Thread(target=self._listen, daemon=True, name="signals")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._mouth, self.GOODBYE)
        self._thread.join()
        os.close(self._mouth)
        os.close(self._ears)

    def _listen(self) -> None:
        if self._hears_one(None):
            self.made, heard = True, time.monotonic()
            if not self.waits:
                self._end("interrupted before a step was made; the same command goes on")
            # Not here: where nobody reads, this thread must not wait.
            words = "asked to stop: the run saves after this step; once more ends it at once"
            threading.Thread(target=self._say, args=(words,), daemon=True).start()
            again = self._hears_one(heard + self._deadline)
            while again and time.monotonic() < heard + self.REPEATED:
                again = self._hears_one(heard + self._deadline)
            if again is not False:
                reason = "a second request to stop"
                if not again:
                    reason = (
                        f"not saved within {self._deadline:g} s of the request to stop "
                        "(--config.stop_within)"
                    )
                self._end(f"{reason}; the same command goes on from the last checkpoint")

    def _hears_one(self, until: float | None) -> bool | None:
        """True for a request; False for goodbye; None where neither came in time."""
        poll = select.poll()
        poll.register(self._ears, select.POLLIN)
        while True:
            left = None if until is None else max(until - time.monotonic(), 0.0) * 1000
            if not poll.poll(left):
                return None
            heard = os.read(self._ears, 1)
            if heard == self.GOODBYE:
                return False
            # Other signals may have handlers of theirs.
            if heard[0] in REQUESTS:
                return True

    def _end(self, words: str) -> None:
        code = Interrupted.EXIT_CODE
        timer = threading.Timer(self.UNREAD, os._exit, [code])
        timer.daemon = True
        timer.start()
        try:
            self._say(words)
            self._before_end()
        finally:
            os._exit(code)
