"""The random views of the recipe, each a function of an explicit generator.

Source: arXiv 2407.10366 and timm 0.9.16 (RandomResizedCropAndInterpolation, bicubic, flip,
RandAugment). Random erasing, which comes last, is done on the device
(proteus_jax/training/random_erasing.py).
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

from proteus_jax.data import decode
from proteus_jax.data.transforms.randaugment import RandAugment
from proteus_jax.data.transforms.resize import resized

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
_LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))
# A JPEG is decoded at a half, a quarter or an eighth only where so much is left to be resized
# properly.
_LEFT_TO_RESIZE = 1.5


class Box(NamedTuple):
    """Edges in pixels; right and bottom are the first ones outside."""

    left: int
    top: int
    right: int
    bottom: int


def crop_box(rng: np.random.Generator, height: int, width: int) -> Box:
    """A random resized crop: area uniform in SCALE, aspect ratio log-uniform in RATIO.

    Where no attempt fits, the largest central box whose ratio is allowed.
    """
    for _ in range(ATTEMPTS):
        area = height * width * (SCALE[0] + rng.random() * (SCALE[1] - SCALE[0]))
        ratio = math.exp(_LOG_RATIO[0] + rng.random() * (_LOG_RATIO[1] - _LOG_RATIO[0]))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.random() * (width - box_width + 1))
            top = int(rng.random() * (height - box_height + 1))
            return Box(left, top, left + box_width, top + box_height)
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    box_width = min(width, max(1, round(height * ratio)))
    box_height = min(height, max(1, round(width / ratio)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return Box(left, top, left + box_width, top + box_height)


def resized_crop(picture: decode.LazyImage, box: Box, size: int) -> np.ndarray:
    """Uint8 [size, size, 3]: a box of a picture, bicubic with antialiasing.

    A box so large that the file can be decoded at a fraction of its size is moved by less than
    that fraction, to begin and end between its pixels.
    """
    least = min(box.right - box.left, box.bottom - box.top) / size
    reduction = next((r for r in picture.reductions if least >= r * _LEFT_TO_RESIZE), 1)
    pixels = picture.pixels(reduction, box.bottom)
    left, top, right, bottom = (edge // reduction for edge in box)
    # Crop first: resizing with a box would let pixels outside it bleed in at the border.
    return resized(pixels[top:bottom, left:right], size)


class TrainTransform(NamedTuple):
    """The transform of training images: a random resized crop of `size` pixels, flipped half of the
    time, then RandAugment.
    """

    size: int
    randaugment: RandAugment = RandAugment(operations=0)

    def __call__(self, picture: decode.LazyImage, rng: np.random.Generator) -> np.ndarray:
        """A view, uint8 [size, size, 3]; Unreadable where a file turns out to be broken."""
        box = crop_box(rng, picture.height, picture.width)
        flipped = rng.random() < 0.5
        view = resized_crop(picture, box, self.size)
        if flipped:
            view = cv2.flip(view, 1)
        return self.randaugment(view, rng)
