"""Placement of arrays: one mesh, one rule (docs/decisions/0003-one-sharding-rule.md)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
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
