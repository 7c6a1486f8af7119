"""The loop's contract, with a step of a few numbers."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proteus_jax.data.workers import WorkerLost, WorkerPool
from proteus_jax.engine.batches import surviving_batches
from proteus_jax.engine.loop import Hook, Loop, StepEnd, StopSignal
from proteus_jax.engine.monitors import StepTimer
from proteus_jax.errors import InputError, Interrupted
from proteus_jax.runtime import sharding


@jax.jit
def add(state: jax.Array, value: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return state + value, {"sum": state + value}


class Listening(Hook):
    """Writes down what it hears, and stops the loop after a step."""

    def __init__(self, name: str, heard: list, stop: StopSignal, last: int):
        self._name, self._heard, self._stop, self._last = name, heard, stop, last

    def after_step(self, step: int, metrics: Mapping[str, jax.Array], batch: Any) -> None:
        self._heard.append((self._name, "step", step, float(metrics["sum"]), batch))
        if step == self._last:
            self._stop.fail(InputError("enough"))
            self._stop.fail(Interrupted("later"))

    def at_step_end(self, end: StepEnd) -> None:
        self._heard.append((self._name, "end", end.step, float(end.state), end.last))


def looped(last: int, heard: list) -> tuple[Loop, StopSignal]:
    stop = StopSignal()
    loop = Loop(
        add,
        lambda batch: (jax.device_put(np.float32(batch)),),
        [Listening("one", heard, stop, last), Listening("two", heard, stop, -1)],
        mesh=sharding.make_mesh(),
        state=jnp.float32(10),
        step=3,
        total_steps=6,
        stop=stop,
        timer=StepTimer(),
        progress=lambda _: None,
    )
    return loop, stop


def numbers() -> Generator[float]:
    yield from (1.0, 2.0, 3.0, 4.0)


def test_hooks_hear_in_order_and_act_when_all_hosts_agree() -> None:
    heard: list = []
    loop, stop = looped(-1, heard)
    loop.run(numbers())
    assert (loop.step, float(loop.state), stop.failure) == (6, 16.0, None)
    assert heard[:4] == [
        ("one", "step", 4, 11.0, 1.0),
        ("two", "step", 4, 11.0, 1.0),
        ("one", "end", 4, 11.0, False),
        ("two", "end", 4, 11.0, False),
    ]
    assert heard[-1] == ("two", "end", 6, 16.0, True)


def test_a_failure_ends_the_loop_in_order() -> None:
    """With the step that it came in, of which all hooks hear; the first failure is kept."""
    heard: list = []
    loop, stop = looped(5, heard)
    batches = numbers()
    loop.run(batches)
    assert loop.step == 5
    assert [entry[:3] for entry in heard[-2:]] == [("one", "end", 5), ("two", "end", 5)]
    assert heard[-1][-1] is True
    assert isinstance(stop.failure, InputError)
    # Closed: nothing is made ahead any more.
    with pytest.raises(StopIteration):
        next(batches)


def test_batches_go_on_where_a_worker_is_lost() -> None:
    """From the batch that it owed, by threads; the loss is told of once."""
    made: list[tuple[WorkerPool, int]] = []
    lost: list[WorkerLost] = []

    def make(pool: WorkerPool, step: int) -> Generator[Any]:
        made.append((pool, step))
        yield f"batch {step}"
        if pool.workers:
            raise WorkerLost("gone")
        yield f"batch {step + 1}"

    with contextlib.closing(surviving_batches(make, WorkerPool(2, 0), 7, lost.append)) as batches:
        assert list(batches) == ["batch 7", "batch 8", "batch 9"]
    assert [step for _, step in made] == [7, 8]
    assert (made[1][0].workers, len(lost)) == (0, 1)
