"""The whole training step against PyTorch's, in turn within one run, on a CPU in float32.

    python benchmarks/step.py [--teacher vit_small] [--student vit_tiny] [--batch 8] [--image 224]
                              [--rounds 11]

Needs requirements-parity.txt. Prints the time of the first step (trace and compile), medians of
both, and as its last line `ratio: <number>`: PyTorch's time over ours.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import torch_step
from workload import noise, recipe

from proteus_jax.models.config import SPECS
from proteus_jax.models.functional import BackboneFunction, StudentFunction


def our_step(teacher: str, student: str, batch: int, image: int) -> Callable[[], float]:
    """The step that main.py trains with."""
    teacher_backbone = BackboneFunction(SPECS[teacher])
    students = {student: StudentFunction(SPECS[student], {"teacher": SPECS[teacher].width})}
    init, step = recipe(teacher_backbone, students)
    step = jax.jit(step, donate_argnums=0)
    params = jax.jit(teacher_backbone.init)(jax.random.key(1))
    state, images = jax.jit(init)(), noise(batch, image)

    def train() -> float:
        nonlocal state
        state, metrics = step(state, {"teacher": params}, images)
        return float(metrics[f"{student}/loss"])

    return train


def seconds(step: Callable[[], float]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    """Runs the rounds and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="vit_small", choices=SPECS)
    parser.add_argument("--student", default="vit_tiny", choices=SPECS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    sizes = {"batch": args.batch, "image": args.image}

    ours = our_step(args.teacher, args.student, **sizes)
    theirs = torch_step.make(SPECS[args.teacher], SPECS[args.student], **sizes).train
    print(f"first step, trace and compile: {seconds(ours):.1f} s", flush=True)
    seconds(ours), seconds(theirs)
    times: dict[str, list[float]] = {"ours": [], "PyTorch": []}
    for number in range(args.rounds):
        for name, step in (("ours", ours), ("PyTorch", theirs)):
            times[name].append(seconds(step))
        print(
            f"round {number + 1}: "
            + ", ".join(f"{name} {spent[-1]:.3f} s" for name, spent in times.items()),
            flush=True,
        )
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    print("median: " + ", ".join(f"{name} {value:.3f} s" for name, value in medians.items()))
    print(f"ratio: {medians['PyTorch'] / medians['ours']:.3f}")


if __name__ == "__main__":
    main()
