"""Images at their own sizes, rounded to whole patches."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from proteus_jax.data.decode import LazyImage

# As many patches as one image may have; a larger one is scaled down to so many.
MOST_PATCHES = 16384


class NativeSize(NamedTuple):
    """Each side resized (Pillow's antialiased bicubic) to the multiple of `patch` that is nearest,
    and at least one; an image of more than `most` patches is scaled down first.
    """

    patch: int
    most: int = MOST_PATCHES

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image gets."""
        scale = min(1.0, (self.most * self.patch**2 / (height * width)) ** 0.5)
        rows, columns = (max(1, round(side * scale / self.patch)) for side in (height, width))
        return rows * self.patch, columns * self.patch

    def __call__(self, picture: LazyImage) -> np.ndarray:
        """Uint8 [h, w, 3]; Unreadable where a file turns out to be broken."""
        pixels = picture.pixels()[: picture.height, : picture.width]
        height, width = self.sides(picture.height, picture.width)
        if pixels.shape[:2] == (height, width):
            return pixels
        resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized)
