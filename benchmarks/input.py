"""How fast one host feeds a device: the whole recipe, from JPEG to a uint8 batch.

    python benchmarks/input.py [--rounds 9] [--files 1280000]

Side by side in one process on one core with the same recipe in Pillow alone, both in turn, medians
of the rounds; then one worker process against two; then, with --files, the time to the first batch
from a listing of so many entries. The last line is the ratio to Pillow, on photographs.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import pillow_recipe
from proteus_jax.data import decode
from proteus_jax.data.dataset import open_images
from proteus_jax.data.loader import training_batches
from proteus_jax.data.sampler import Sampler, ViewRandomness
from proteus_jax.data.sources.skimage import obtain_pictures
from proteus_jax.data.splits import HeldOut
from proteus_jax.data.transforms.randaugment import RandAugment
from proteus_jax.data.transforms.random_resized_crop import TrainTransform

WIDTH, HEIGHT, QUALITY, SIZE = 500, 375, 95, 224
# Of quickstart's nineteen: those that are photographs, not drawings or pages.
PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "retina.jpg", "brick.png", "camera.png", "coins.png", "grass.png",
    "gravel.png", "moon.png",
)  # fmt: skip
NONE = HeldOut(0.0, 1, 1)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def photographs() -> list[bytes]:
    """Photographs out of scikit-image's wheel, as large as ImageNet's."""
    folder, encoded = obtain_pictures(), []
    for name in PHOTOGRAPHS:
        image = Image.open(folder / name).convert("RGB")
        side = min(image.width / WIDTH, image.height / HEIGHT)
        x, y = (image.width - WIDTH * side) / 2, (image.height - HEIGHT * side) / 2
        box = (x, y, x + WIDTH * side, y + HEIGHT * side)
        encoded.append(_jpeg(image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)))
    return encoded


def drawn(count: int = 16) -> list[bytes]:
    """Pictures of nothing, with more noise than photographs have: more bytes to decode each."""
    rng, images = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 54, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + rng.normal(0, 4, (HEIGHT, WIDTH, 1))
        images.append(_jpeg(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))))
    return images


def _ours(
    recipe: TrainTransform, repeats: int = 1
) -> Callable[[Sequence[bytes], int, int], np.ndarray]:
    def batch(jpegs: Sequence[bytes], first: int, count: int) -> np.ndarray:
        made = np.empty((count, SIZE, SIZE, 3), np.uint8)
        picture, randomness = decode.open_image(jpegs[0]), ViewRandomness(0)
        for place in range(count):
            if (first + place) % repeats == 0:
                number = (first + place) // repeats % len(jpegs)
                picture = decode.open_image(jpegs[number], reused=repeats > 1)
            made[place] = recipe(picture, randomness.at(first + place))
        return made

    return batch


def _pillows(randaugment: bool) -> Callable[[Sequence[bytes], int, int], np.ndarray]:
    def batch(jpegs: Sequence[bytes], first: int, count: int) -> np.ndarray:
        rng, made = np.random.default_rng(first), np.empty((count, SIZE, SIZE, 3), np.uint8)
        for place in range(count):
            jpeg = jpegs[(first + place) % len(jpegs)]
            made[place] = pillow_recipe.view(jpeg, rng, randaugment=randaugment)
        return made

    return batch


def _decoded(jpegs: Sequence[bytes], first: int, count: int) -> None:
    for place in range(first, first + count):
        decode.decode(jpegs[place % len(jpegs)])


def side_by_side(name: str, jpegs: Sequence[bytes], rounds: int) -> float:
    """Prints images a second of CPU time; returns the ratio of the whole recipe to Pillow's."""
    recipe = TrainTransform(SIZE, RandAugment())
    contenders = {
        "Pillow, whole recipe": _pillows(True),
        "whole recipe": _ours(recipe),
        "whole recipe, 3 views each": _ours(recipe, repeats=3),
        "Pillow, crop and flip": _pillows(False),
        "crop and flip": _ours(TrainTransform(SIZE)),
        "decode": _decoded,
    }
    count = 10 * len(jpegs)
    spent: dict[str, list[float]] = {label: [] for label in contenders}
    for turn in range(rounds + 1):
        for label, make in contenders.items():
            start = time.process_time()
            make(jpegs, turn * count, count)
            if turn:  # the first round warms up
                spent[label].append((time.process_time() - start) / count)
    size = statistics.mean(map(len, jpegs)) / 1000
    print(f"{name}: {WIDTH} x {HEIGHT}, quality {QUALITY}, {size:.0f} kB each, one core")
    for label, times in spent.items():
        print(f"  {label:28} {1 / statistics.median(times):6.0f} images/s")
    ratios = [
        theirs / ours
        for theirs, ours in zip(spent["Pillow, whole recipe"], spent["whole recipe"], strict=True)
    ]
    return statistics.median(ratios)


@contextlib.contextmanager
def _folder(jpegs: Sequence[bytes]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        for number, jpeg in enumerate(jpegs):
            Path(folder, f"{number:03}.jpg").write_bytes(jpeg)
        yield folder


def _rate(folder: str, workers: int, seconds: float) -> float:
    split = open_images([folder], held_out=NONE)
    batches = training_batches(
        split.training,
        order=Sampler(0, split.parts),
        recipe=TrainTransform(SIZE, RandAugment()),
        batch=128,
        steps=range(10**6),
        workers=workers,
    )
    for _ in range(2 + workers):
        next(batches)
    start, made = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        made += len(next(batches).images)
    rate = made / (time.monotonic() - start)
    batches.close()
    return rate


def workers(jpegs: Sequence[bytes], rounds: int) -> None:
    """Prints the rate of one and of two worker processes, in turn."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with _folder(jpegs) as folder:
        for _ in range(rounds):
            for count in rates:
                rates[count].append(_rate(folder, count, seconds=4))
    one, two = (statistics.median(rates[count]) for count in (1, 2))
    print(f"worker processes: one {one:.0f} images/s, two {two:.0f}: {two / one:.2f} times")


def first_batch(jpegs: Sequence[bytes], files: int) -> None:
    """Prints the time to a first batch from a tree of links, listed for the first time and again,
    and the memory of a worker.
    """
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as cache:
        os.environ["PROTEUS_JAX_CACHE"] = cache
        for directory in range(1000):
            folder = Path(root, f"n{directory:08}")
            folder.mkdir()
            (folder / "0.jpeg").write_bytes(jpegs[directory % len(jpegs)])
            for number in range(1, files // 1000):
                os.link(folder / "0.jpeg", folder / f"{number}.jpeg")
        for label, count in (("listed for the first time", 0), ("again", 0), ("with a worker", 1)):
            start = time.monotonic()
            split = open_images([root], held_out=HeldOut(0.02, 16, 1024))
            batches = training_batches(
                split.training,
                order=Sampler(0, split.parts, (), 3),
                recipe=TrainTransform(SIZE, RandAugment()),
                batch=128,
                steps=range(100),
                workers=count,
            )
            next(batches)
            print(f"{files} files, {label}: first batch after {time.monotonic() - start:.1f} s")
            if count:
                print(f"  resident memory of the worker: {_memory_of_children()} MiB")
            batches.close()


def _memory_of_children() -> int:
    """The largest resident size of this process's children, in MiB (Linux)."""
    sizes = [0]
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            facts = dict(
                line.split(":", 1) for line in status.read_text().splitlines() if ":" in line
            )
            if int(facts["PPid"]) == os.getpid() and "VmRSS" in facts:
                sizes.append(int(facts["VmRSS"].split()[0]) // 1024)
    return max(sizes)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--files", type=int, default=0, help="length of a listing to make")
    options = parser.parse_args()
    natural = photographs()
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
    noisy = side_by_side("drawn pictures", drawn(), options.rounds)
    ratio = side_by_side("photographs", natural, options.rounds)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    workers(natural, min(options.rounds, 5))
    if options.files:
        first_batch(natural, options.files)
    print(f"to Pillow, on drawn pictures: {noisy:.2f} times")
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
