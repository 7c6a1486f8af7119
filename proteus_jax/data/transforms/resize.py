"""Crops resized as Pillow's antialiased bicubic does it, at a fraction of the time.

OpenCV's linear resize is fast and aliases. A short filter before it, the one that brings the two
together nearest to Pillow's kernel, leaves a mean difference of half a level (of 255) on
photographs and of less than two on the roughest textures (tests/data/test_augment.py).
"""

import functools
import math

import cv2
import numpy as np

# Work is spread over images, not over the pixels of one; OpenCV's own threads would only wait for
# each other.
cv2.setNumThreads(1)
# Neighboring pixels of photographs correlate about so.
_CORRELATION = 0.95
_REACH = 12
_PHASES = (np.arange(8) + 0.5) / 8
# Shrinking by more than this is done in two parts, the first one a mean of whole blocks.
_LARGEST_SCALE = 4.0


def bicubic_weights(distance: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic kernel; -0.5 is what Pillow resizes with."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache(maxsize=512)
def _prefilter(scale: float) -> np.ndarray:
    """The symmetric filter, float32, after which linear sampling comes nearest to
    the bicubic kernel stretched by `scale`.

    A least-squares fit over all phases, weighted by the correlation of pixels.
    """
    scale = max(scale, 1.0)
    half = 1 if scale < 1.16 else math.ceil(1.14 * scale - 0.2)
    offsets = np.arange(-_REACH, _REACH + 2)
    root = np.linalg.cholesky(_CORRELATION ** np.abs(offsets[:, None] - offsets)).T
    columns, wanted = [], []
    for phase in _PHASES:
        target = bicubic_weights((offsets - phase) / scale)
        linear = np.stack(
            [
                sum(
                    (1 - phase) * (offsets == shift) + phase * (offsets == 1 + shift)
                    for shift in {tap, -tap}
                )
                for tap in range(half + 1)
            ],
            axis=1,
        )
        # The taps sum to one: the middle one follows from the others.
        columns.append(root @ (linear[:, 1:] - 2 * linear[:, :1]))
        wanted.append(root @ (target / target.sum() - linear[:, 0]))
    side = np.linalg.lstsq(np.concatenate(columns), np.concatenate(wanted), rcond=None)[0]
    return np.concatenate([side[::-1], [1 - 2 * side.sum()], side]).astype(np.float32)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """Uint8 [size, size, 3] of uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    blocks = (_blocks(height / size), _blocks(width / size))
    if blocks != (1, 1):
        shape = (max(width // blocks[1], 1), max(height // blocks[0], 1))
        image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
        height, width = image.shape[:2]
    if height == width == size:
        return np.ascontiguousarray(image)
    # Scales in steps of a 16th: few different filters, and no visible difference.
    across, down = (_prefilter(round(length / size * 16) / 16) for length in (width, height))
    smooth = cv2.sepFilter2D(image, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(smooth, (size, size), interpolation=cv2.INTER_LINEAR)


def _blocks(scale: float) -> int:
    return int(scale / 2) if scale > _LARGEST_SCALE else 1


def warped(image: np.ndarray, matrix: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    """Uint8 [H, W, 3]: output (x, y) taken, bicubic, from input matrix @ (x, y, 1), pixel centers
    at halves as in Pillow; `fill` outside.
    """
    centered = np.array(matrix, np.float64).reshape(2, 3)
    centered[:, 2] += centered[:, :2] @ (0.5, 0.5) - 0.5
    # In float32 OpenCV's bicubic warp is a third faster than in uint8.
    taken = cv2.warpAffine(
        image.astype(np.float32),
        centered,
        (image.shape[1], image.shape[0]),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderValue=fill,
    )
    return rounded(taken)


def rounded(values: np.ndarray) -> np.ndarray:
    """Uint8 of float32, rounded and clipped."""
    return cv2.convertScaleAbs(cv2.max(values, 0, dst=values))  # pyright: ignore[reportArgumentType, reportCallIssue]


def shifted(image: np.ndarray, pixels: float, axis: int, fill: tuple[int, int, int]) -> np.ndarray:
    """Uint8 [H, W, 3]: output position p along an axis (0 down, 1 across) taken, bicubic, from
    input p + pixels; `fill` outside.
    """
    whole, near = math.floor(pixels), math.floor(pixels + 0.5)
    length = image.shape[axis]
    # The outputs whose source is inside: its center is at most half a pixel beyond the edge.
    start, stop = max(0, -near), min(length, length - near)
    if start >= stop:
        return np.full_like(image, fill)
    taps = bicubic_weights(np.arange(-1, 3) - (pixels - whole), a=-1.0).astype(np.float32)
    kernel, anchor = (taps[None], (1, 0)) if axis else (taps[:, None], (0, 1))
    # One more pixel before the first, for a source beyond the edge.
    edges = (0, 0, 1, 0) if axis else (1, 0, 0, 0)
    padded = cv2.copyMakeBorder(image, *edges, cv2.BORDER_REPLICATE)
    # Filtered is what is kept, and the neighbors that it needs.
    first = start + whole + 1
    low, high = max(first - 1, 0), stop + whole + 3
    part = padded[:, low:high] if axis else padded[low:high]
    between = cv2.filter2D(part, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
    source = slice(first - low, first - low + stop - start)
    kept = between[:, source] if axis else between[source]
    fills = (0, 0, start, length - stop) if axis else (start, length - stop, 0, 0)
    return cv2.copyMakeBorder(kept, *fills, cv2.BORDER_CONSTANT, value=fill)
