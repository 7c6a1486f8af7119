"""Compiles the attention kernels for TPUs, forward and backward, on a machine without one:

    make .venv/tpu.stamp
    .venv/tpu/bin/python tests/compile_for_tpu.py

libtpu is a compiler as well, but beside a CPU it makes every start of JAX slow: so it has an
environment of its own, and pytest does not collect this file.
"""

import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# As a compiler it may run several times at once, beside a plan that compiles.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from proteus_jax.models.attention import attention
from proteus_jax.runtime import sharding

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
# Tokens, heads, channels of a head, dtype: the paper's students and teachers.
SHAPES = (
    (257, 3, 64, "bfloat16"),
    (257, 12, 64, "bfloat16"),
    (257, 24, 64, "bfloat16"),
    (257, 12, 64, "float32"),
)
# On one chip: other heads; a larger image, whose queries are taken in parts; channels that do not
# divide a row of registers.
MORE = (
    (257, 6, 64, "bfloat16"),
    (257, 16, 64, "bfloat16"),
    (785, 6, 64, "bfloat16"),
    (197, 2, 72, "bfloat16"),
)
KERNELS = 2


def compiled(topology: str, shape: tuple[int, int, int, str]) -> str:
    """The program of both ways, over four devices."""
    tokens, heads, dim, dtype = shape
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    kinds = (AxisType.Auto,) * 2
    mesh = Mesh(np.asarray(devices).reshape(-1, 1), sharding.BATCH_AXES, axis_types=kinds)

    def both_ways(qkv: jax.Array, gradient: jax.Array) -> tuple:
        mixed, backward = jax.vjp(lambda qkv: attention(qkv, "pallas"), qkv)
        return mixed, backward(gradient)[0]

    arrays = [
        jax.ShapeDtypeStruct(
            (8, tokens, *rest), jnp.dtype(dtype), sharding=sharding.over_batch(mesh)
        )
        for rest in ((3, heads, dim), (heads, dim))
    ]
    lowered = jax.jit(sharding.traced_on(mesh, both_ways)).lower(*arrays)
    return lowered.compile().as_text() or ""


def main() -> None:
    """Says what compiled; ends with 1 at the first that does not, or not to the kernels."""
    for topology in CHIPS:
        for shape in SHAPES + (MORE if topology == CHIPS[0] else ()):
            start = time.perf_counter()
            found = compiled(topology, shape).count('custom_call_target="tpu_custom_call"')
            print(f"{topology} {shape}: {time.perf_counter() - start:.1f} s", flush=True)
            if found != KERNELS:
                sys.exit(f"expected {KERNELS} kernels, found {found}")


if __name__ == "__main__":
    main()
