"""The random views of the recipe, in numpy and Pillow, each a function of an explicit generator.

Source: arXiv 2407.10366 and timm 0.9.16 (RandomResizedCropAndInterpolation, bicubic).
"""

import math

import numpy as np
from PIL import Image

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


def crop_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random resized crop: area uniform in SCALE, aspect ratio
    log-uniform in RATIO.

    Where no attempt fits, the largest central box whose ratio is allowed.
    """
    log_ratio = (math.log(RATIO[0]), math.log(RATIO[1]))
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(*log_ratio))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width + 1))
            top = int(rng.integers(height - box_height + 1))
            return left, top, left + box_width, top + box_height
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    box_width = min(width, max(1, round(height * ratio)))
    box_height = min(height, max(1, round(width / ratio)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def random_view(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Uint8 [size, size, 3]: a random resized crop, bicubic with antialiasing, flipped half of the
    time.
    """
    box = crop_box(rng, image.shape[0], image.shape[1])
    # Crop first: resizing with a box would let pixels outside it bleed in at the border.
    crop = Image.fromarray(image[box[1] : box[3], box[0] : box[2]])
    view = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))
    return view[:, ::-1] if rng.random() < 0.5 else view
