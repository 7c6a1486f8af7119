"""Where arrays live: one mesh, one rule (docs/decisions/0003-one-sharding-rule.md)."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Below this many elements an array is whole on every device: splitting it costs more than it saves.
SMALL = 2**16
BATCH_AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices as ("data", "fsdp"); ValueError where they do not divide."""
    devices = jax.device_count()
    if devices % fsdp:
        raise ValueError(f"{devices} devices do not divide into groups of {fsdp}")
    return jax.make_mesh((devices // fsdp, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


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


def place_batch(images: np.ndarray, mesh: Mesh) -> jax.Array:
    """This host's share of a batch as part of the global array."""
    return jax.make_array_from_process_local_data(over_batch(mesh), images)


def place_tree(tree: Any, mesh: Mesh) -> Any:
    """Host arrays on the devices, each born as the rule says."""
    return jax.device_put(tree, shardings(tree, mesh))
