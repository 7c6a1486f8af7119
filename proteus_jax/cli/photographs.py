"""The photographs that two forms of a model are compared on."""

from pathlib import Path

import numpy as np

from proteus_jax.data import decode
from proteus_jax.data.dataset import open_source
from proteus_jax.data.sources import skimage
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.errors import InputError, Unreadable

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def photographs(folder: Path | None, height: int, width: int) -> np.ndarray:
    """Middles of photographs, uint8 [n, height, width, 3]: the first four of a folder, or four of
    scikit-image's. InputError where one is broken.
    """
    side = max(height, width)
    square = CenterCrop(side, side)
    top, left = (side - height) // 2, (side - width) // 2

    def view(picture: decode.LazyImage) -> np.ndarray:
        return square(picture)[top : top + height, left : left + width]

    if folder is None:
        ours = skimage.obtain_pictures()
        return np.stack(
            [view(decode.open_image((ours / name).read_bytes())) for name in PHOTOGRAPHS]
        )
    source, _ = open_source(str(folder))
    squares = []
    for index in range(min(len(source), len(PHOTOGRAPHS))):
        try:
            squares.append(view(source.open(index)))
        except Unreadable as error:
            raise InputError(f"{folder}: {source.name(index)}: {error}") from None
    return np.stack(squares)
