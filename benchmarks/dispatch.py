"""Measures what Python costs between two steps: a batch is placed and a compiled step is called,
with the arrays of a 12-block teacher and a 12-block student.

    python benchmarks/dispatch.py [--steps 200]

The widths are tiny, so that the device has next to nothing to do; the number of arrays, which is
what a call costs, is the real one. The last line is `dispatch: <milliseconds> ms`.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from workload import recipe

from proteus_jax.models.config import SPECS
from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.runtime import sharding

TINY = {"width": 8, "heads": 1, "grid": 2}
BATCH, SIDE = 2, 28


def main() -> None:
    """Times the calls of the loop and prints their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    teacher = BackboneFunction(dataclasses.replace(SPECS["vit_small"], **TINY))
    tiny = dataclasses.replace(SPECS["vit_tiny"], **TINY)
    students = {"s": StudentFunction(tiny, {"teacher": 8})}
    init, step = recipe(teacher, students)
    mesh = sharding.make_mesh()
    state = sharding.place_tree(init(), mesh)
    params = {"teacher": sharding.place_tree(teacher.init(jax.random.key(1)), mesh)}
    places = (sharding.shardings(state, mesh), sharding.replicated(mesh))
    compiled = jax.jit(step, donate_argnums=0, out_shardings=places)
    images = np.zeros((BATCH, SIDE, SIDE, 3), np.uint8)
    placing, calling = [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        batch = sharding.place_batch(images, mesh)
        placed = time.perf_counter()
        state, _ = compiled(state, params, batch)
        called = time.perf_counter()
        jax.block_until_ready(state)
        placing.append(placed - start)
        calling.append(called - placed)
    arrays = len(jax.tree.leaves((state, params)))
    print(f"{arrays} arrays go in; medians of {args.steps} steps")
    print(f"placing a batch: {1e3 * statistics.median(placing):.2f} ms")
    print(f"calling the step: {1e3 * statistics.median(calling):.2f} ms")
    print(f"dispatch: {1e3 * (statistics.median(placing) + statistics.median(calling)):.2f} ms")


if __name__ == "__main__":
    main()
