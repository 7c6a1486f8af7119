"""Hooks of a loop that several kinds of training share."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from proteus_jax.engine.checkpointing import CheckpointManager
from proteus_jax.engine.loop import Hook, StepEnd, StopSignal
from proteus_jax.engine.metrics_logger import MetricsLogger, Written
from proteus_jax.engine.monitors import CorruptImageMonitor, NonFiniteMonitor, StepTimer
from proteus_jax.errors import InputError
from proteus_jax.runtime.heartbeat import Heartbeat
from proteus_jax.runtime.preemption import PreemptionHandler
from proteus_jax.runtime.profiler import Profiler


class Alive(Hook):
    """Tells the heartbeat of each step; from the first one on a request to stop waits for one."""

    def __init__(self, heartbeat: Heartbeat, handler: PreemptionHandler):
        self._heartbeat, self._handler = heartbeat, handler

    def after_step(self, step: int, metrics: Mapping[str, jax.Array], batch: Any) -> None:
        """Hears of a step."""
        self._handler.waits = True
        self._heartbeat.step(step)


class Monitors(Hook):
    """Watches for images that cannot be read and for updates that are not finite, and ends a run
    that has too many.
    """

    def __init__(self, corrupt: CorruptImageMonitor, finite: NonFiniteMonitor, stop: StopSignal):
        self._corrupt, self._finite, self._stop = corrupt, finite, stop

    def after_step(self, step: int, metrics: Mapping[str, jax.Array], batch: Any) -> None:
        """Takes the account of a step; Diverged where there is no going on."""
        try:
            self._corrupt.note(batch.unreadable)
        except InputError as error:
            # As a request to stop: all hosts save the same step, then this one says why.
            self._stop.fail(error)
        self._finite.note(step, metrics, batch)


class Profiling(Hook):
    """Traces a few steps."""

    def __init__(self, profiler: Profiler, heartbeat: Heartbeat, first: int):
        self._profiler, self._heartbeat, self._first = profiler, heartbeat, first

    def after_step(self, step: int, metrics: Mapping[str, jax.Array], batch: Any) -> None:
        """Begins or ends the trace where it is time."""
        with self._heartbeat.paused():
            self._profiler.after(step - self._first, metrics)


# Each of so many steps at the end has a row.
LAST_STEPS = 10


class Logging(Hook):
    """Rows of metrics, and the evaluations that go into them.

    `measure` evaluates a state, `written` hears of each row. A row is written when the next is due:
    its numbers are ready then, and the device is busy already.
    """

    def __init__(
        self,
        logger: MetricsLogger,
        timer: StepTimer,
        heartbeat: Heartbeat,
        *,
        batch: int,
        log_every: int,
        eval_every: int,
        total_steps: int,
        measure: Callable[[int, Any], dict[str, float]],
        written: Callable[[Written], None],
    ):
        self._logger, self._timer, self._heartbeat = logger, timer, heartbeat
        self._batch, self._log_every, self._eval_every = batch, log_every, eval_every
        self._total, self._measure, self._written = total_steps, measure, written

    def at_step_end(self, end: StepEnd) -> None:
        """Keeps a row where one is due: of the first step and of the last ones as well, which the
        summary is about.
        """
        evaluating = end.step % self._eval_every == 0 or end.step == self._total
        summed_up = end.step == 1 or end.step > self._total - LAST_STEPS
        if not evaluating and not summed_up and end.step % self._log_every:
            return
        self.write()
        measured = self._logger.rates(self._timer.lap(end.step, self._batch))
        if evaluating:
            with self._timer.paused(), self._heartbeat.paused(), jax.transfer_guard("allow"):
                measured |= self._measure(end.step, end.state)
        self._logger.hold(end.step, end.metrics, measured, evaluated=evaluating)

    def write(self) -> None:
        """Writes the row that waits, and tells of it."""
        row = self._logger.write()
        if row is not None:
            self._written(row)


class Checkpointing(Hook):
    """A checkpoint every so many steps and at the last; `before` is what is due before each, and
    a save takes its time in `paused`.

    Ends a run whose saves keep failing.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        paused: Callable[[], AbstractContextManager[Any]],
        stop: StopSignal,
        *,
        every: int,
        items_of: Callable[[Any], Mapping[str, Any]],
        facts: dict[str, Any],
        before: Sequence[Callable[[], None]],
        rows_written: Callable[[], OSError | None],
    ):
        self._manager, self._paused, self._stop = manager, paused, stop
        self._every, self._items_of, self._facts = every, items_of, facts
        self._before, self._rows_written = before, rows_written

    def after_step(self, step: int, metrics: Mapping[str, jax.Array], batch: Any) -> None:
        """Asks for an end where too many saves failed."""
        self._stop.fail(self._manager.reason_to_stop())

    def at_step_end(self, end: StepEnd) -> None:
        """Saves where it is time."""
        if not end.last and end.step % self._every:
            return
        for due in self._before:
            due()
        with self._paused(), jax.transfer_guard("allow"):
            items = self._items_of(end.state)
            self._manager.save(end.step, items, self._facts, self._rows_written)
