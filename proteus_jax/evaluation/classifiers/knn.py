"""Weighted k nearest neighbors by cosine: exact, in pieces that fit, over all devices.

Source: facebookresearch/dinov2 eval/knn.py: class tokens, softmax of similarity over temperature.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from proteus_jax.runtime import sharding

# Rows of the bank, and queries, that are compared at a time on a device.
BANK_ROWS, QUERIES = 16384, 512
_LEAST = np.finfo(np.float32).tiny


def predictions(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    neighbors: Sequence[int],
    temperature: float,
    mesh: Mesh,
) -> dict[int, np.ndarray]:
    """The class [M] that the nearest of `train` [N, D] give each of `test` [M, D], for each number
    of neighbors; numbers above N are left out.
    """
    used = [k for k in neighbors if k <= len(train)]
    if not used:
        return {}
    classes, classes_by_k = int(labels.max()) + 1, {k: [] for k in used}
    bank = _Bank(train, mesh)
    for start in range(0, len(test), QUERIES):
        similarity, index = bank.nearest(test[start : start + QUERIES], max(used))
        weights = np.exp((similarity - similarity[:, :1]).astype(np.float64) / temperature)
        votes = np.zeros((len(index), classes))
        rows, before = np.arange(len(index))[:, None], 0
        for k in sorted(used):
            np.add.at(votes, (rows, labels[index[:, before:k]]), weights[:, before:k])
            classes_by_k[k].append(votes.argmax(axis=1))
            before = k
    return {k: np.concatenate(classes_by_k[k]) for k in used}


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays."""
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _LEAST)


class _Bank:
    """The rows that are searched, spread over the devices."""

    def __init__(self, rows: np.ndarray, mesh: Mesh):
        self._mesh, count = mesh, len(rows)
        share = -(-count // mesh.size)
        self._chunk = min(share, BANK_ROWS)
        share = -(-share // self._chunk) * self._chunk
        padded = np.zeros((share * mesh.size, rows.shape[1]), np.float32)
        padded[:count] = unit(rows)
        place = sharding.over_batch(mesh)
        self._rows = jax.make_array_from_callback(padded.shape, place, lambda at: padded[at])
        self._count = count

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Similarities [Q, k], the largest first, and indices [Q, k] of the k nearest rows."""
        padded = np.zeros((QUERIES, queries.shape[1]), np.float32)
        padded[: len(queries)] = unit(queries)
        search = _search(self._mesh, k, self._chunk, self._count)
        similarity, index = jax.device_get(search(self._rows, padded))
        return similarity[: len(queries)], index[: len(queries)]


@functools.lru_cache(maxsize=8)
def _search(mesh: Mesh, k: int, chunk: int, count: int):
    """A compiled search: each device looks through its rows a chunk at a time, then all compare
    what they found.
    """

    def on_a_device(rows: jax.Array, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        device = jax.lax.axis_index(sharding.BATCH_AXES)
        first = device * len(rows)

        def look(best, piece):
            number, part = piece
            index = first + number * chunk + jnp.arange(chunk, dtype=jnp.int32)
            similarity = jnp.matmul(queries, part.T, precision=jax.lax.Precision.HIGHEST)
            similarity = jnp.where(index < count, similarity, -jnp.inf)
            return _best(k, best, (similarity, jnp.broadcast_to(index, similarity.shape))), None

        nothing = (
            jnp.full((len(queries), k), -jnp.inf),
            jnp.zeros((len(queries), k), jnp.int32),
        )
        nothing = jax.lax.pcast(nothing, sharding.BATCH_AXES, to="varying")
        pieces = rows.reshape(-1, chunk, rows.shape[1])
        numbers = jnp.arange(len(pieces), dtype=jnp.int32)
        best, _ = jax.lax.scan(look, nothing, (numbers, pieces))
        return best

    def search(rows: jax.Array, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        spec = PartitionSpec(None, sharding.BATCH_AXES)
        nearest = jax.shard_map(
            on_a_device,
            mesh=mesh,
            in_specs=(PartitionSpec(sharding.BATCH_AXES), PartitionSpec()),
            out_specs=(spec, spec),
        )(rows, queries)
        similarity, place = jax.lax.top_k(nearest[0], k)
        return similarity, jnp.take_along_axis(nearest[1], place, axis=1)

    return jax.jit(search, out_shardings=sharding.replicated(mesh))


def _best(k: int, *candidates: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The k largest of several lists of (similarity [q, n], index [q, n])."""
    similarity, index = (jnp.concatenate(parts, axis=1) for parts in zip(*candidates, strict=True))
    similarity, place = jax.lax.top_k(similarity, k)
    return similarity, jnp.take_along_axis(index, place, axis=1)
