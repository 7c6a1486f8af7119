"""Small numbers and texts exchanged between hosts, through the devices."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from proteus_jax.runtime.sharding import place_batch, replicated


def same_on_all_hosts(text: str) -> bool:
    """True where all hosts have the same text; all must ask."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    everybody = multihost_utils.process_allgather(digest)
    return bool((everybody == digest).all())


def gather_from_all_hosts(text: str) -> list[str]:
    """Gathers a text of each host, in their order, on all hosts; all must call it."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
    longest = max(1, int(multihost_utils.process_allgather(np.int64(content.size)).max()))
    padded = np.zeros(longest, np.uint8)
    padded[: content.size] = content
    rows = np.reshape(multihost_utils.process_allgather(padded), (jax.process_count(), longest))
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def broadcast_from_rank0(number: int) -> int:
    """Broadcasts a number of host 0 to all hosts; all must call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


class AnyProcess:
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
