"""Where arrays live: one mesh, one rule (docs/decisions/0003-one-sharding-rule.md)."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Below this many elements an array is whole on every device: splitting it costs more than it saves.
SMALL = 2**16
BATCH_AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices as ("data", "fsdp"), host by host; ValueError where they do not divide.

    `jax.make_mesh` follows a TPU's wires, on which hosts take turns. Here each host's devices stand
    together, in the order that it gives them: a host's share of a batch is then one piece of it.
    """
    devices = jax.device_count()
    if devices % fsdp:
        raise ValueError(f"{devices} devices do not divide into groups of {fsdp}")
    shape, kinds = (devices // fsdp, fsdp), (AxisType.Auto,) * 2
    wired = jax.make_mesh(shape, BATCH_AXES, axis_types=kinds)
    together = sorted(wired.devices.flat, key=lambda device: device.process_index)
    return Mesh(np.array(together).reshape(shape), BATCH_AXES, axis_types=kinds)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every array of a tree: its largest axis that fsdp divides, small arrays
    whole.
    """
    parts = mesh.shape["fsdp"]

    def rule(array: Any) -> NamedSharding:
        if parts == 1 or array.size < SMALL:
            return replicated(mesh)
        divisible = [axis for axis, length in enumerate(array.shape) if length % parts == 0]
        if not divisible:
            return replicated(mesh)
        axis = max(divisible, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(rule, tree)


def traced_on(mesh: Mesh, function: Callable) -> Callable:
    """The function, for `jax.jit`, with the mesh as JAX's own context: kernels that XLA cannot
    divide by itself divide their batch over it.
    """

    @functools.wraps(function)
    def on_mesh(*arguments: Any, **named: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments, **named)

    return on_mesh


def place_batch(images: np.ndarray, mesh: Mesh) -> jax.Array:
    """This host's share of a batch as part of the global array."""
    # On several hosts JAX takes this for an implicit transfer.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_process_local_data(over_batch(mesh), images)


def place_tree(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, the same on every host, on the devices, each born as the rule says."""

    def place(array: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, shardings(tree, mesh))


def gather(tree: Any, mesh: Mesh) -> Any:
    """A tree of device arrays as host arrays, whole on every host; all hosts must take part."""
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.device_get(whole)


def same_everywhere(text: str) -> bool:
    """True where all hosts have the same text; all must ask."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    everybody = multihost_utils.process_allgather(digest)
    return bool((everybody == digest).all())


def of_all_hosts(text: str) -> list[str]:
    """What each host has to say, in their order, on all hosts; all must say something."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
    longest = max(1, int(multihost_utils.process_allgather(np.int64(content.size)).max()))
    padded = np.zeros(longest, np.uint8)
    padded[: content.size] = content
    rows = np.reshape(multihost_utils.process_allgather(padded), (jax.process_count(), longest))
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def from_first_host(number: int) -> int:
    """What host 0 says, on all hosts; all must ask."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


class Agreement:
    """One answer on all hosts to what each asks at every step: does any of them say yes.

    On several hosts the answer is to what was asked LAG steps before, so that nobody waits for the
    device.
    """

    LAG = 2

    def __init__(self, mesh: Mesh):
        self._mesh, self._asked = mesh, []
        self._sum = jax.jit(jnp.sum, out_shardings=replicated(mesh))

    def any(self, mine: bool) -> bool:
        """True where any host said yes."""
        if jax.process_count() == 1:
            return mine
        votes = np.full(jax.local_device_count(), mine, np.int32)
        self._asked.append(self._sum(place_batch(votes, self._mesh)))
        if len(self._asked) <= self.LAG:
            return False
        return bool(jax.device_get(self._asked.pop(0)))
