"""Worker processes and threads that make pieces of batches ahead, and how many of them this machine
has room for.
"""

import atexit
import contextlib
import errno
import gc
import itertools
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from proteus_jax.data.absl_settings import parse_flags
from proteus_jax.errors import Interrupted
from proteus_jax.runtime.cluster_env import processes_here
from proteus_jax.runtime.cpu_quota import cores
from proteus_jax.runtime.process import REQUESTS

# Images that a thread or a worker makes at a time.
CHUNK = 64
# Pieces of a worker that lie in shared memory at most: grain keeps two, one is being made, and one
# waits for a queue that is full.
HELD = 4
# Bytes of a piece at least, as it has more than images, and every array a page of its own.
SMALLEST = 2**18
# What a worker and its queues keep open, measured with grain 0.2: 27 to 40 files.
DESCRIPTORS = 40
# What the rest of a run opens beside what is open when workers are counted.
SPARE_DESCRIPTORS = 100
SHARED_MEMORY = Path("/dev/shm")


class WorkerLost(Interrupted):
    """A worker process is gone, or has no shared memory to write to; what it was to make, others
    can.
    """


class WorkerPool(NamedTuple):
    """The workers that make images on this host: processes or, where there are none, threads.

    `remark` says why there are fewer workers than were asked for; empty where there are not.
    """

    workers: int
    threads: int
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.workers} worker processes" if self.workers else f"{self.threads} threads"


def worker_pool(workers: int | None, threads: int, side: int) -> WorkerPool:
    """Chooses the number of workers: as many as are asked for or, for None, this process's cores
    less two, none where there are four or fewer; of either as many as have room for their pieces of
    images of `side` pixels in shared memory, and for the files that they open.
    """
    if workers is None:
        count = cores()
        if count == os.cpu_count():
            # Nothing has divided the machine among the processes that share it.
            count = max(1, count // processes_here())
        workers = count - 2 if count > 4 else 0
    allowed, reasons = workers, []
    for room, why in (_in_shared_memory(max(CHUNK * side**2 * 3, SMALLEST)), _in_descriptors()):
        if room is not None and room < workers:
            allowed = min(allowed, room)
            reasons.append(why)
    if not reasons:
        return WorkerPool(workers, threads)
    instead = f"{allowed} in place of {workers}" if allowed else f"threads in place of {workers}"
    # What is asked for may be none.
    threads = max(threads, 2)
    return WorkerPool(
        allowed, threads, f"{instead} worker processes make images: {'; '.join(reasons)}"
    )


def _in_shared_memory(piece: int) -> tuple[int | None, str]:
    """How many workers' pieces of so many bytes fit, and what to say of it; None where nothing
    limits them.
    """
    if sys.platform != "linux":
        return None, ""
    each = HELD * piece
    more = "docker run --shm-size=2g or, in Kubernetes, a volume with medium: Memory has more"
    try:
        if not os.access(SHARED_MEMORY, os.W_OK):
            return 0, f"shared memory ({SHARED_MEMORY}) cannot be written; {more}"
        statistics = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0, f"there is no shared memory ({SHARED_MEMORY}); {more}"
    free = statistics.f_bavail * statistics.f_frsize // processes_here()
    reason = f"{free / 1e6:.3g} MB are free in shared memory ({SHARED_MEMORY}), a worker process"
    return free // each, f"{reason} takes up to {each / 1e6:.3g} MB; {more}"


def _in_descriptors() -> tuple[int | None, str]:
    """How many workers may open their files, and what to say of it."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return None, ""
    opened = 0
    with contextlib.suppress(OSError):
        opened = sum(1 for _ in Path("/proc/self/fd").iterdir())
    room = (limit - opened - SPARE_DESCRIPTORS) // DESCRIPTORS
    reason = f"at most {limit} files may be open (ulimit -n), a worker process opens {DESCRIPTORS}"
    return max(room, 0), reason


def edges_of(share: int) -> tuple[int, ...]:
    """Edges of the pieces that one host's share of a batch is cut into, its ends among them. What a
    worker process holds does not grow with the batch.
    """
    return (*range(0, share, CHUNK), share)


def assembled(pieces: Generator[Any], edges: tuple[int, ...]) -> Generator[Any]:
    """Batches from pieces, which are named tuples of arrays, cut at `edges`; one after the other.
    Copied in any case: pieces from workers lie in memory that is theirs. To be closed.
    """
    with contextlib.closing(pieces):
        for piece in pieces:
            whole = type(piece)(
                *(np.empty((edges[-1], *part.shape[1:]), part.dtype) for part in piece)
            )
            _copy(piece, whole, *edges[:2])
            # Let go of before the next one is asked for.
            del piece
            for low, high in itertools.pairwise(edges[1:]):
                _copy(next(pieces), whole, low, high)
            yield whole


def _copy(piece: Any, whole: Any, low: int, high: int) -> None:
    for part, target in zip(piece, whole, strict=True):
        target[low:high] = part


def in_parallel(
    make: Callable[[int], Any], count: int, workers: int, threads: int
) -> Generator[Any]:
    """make(0), make(1), ... make(count - 1), in order, made ahead by worker processes or, where
    there are none, by threads. Processes and their shared memory end with the generator, or at the
    latest with this process; what it yields is to be copied before the next is asked for.

    WorkerLost where a worker process is killed, or shared memory is full.
    """
    dataset = grain.MapDataset.range(count).map(make)
    if not workers:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return _closing(iter(dataset.to_iter_dataset(options)))
    parse_flags()
    ahead = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    ).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
        worker_init_fn=_start_worker,
    )
    return _closing(iter(ahead))


def _closing(iterator: grain.DatasetIterator[Any]) -> Generator[Any]:
    opened = [iterator]
    del iterator

    def close() -> None:
        if opened:
            opened.pop().close()
            _await_release()

    # A script may end without closing what it opened, and a generator cannot tell.
    atexit.register(close)
    try:
        # No variable holds what was yielded, or the iterator: both must go when `close` lets go.
        with contextlib.suppress(StopIteration), _naming_lost_workers():
            while True:
                yield next(opened[0])
    finally:
        close()
        atexit.unregister(close)


@contextlib.contextmanager
def _naming_lost_workers() -> Iterator[None]:
    """Grain's words for a worker that is gone, and the system's for memory that is not there,
    become WorkerLost.
    """
    advice = "fewer --config.data.workers (0: threads) take less"
    try:
        yield
    except RuntimeError as error:
        match = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if match is None:
            raise
        raise WorkerLost(f"a worker process {_how(int(match.group(1)))}; {advice}") from None
    except OSError as error:
        # One that this process raises of its own files is none of shared memory.
        if error.errno not in (errno.ENOSPC, errno.EMFILE, errno.ENFILE):
            raise
        raise WorkerLost(f"a worker process could not go on: {error.strerror}; {advice}") from None


def _how(code: int) -> str:
    """A process ended that has this exit code, as Python gives it: of a signal where negative."""
    if code >= 0:
        return f"ended with {code}"
    if -code == signal.SIGKILL:
        return "was killed, as the system does where memory runs out"
    if -code == signal.SIGBUS:
        return f"was ended by SIGBUS, as where shared memory ({SHARED_MEMORY}) is full"
    return f"was ended by signal {-code}"


def _await_release() -> None:
    """Grain lets go of the last pieces only when their circle of references is collected, and then
    frees them in a thread; an exit before that would leave them behind, with a warning.
    """
    gc.collect()
    maps, deadline = Path("/proc/self/maps"), time.monotonic() + 2.0
    while maps.exists() and "/dev/shm/psm_" in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    # Their names go a moment after their pages.
    time.sleep(0.05)


def _start_worker(index: int, count: int) -> None:
    # An interrupt from the keyboard, and a scheduler's request to end, reach every process of the
    # group; the main one decides what becomes of them.
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed run must not leave processes that wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _remove_open_segments()
        os._exit(1)


def _remove_open_segments() -> None:
    """Removes the shared memory that this worker was about to fill: Python's tracker, which removes
    all others, may not have heard of it yet.
    """
    files = Path("/proc/self/fd")
    for file in files.iterdir() if files.is_dir() else ():
        with contextlib.suppress(OSError):
            name = file.readlink()
            if name.is_relative_to("/dev/shm") and name.name.startswith("psm_"):
                name.unlink()
