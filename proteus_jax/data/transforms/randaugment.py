"""RandAugment's fifteen operations, "increasing" set, as timm 0.9.16 makes them with Pillow.

Each takes and gives contiguous uint8 [H, W, 3]. Source: timm/data/auto_augment.py's behavior;
colors differ from it by at most one level, geometry by what OpenCV's bicubic differs from
Pillow's (tests/golden.py).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from proteus_jax.data.transforms.resize import shifted, warped

MAXIMUM = 10.0
# What comes in from outside the image: the mean color of ImageNet.
FILL = (124, 116, 104)
# OpenCV rounds, halves to even; less this much before it cuts, and whole levels stay.
_CUT = 0.499
# ITU-R 601-2, as Pillow converts to gray.
_LUMINANCE = (0.299, 0.587, 0.114)


class Operation(NamedTuple):
    """`apply(image, argument)`, and the argument of a magnitude (0 to 10) and a sign (1 or -1)."""

    apply: Callable[[np.ndarray, float], np.ndarray]
    argument: Callable[[float, int], float]


def _table(values: np.ndarray) -> np.ndarray:
    """Float levels as Pillow stores them: clipped, and cut rather than rounded."""
    return values.clip(0, 255).astype(np.uint8)


def _gray(image: np.ndarray) -> np.ndarray:
    """Uint8 [H, W], the luminance of ITU-R 601-2."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _mixed(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Each pixel's channels mixed by [3, 4], cut to whole levels as Pillow cuts them."""
    matrix[:, 3] -= _CUT
    return cv2.transform(image, matrix)


def auto_contrast(image: np.ndarray, _: float) -> np.ndarray:
    """Each channel stretched to the whole range."""
    matrix = np.eye(3, 4)
    for channel, plane in enumerate(cv2.split(image)):
        low, high = cv2.minMaxLoc(plane)[:2]
        if high > low:
            scale = 255.0 / (high - low)
            matrix[channel, channel], matrix[channel, 3] = scale, -low * scale
    return _mixed(image, matrix)


def equalize(image: np.ndarray, _: float) -> np.ndarray:
    """Each channel's histogram made flat."""

    def flattened(plane: np.ndarray) -> np.ndarray:
        counts = cv2.calcHist([plane], [0], None, [256], [0, 256]).reshape(256)
        before = np.cumsum(counts) - counts
        # All pixels but those of the brightest level that there is, over the 255 steps.
        step = before[int(counts.nonzero()[0][-1])] // 255
        if not step:
            return plane
        return cv2.LUT(plane, _table((step // 2 + before) // step))

    return cv2.merge([flattened(plane) for plane in cv2.split(image)])


def invert(image: np.ndarray, _: float) -> np.ndarray:
    """The negative."""
    return cv2.bitwise_not(image)


def posterize(image: np.ndarray, bits: float) -> np.ndarray:
    """The highest bits of each level; 0 bits are black."""
    mask = 0xFF & ~(2 ** (8 - int(bits)) - 1)
    return image & np.uint8(mask)


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Levels from a threshold on inverted."""
    # All bits of a level turned over are the level's inverse.
    _, inverted = cv2.threshold(image, threshold - 1, 255, cv2.THRESH_BINARY)
    return cv2.bitwise_xor(image, inverted)


def solarize_add(image: np.ndarray, added: float) -> np.ndarray:
    """Levels below 128 made brighter."""
    # The threshold gives what it is told to, here the level that is added.
    return cv2.add(image, cv2.threshold(image, 127, added, cv2.THRESH_BINARY_INV)[1])


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Toward gray (below 1) or away from it."""
    matrix = np.zeros((3, 4))
    matrix[:, :3] = factor * np.eye(3) + (1 - factor) * np.array(_LUMINANCE)
    return _mixed(image, matrix)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Toward the mean gray (below 1) or away from it."""
    mean = int(cv2.mean(_gray(image))[0] + 0.5)
    matrix = factor * np.eye(3, 4)
    matrix[:, 3] = mean * (1 - factor)
    return _mixed(image, matrix)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Toward black (below 1) or away from it."""
    return cv2.convertScaleAbs(image, alpha=factor, beta=-_CUT)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Toward a smoothed image (below 1) or away from it; the border stays."""
    # Pillow smooths with ones around a five, over thirteen: nine thirteenths of a mean of nine,
    # and four of the pixel.
    mean = cv2.blur(image, (3, 3))
    own = factor + (1 - factor) * 4 / 13
    result = cv2.addWeighted(image, own, mean, 1 - own, 0)
    for edge in (np.s_[:1], np.s_[-1:], np.s_[:, :1], np.s_[:, -1:]):
        result[edge] = image[edge]
    return result


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Counterclockwise about the center."""
    height, width = image.shape[:2]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return warped(
        image,
        np.array(
            [
                [cosine, -sine, x - cosine * x + sine * y],
                [sine, cosine, y - sine * x - cosine * y],
            ]
        ),
        FILL,
    )


def shear_x(image: np.ndarray, factor: float) -> np.ndarray:
    """Rows moved in proportion to their height."""
    return warped(image, np.array([[1, factor, 0], [0, 1, 0]]), FILL)


def shear_y(image: np.ndarray, factor: float) -> np.ndarray:
    """Columns moved in proportion to their place."""
    return warped(image, np.array([[1, 0, 0], [factor, 1, 0]]), FILL)


def translate(image: np.ndarray, share: float, axis: int) -> np.ndarray:
    """Moved by a share of the side; axis 1 is across, 0 is down."""
    return shifted(image, share * image.shape[axis], axis, FILL)


def _none(magnitude: float, sign: int) -> float:
    return 0.0


def _signed(largest: float) -> Callable[[float, int], float]:
    return lambda magnitude, sign: sign * magnitude / MAXIMUM * largest


def _enhancement(magnitude: float, sign: int) -> float:
    return max(0.1, 1.0 + sign * magnitude / MAXIMUM * 0.9)


# In timm's order, which the draws below index.
OPERATIONS = {
    "AutoContrast": Operation(auto_contrast, _none),
    "Equalize": Operation(equalize, _none),
    "Invert": Operation(invert, _none),
    "Rotate": Operation(rotate, _signed(30.0)),
    "PosterizeIncreasing": Operation(posterize, lambda m, _: 4 - int(m / MAXIMUM * 4)),
    "SolarizeIncreasing": Operation(solarize, lambda m, _: 256 - min(256, int(m / MAXIMUM * 256))),
    "SolarizeAdd": Operation(solarize_add, lambda m, _: min(128, int(m / MAXIMUM * 110))),
    "ColorIncreasing": Operation(color, _enhancement),
    "ContrastIncreasing": Operation(contrast, _enhancement),
    "BrightnessIncreasing": Operation(brightness, _enhancement),
    "SharpnessIncreasing": Operation(sharpness, _enhancement),
    "ShearX": Operation(shear_x, _signed(0.3)),
    "ShearY": Operation(shear_y, _signed(0.3)),
    "TranslateXRel": Operation(functools.partial(translate, axis=1), _signed(0.45)),
    "TranslateYRel": Operation(functools.partial(translate, axis=0), _signed(0.45)),
}
_NAMES = tuple(OPERATIONS)


class RandAugment(NamedTuple):
    """RandAugment as timm's "rand-m9-mstd0.5-inc1": so many operations an image, drawn with
    replacement, each applied with a probability, its magnitude normal and clipped to 0 to 10, its
    sign even.

    No operations at all where `operations` is 0.
    """

    operations: int = 2
    magnitude: float = 9.0
    deviation: float = 0.5
    probability: float = 0.5

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float, int]]:
        """(name, magnitude, sign) of what is applied to one image, in order."""
        uniform = rng.random((self.operations, 3)).tolist()
        magnitudes = self.magnitude + self.deviation * rng.standard_normal(self.operations)
        return [
            (
                _NAMES[int(choice * len(_NAMES))],
                min(max(magnitude, 0.0), MAXIMUM),
                1 if sign < 0.5 else -1,
            )
            for (choice, applied, sign), magnitude in zip(uniform, magnitudes.tolist(), strict=True)
            if applied < self.probability
        ]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The augmented image."""
        for name, magnitude, sign in self.draw(rng):
            operation = OPERATIONS[name]
            image = operation.apply(image, operation.argument(magnitude, sign))
        return image
