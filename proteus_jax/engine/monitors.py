"""Monitors of the loop: its time, a slow input, steps that are not finite, and images that cannot
be read.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from proteus_jax.data.loader import HostBatch
from proteus_jax.errors import Diverged, InputError

# So many images that cannot be read are named.
NAMED = 20
# So many images of a step are named.
SHOWN = 8
# A run is stopped when the share of them is too large by so many standard deviations.
CERTAIN = 3.0
# A wait for images of more than this share of the time is worth a word.
WORTH_A_WORD = 0.1


class StepTimer:
    """Time of an interval between two logged steps, and the share of it that the loop waited for
    images.
    """

    def __init__(self, step: int = 0):
        """Begins after a step."""
        self._start, self._waited, self._stood, self._step = time.monotonic(), 0.0, 0.0, step
        self._before: dict[str, float] = {}
        self._rested = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is time without images."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here belongs to no interval. The device has nothing left to do after it, so that
        the next step is only handed over by when its row is due: that interval is the one before.
        """
        start = time.monotonic()
        yield
        self._stood += time.monotonic() - start
        self._rested = True

    def lap(self, step: int, batch: int) -> dict[str, float]:
        """images_per_second and data_wait since the last lap."""
        now = time.monotonic()
        elapsed = max(now - self._start - self._stood, 1e-9)
        result = {
            "images_per_second": (step - self._step) * batch / elapsed,
            "data_wait": min(self._waited / elapsed, 1.0),
        }
        if self._rested and step - self._step == 1 and self._before:
            result = self._before
        self._start, self._waited, self._stood, self._step = now, 0.0, 0.0, step
        self._before, self._rested = result, False
        return dict(result)


class InputBoundWarning:
    """One line, once, where images come too slowly; not of the first steps, which compile."""

    def __init__(self, advice: str, first_step: int, say: Callable[[str], None]):
        self._advice, self._first, self._say, self._said = advice, first_step, say, False

    def lap(self, step: int, data_wait: float, images_per_second: float) -> None:
        """Looks at a logged interval that ended with `step`."""
        if self._said or step < self._first or data_wait <= WORTH_A_WORD:
            return
        self._said = True
        self._say(
            f"the device waits {data_wait:.0%} of the time: this host makes "
            f"{images_per_second:.0f} images a second with {self._advice}; docs/data.md says what "
            "helps"
        )


class StepRecord(NamedTuple):
    """A step that was made, its metrics on the device."""

    step: int
    metrics: Mapping[str, jax.Array]
    batch: HostBatch


class NonFiniteMonitor:
    """Names the steps whose updates were skipped on the device, as a loss or gradient was not
    finite, with their images; stops a run after `limit` of them in a row.

    Looked at a few steps late, so that the device never waits to be asked.
    """

    LATE = 4

    def __init__(self, name: Callable[[int], str], *, limit: int, say: Callable[[str], None]):
        self._name, self._limit, self._say = name, limit, say
        self._pending: collections.deque[StepRecord] = collections.deque()
        self._in_a_row = 0
        # The newest step that was looked at.
        self.last: StepRecord | None = None

    def note(self, step: int, metrics: Mapping[str, jax.Array], batch: HostBatch) -> None:
        """Takes a step's metrics, still on the device, and its images.

        Diverged where the count of an earlier step reached the limit and no good step came since.
        """
        self._pending.append(StepRecord(step, metrics, batch))
        if len(self._pending) > self.LATE:
            self._look()
        if self._in_a_row >= self._limit:
            self.flush()

    def flush(self) -> None:
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


class CorruptImageMonitor:
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
                f"--config.data.max_corrupt_fraction: {self._replaced} of {self._drawn} images "
                f"could not be read, the last one {self._name(lost[-1])}; expected at most "
                f"{self._limit:.2%}. --doctor lists them all"
            )
