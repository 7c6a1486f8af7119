"""Batches that go on where a worker process is lost."""

import contextlib
from collections.abc import Callable, Generator

from proteus_jax.data.loader import HostBatch
from proteus_jax.data.workers import WorkerLost, WorkerPool

# What makes batches where the worker processes are gone.
IN_THEIR_PLACE = WorkerPool(0, 2)


def surviving_batches(
    make: Callable[[WorkerPool, int], Generator[HostBatch]],
    pool: WorkerPool,
    step: int,
    lost: Callable[[WorkerLost], None],
) -> Generator[HostBatch]:
    """Yields this host's batches from a step on; to be closed, as they are made ahead.

    `make` makes them from a step on by such workers. Where one of these is lost, `lost` hears of it
    and threads make what it owed, and what is needed until all hosts have heard of it and saved the
    same step.
    """
    while True:
        with contextlib.closing(make(pool, step)) as made:
            try:
                for batch in made:
                    step += 1
                    yield batch
                return
            except WorkerLost as error:
                lost(error)
        pool = IN_THEIR_PLACE
