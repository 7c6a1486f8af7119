"""The command --devices: checks that all devices of all hosts can speak with each other, and how
fast.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from proteus_jax.errors import InputError
from proteus_jax.runtime import sharding

# Bytes on each device: what costs a message, what a norm's gradient is, a student's gradients.
SIZES = (2**12, 2**20, 2**24, 2**28)
ROUNDS = 5
# Seconds for all of it; a network that works needs a few.
PATIENCE = 120.0


def check_devices(
    say: Callable[[str], None],
    warn: Callable[[str], None],
    *,
    sizes: tuple[int, ...] = SIZES,
    patience: float = PATIENCE,
) -> None:
    """Sums arrays over all devices, compares with what is right, and says how long it takes.

    InputError where a sum is wrong. Where one does not come back within `patience` seconds this
    process ends with the same exit code, after a warning.
    """
    mesh = sharding.make_mesh()
    hosts, devices = jax.process_count(), jax.device_count()
    say(f"{hosts} hosts, {devices} devices ({jax.devices()[0].device_kind}): sums over all of them")
    with _within(patience, warn):
        for size in sizes:
            say(_line(size, *_summed(size, mesh)))
    say("all devices hear each other")


def _summed(size: int, mesh: jax.sharding.Mesh) -> tuple[float, int]:
    """Median seconds of a sum of arrays of so many bytes, and how many devices took part."""
    devices, count = mesh.size, size // 4
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))

    def row(index: Any) -> np.ndarray:
        return np.full((1, count), (index[0].start or 0) + 1, np.float32)

    numbers = jax.make_array_from_callback((devices, count), rows, row)

    @partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def total(numbers: jax.Array) -> jax.Array:
        return jnp.sum(numbers, axis=0)

    right, spent = devices * (devices + 1) / 2, []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        result = jax.block_until_ready(total(numbers))
        spent.append(time.perf_counter() - start)
        if not np.all(np.asarray(result.addressable_data(0)) == right):
            raise InputError(
                f"--devices: a sum of {size} bytes over {devices} devices is wrong: expected "
                f"{right} everywhere"
            )
    return float(np.median(spent[1:])), devices


def _line(size: int, seconds: float, devices: int) -> str:
    # What a device sends and receives of a sum in a ring.
    moved = 2 * size * (devices - 1) / devices
    unit, name = (2**20, "MiB") if size >= 2**20 else (2**10, "KiB")
    rate = moved / seconds / 1e9
    return f"  {size // unit:4} {name}  {1e3 * seconds:9.2f} ms  {rate:8.2f} GB/s for each device"


@contextlib.contextmanager
def _within(seconds: float, warn: Callable[[str], None]) -> Iterator[None]:
    """A collective that waits for ever cannot be interrupted: the process ends instead."""

    def give_up() -> None:
        warn(
            f"--devices: no answer of all devices within {seconds:.0f} s. On GPUs NCCL_DEBUG=INFO "
            "says what it tries, and NCCL_SOCKET_IFNAME names the network between the nodes"
        )
        os._exit(InputError.EXIT_CODE)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
