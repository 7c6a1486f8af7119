"""The loop that trains anything: batches through a compiled step, with hooks around it.

The order of an iteration is a contract:

1. A batch is taken, placed on the devices, and stepped on.
2. Every hook hears of the step, in order (`after_step`). One that wants the loop to end says so to
   the stop signal; nothing waits for the device here.
3. All hosts agree whether this step is the last.
4. Every hook does what is due, in order (`at_step_end`): first rows and evaluations, then the
   checkpoint. So a checkpoint of step k holds all that came of the first k steps, and its rows are
   on the disk before it is.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from proteus_jax.engine.monitors import StepTimer
from proteus_jax.errors import InputError, Interrupted
from proteus_jax.runtime import collectives
from proteus_jax.runtime.console import waiting

# (state, *inputs) -> (state, metrics), metrics being arrays by name.
StepFunction = Callable[..., tuple[Any, Mapping[str, jax.Array]]]


class StepEnd(NamedTuple):
    """A step that all hosts have made: its number, the state after it, its metrics on the device,
    and whether the loop ends with it.
    """

    step: int
    state: Any
    metrics: Mapping[str, jax.Array]
    last: bool


class Hook:
    """Something that a loop does beside its steps; the module says when."""

    def after_step(self, step: int, metrics: Mapping[str, jax.Array], batch: Any) -> None:
        """Hears of a step on this host."""

    def at_step_end(self, end: StepEnd) -> None:
        """Does what is due after a step, on all hosts alike."""


class StopSignal:
    """Tells whether a loop is to end after its current step: because somebody asked for it, or
    because something failed on this host.
    """

    def __init__(self, stop_requested: Callable[[], bool] = lambda: False):
        self._stop_requested = stop_requested
        # The first failure; the loop ends in order, and then with it.
        self.failure: InputError | Interrupted | None = None

    def fail(self, error: InputError | Interrupted | None) -> None:
        """Ends the loop for an error, where there is one and it is the first."""
        self.failure = self.failure or error

    @property
    def requested(self) -> bool:
        """True where the loop is to end."""
        return self.failure is not None or self._stop_requested()


class Loop:
    """Steps until the last, or until one host wants to stop.

    `place` turns a batch of this host into the inputs of `train_step`. `state` and `step` are the
    newest.
    """

    def __init__(
        self,
        train_step: StepFunction,
        place: Callable[[Any], tuple[Any, ...]],
        hooks: Sequence[Hook],
        *,
        mesh: Mesh,
        state: Any,
        step: int,
        total_steps: int,
        stop: StopSignal,
        timer: StepTimer,
        progress: Callable[[str], None],
    ):
        self._train_step, self._place, self._hooks = train_step, place, hooks
        self.state, self.step, self._total = state, step, total_steps
        self._stop, self._timer, self._progress = stop, timer, progress
        self._agreement = collectives.AnyProcess(mesh)

    def run(self, batches: Generator[Any]) -> None:
        """Makes all steps; `batches` begin with that of the first one, and are closed."""
        compiling = f"step {self.step}/{self._total}: compiling"
        self._progress(compiling)
        first, stopping = True, False
        with contextlib.closing(batches), jax.transfer_guard("disallow"):
            while self.step < self._total and not stopping:
                with self._timer.waiting():
                    batch = next(batches)
                inputs = self._place(batch)
                shown = waiting(compiling, self._progress) if first else contextlib.nullcontext()
                with shown:
                    self.state, metrics = self._train_step(self.state, *inputs)
                self.step, first = self.step + 1, False
                for hook in self._hooks:
                    hook.after_step(self.step, metrics, batch)
                stopping = self._agreement.any(self._stop.requested)
                last = stopping or self.step == self._total
                for hook in self._hooks:
                    hook.at_step_end(StepEnd(self.step, self.state, metrics, last))
