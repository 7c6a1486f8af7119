"""The recipe as Pillow alone does it, step by step as timm arranges it: what benchmarks/input.py
measures against.
"""

import io
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

SIZE = 224
FILL = (124, 116, 104)
BICUBIC = Image.Resampling.BICUBIC


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=FILL
    )


def _lookup(image: Image.Image, table: np.ndarray) -> Image.Image:
    return image.point(np.clip(table, 0, 255).astype(int).tolist() * 3)


def _apply(image: Image.Image, name: int, magnitude: float, sign: int) -> Image.Image:
    """One of the fifteen operations, by number."""
    share, levels = magnitude / 10, np.arange(256)
    strength = max(0.1, 1 + sign * 0.9 * share)
    width, height = image.size
    match name:
        case 0:
            return ImageOps.autocontrast(image)
        case 1:
            return ImageOps.equalize(image)
        case 2:
            return ImageOps.invert(image)
        case 3:
            return image.rotate(sign * 30 * share, resample=BICUBIC, fillcolor=FILL)
        case 4:
            kept = 4 - int(4 * share)
            return ImageOps.posterize(image, kept) if kept else _lookup(image, 0 * levels)
        case 5:
            return ImageOps.solarize(image, 256 - int(256 * share))
        case 6:
            added = int(110 * share)
            return _lookup(image, np.where(levels < 128, levels + added, levels))
        case 7:
            return ImageEnhance.Color(image).enhance(strength)
        case 8:
            return ImageEnhance.Contrast(image).enhance(strength)
        case 9:
            return ImageEnhance.Brightness(image).enhance(strength)
        case 10:
            return ImageEnhance.Sharpness(image).enhance(strength)
        case 11:
            return _affine(image, 1, sign * 0.3 * share, 0, 0, 1, 0)
        case 12:
            return _affine(image, 1, 0, 0, sign * 0.3 * share, 1, 0)
        case 13:
            return _affine(image, 1, 0, sign * 0.45 * share * width, 0, 1, 0)
        case _:
            return _affine(image, 1, 0, 0, 0, 1, sign * 0.45 * share * height)


def _box(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area, ratio = rng.uniform(0.08, 1) * width * height, math.exp(rng.uniform(-1, 1) * 0.28768)
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if across <= width and down <= height:
            left, top = rng.integers(width - across + 1), rng.integers(height - down + 1)
            return int(left), int(top), int(left + across), int(top + down)
    side = min(width, height)
    return 0, 0, side, side


def view(jpeg: bytes, rng: np.random.Generator, *, randaugment: bool = True) -> np.ndarray:
    """Uint8 [224, 224, 3]: crop, resize, flip, and two operations that are each applied half of
    the time.
    """
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    image = image.crop(_box(rng, *image.size)).resize((SIZE, SIZE), BICUBIC)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for _ in range(2 * randaugment):
        if rng.random() < 0.5:
            magnitude = min(max(rng.normal(9, 0.5), 0), 10)
            image = _apply(image, int(rng.integers(15)), magnitude, 1 if rng.random() < 0.5 else -1)
    return np.asarray(image)
