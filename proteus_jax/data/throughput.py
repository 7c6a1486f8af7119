"""How fast this host makes training views, measured on a drawn picture of ImageNet's usual size."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np

from proteus_jax.data import decode
from proteus_jax.data.transforms.random_resized_crop import TrainTransform
from proteus_jax.runtime.cpu_quota import cores

HEIGHT, WIDTH, QUALITY = 375, 500, 92
SECONDS = 1.0
GRAIN = 4.0


class Rate(NamedTuple):
    """Views a second of all cores together."""

    images: float
    cores: int


def views_per_second(recipe: TrainTransform, repeats: int) -> Rate:
    """Decodes a JPEG and makes `repeats` views of it, again and again, on every core for about a
    second.
    """
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    drawn = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    # Grain, without which it would be half as large as a photograph, and as quick to decode.
    grain = rng.normal(0, GRAIN, drawn.shape)
    drawn = np.clip(drawn + grain, 0, 255).astype(np.uint8)
    encoded = cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()

    def make(seed: int) -> tuple[int, float]:
        rng, made = np.random.default_rng(seed), 0
        start = time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            picture = decode.open_image(encoded, reused=repeats > 1)
            for _ in range(repeats):
                recipe(picture, rng)
            made += repeats
        return made, time.perf_counter() - start

    make(0)
    count = cores()
    with ThreadPoolExecutor(count) as pool:
        seconds = list(pool.map(make, range(count)))
    return Rate(sum(made / spent for made, spent in seconds), count)
