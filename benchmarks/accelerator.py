"""The training step on an accelerator: images a second, MFU and memory for the paper's pairs.

    python benchmarks/accelerator.py [--pairs B L] [--image 224] [--rounds 10] [--output FILE]

Needs jax, flax, optax, numpy and this repository; runs unattended in bfloat16 on the first device
and prints a table of Markdown as it goes. For each pair it doubles the batch while that pays and
fits. Where PyTorch is installed and sees the device, its step is timed as well, eager and compiled.

MFU counts the work that the method needs (proteus_jax/flops.py), whatever was really computed.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
from workload import noise, recipe

from proteus_jax import flops
from proteus_jax.losses import LossWeights
from proteus_jax.models.attention import attention
from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.models.normalisation import IMAGENET
from proteus_jax.models.specs import SPECS, ViTSpec
from proteus_jax.step import random_masks, student_losses

GIANT = dataclasses.replace(SPECS["vit_giant2"], feed_forward="swiglu")
# By the student's letter: names of teacher and student, and the teacher's sizes.
PAIRS = {
    "T": ("vit_small", "vit_tiny", SPECS["vit_small"]),
    "S": ("vit_base", "vit_small", SPECS["vit_base"]),
    "B": ("vit_large", "vit_base", SPECS["vit_large"]),
    "L": ("vit_giant2", "vit_large", GIANT),
}
# A larger batch that is not faster by so much is not worth its memory.
WORTH = 1.03


class Timed(NamedTuple):
    """A batch, its time in seconds, and the most memory in use, where the device says."""

    batch: int
    seconds: float
    memory: float | None

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.batch / self.seconds


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
    """Of one call, after two that compile and warm up; each waits for the device."""
    spent = []
    for number in range(rounds + 2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        if number >= 2:
            spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def peak_memory() -> float | None:
    """Bytes, since the process began."""
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    return statistics_of_device.get("peak_bytes_in_use")


class Bench:
    """What is timed for one pair."""

    def __init__(self, teacher: ViTSpec, student: ViTSpec, image: int, dtype: Any):
        grid = image // student.patch_size
        self.image = image
        self.teacher = BackboneFunction(dataclasses.replace(teacher, grid=grid), dtype)
        self.student = StudentFunction(
            dataclasses.replace(student, grid=grid), {"teacher": teacher.width}, dtype
        )
        self.params = jax.jit(
            lambda: jax.tree.map(
                lambda array: array.astype(dtype), self.teacher.init(jax.random.key(1))
            )
        )()

    def train(self, batch: int) -> Callable[[], Any]:
        """The step that main.py trains with."""
        init, step = recipe(self.teacher, {"student": self.student}, erasing=0.25)
        step = jax.jit(step, donate_argnums=0)
        state, images = jax.jit(init)(), noise(batch, self.image)

        def call() -> Any:
            nonlocal state
            state, metrics = step(state, {"teacher": self.params}, images)
            return metrics

        return call

    def teach(self, batch: int) -> Callable[[], Any]:
        """The teacher's forward pass alone."""
        forward = jax.jit(lambda params, images: self.teacher(params, IMAGENET(images)))
        images = noise(batch, self.image)
        return lambda: forward(self.params, images)

    def gradients(self, batch: int, *, whole: bool) -> Callable[[], Any]:
        """The student's losses and gradients, the masked pass over half of the batch or, as the
        reference has it, over the whole.
        """
        pixels = IMAGENET(noise(batch, self.image))
        patches = (self.image // self.student.spec.patch_size) ** 2
        mask = random_masks(jax.random.key(0), batch // 2, patches, 0.5)
        rows = slice(None, None, 2)
        if whole:
            mask, rows = jnp.zeros((batch, patches), bool).at[::2].set(mask), slice(None)
        target = jax.jit(self.teacher)(self.params, pixels)
        values = jax.jit(self.student.init)(jax.random.key(0))

        def loss(values: Any) -> jax.Array:
            targets, weights = {"teacher": target}, {"teacher": LossWeights()}
            return student_losses(
                self.student, values, pixels, targets, mask, weights, masked_rows=rows
            )["teacher"].loss

        gradient = jax.jit(jax.grad(loss))
        return lambda: gradient(values)


def best_batch(
    make: Callable[[int], Callable[[], Any]], first: int, largest: int, rounds: int
) -> Timed:
    """Doubles the batch while it fits and pays."""
    best: Timed | None = None
    batch = first
    while batch <= largest:
        try:
            found = Timed(batch, median_seconds(make(batch), rounds), peak_memory())
        except jax.errors.JaxRuntimeError as error:
            if best is None or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            break
        if best is not None and found.rate < best.rate * WORTH:
            break
        best, batch = found, batch * 2
    assert best is not None
    return best


def attentions(spec: ViTSpec, batch: int, image: int, dtype: Any, rounds: int) -> Iterator[str]:
    """Forward and backward of one block's attention: ours, and JAX's own ones."""
    tokens = 1 + (image // spec.patch_size) ** 2
    shape = (batch, tokens, 3, spec.heads, spec.width // spec.heads)
    qkv = jax.random.normal(jax.random.key(0), shape, dtype)

    def theirs(implementation: Any) -> Callable:
        return lambda qkv: jax.nn.dot_product_attention(
            *jnp.moveaxis(qkv, 2, 0), implementation=implementation
        )

    ways = {"ours": attention, "jax.nn (XLA)": theirs("xla"), "jax.nn (cuDNN)": theirs("cudnn")}
    for name, way in ways.items():

        def both(qkv: jax.Array, way: Callable = way) -> jax.Array:
            return jax.grad(lambda qkv: jnp.sum(way(qkv).astype(jnp.float32)))(qkv)

        compiled = jax.jit(both)
        try:
            spent = median_seconds(lambda compiled=compiled: compiled(qkv), rounds)
            yield f"| {name} | {1e3 * spent:.2f} ms |"
        except Exception as error:  # Not every platform has each of them.
            yield f"| {name} | not here: {str(error).strip().partition(chr(10))[0][:80]} |"


def torch_rows(names: tuple[str, str], image: int, batch: int, rounds: int) -> Iterator[str]:
    """PyTorch's step, eager and compiled, where it can use the same device."""
    platform = {"gpu": "cuda", "cpu": "cpu"}.get(jax.default_backend())
    try:
        import torch
        import torch_step
    except ImportError:
        return
    if platform is None or (platform == "cuda" and not torch.cuda.is_available()):
        return
    feed_forward = "swiglu" if names[0] == "vit_giant2" else "mlp"
    for compiled in (False, True):
        label = "PyTorch, compiled" if compiled else "PyTorch, eager"
        try:
            step = torch_step.make(
                *names,
                batch=batch,
                image=image,
                device=platform,
                compiled=compiled,
                feed_forward=feed_forward,
            ).train
            spent = median_seconds(step, rounds)
            yield f"| {label} | {batch} | {1e3 * spent:.1f} ms | {batch / spent:.0f} | | |"
        except Exception as error:  # A failure of the opponent is a result, too.
            yield f"| {label} | {batch} | {str(error).strip().partition(chr(10))[0][:80]} | | | |"


def rows(pair: str, args: argparse.Namespace) -> Iterator[str]:
    """The table of one pair."""
    teacher_name, student_name, teacher = PAIRS[pair]
    student = SPECS[student_name]
    dtype = jnp.dtype(args.precision)
    bench = Bench(teacher, student, args.image, dtype)
    device = flops.known_device(jax.devices()[0].device_kind)
    work = flops.training([(teacher, args.image)], [student], args.image, masked=True)

    def row(label: str, found: Timed, needed: float) -> str:
        used = "" if device is None else f"{found.rate * needed / device.peak:.1%}"
        memory = "" if found.memory is None else f"{found.memory / 1e9:.1f} GB"
        return (
            f"| {label} | {found.batch} | {1e3 * found.seconds:.1f} ms | {found.rate:.0f} | {used} "
            f"| {memory} |"
        )

    yield f"\n{student_name} from {teacher_name}: {work.total / 1e9:.1f} GFLOP an image\n"
    yield "| | batch | time | images/s | MFU | peak memory |\n|---|---|---|---|---|---|"
    step = best_batch(bench.train, args.batch, args.largest, args.rounds)
    yield row("whole step", step, work.total)
    batch = step.batch
    for label, make, needed in (
        ("teacher's forward pass", bench.teach(batch), work.teacher),
        (
            "student, masked half",
            bench.gradients(batch, whole=False),
            work.total - work.teacher,
        ),
        ("student, masked whole", bench.gradients(batch, whole=True), work.total - work.teacher),
    ):
        found = Timed(batch, median_seconds(make, args.rounds), peak_memory())
        yield row(label, found, needed)
    yield from torch_rows((teacher_name, student_name), args.image, batch, args.rounds)
    yield "\n| attention of a student's block, forward and backward | time |\n|---|---|"
    yield from attentions(student, batch, args.image, dtype, args.rounds)


def main() -> None:
    """Prints the tables, and writes them to a file as well where one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32, help="the first batch that is tried")
    parser.add_argument("--largest", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if args.output is not None:
            args.output.write_text("\n".join(lines) + "\n")

    device = jax.devices()[0]
    say(f"{device.device_kind}, jax {jax.__version__}, {args.precision}, {args.image} px")
    for pair in args.pairs:
        for line in rows(pair, args):
            say(line)


if __name__ == "__main__":
    main()
