"""The crop of evaluation: resized, and the middle cut out."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from proteus_jax.data import decode
from proteus_jax.data.pillow_images import MAXIMUM_PIXELS
from proteus_jax.errors import Unreadable


class CenterCrop(NamedTuple):
    """The shorter side resized to `resize` pixels (Pillow's antialiased bicubic), then the center
    square of `crop`.

    Source: torchvision's Resize and CenterCrop, which DINOv2 and Proteus evaluate with.
    """

    resize: int
    crop: int

    def __call__(self, picture: decode.LazyImage) -> np.ndarray:
        """Uint8 [crop, crop, 3]; Unreadable where a file turns out to be broken."""
        height, width = picture.height, picture.width
        pixels = picture.pixels()[:height, :width]
        shorter = min(height, width)
        if shorter != self.resize:
            # In whole numbers, as torchvision rounds down.
            sides = [self.resize * side // shorter for side in (height, width)]
            if sides[0] * sides[1] > MAXIMUM_PIXELS:
                raise Unreadable(f"{width} x {height} pixels are too thin to be resized")
            image = Image.fromarray(pixels)
            pixels = np.asarray(image.resize((sides[1], sides[0]), Image.Resampling.BICUBIC))
        top, left = (round((side - self.crop) / 2) for side in pixels.shape[:2])
        return pixels[top : top + self.crop, left : left + self.crop]
