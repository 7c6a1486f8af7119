"""Image files as uint8 RGB arrays: JPEG by libjpeg-turbo, the rest, and all that is unusual, by
Pillow.
"""

import io
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# A header can claim any size: what would need gigabytes is refused before it is decoded.
MAXIMUM_PIXELS = 2**27
Image.MAX_IMAGE_PIXELS = None
REDUCTIONS = (8, 4, 2)
_ORIENTATION = 0x0112


class Unreadable(Exception):
    """A file that should be an image and is none."""


@runtime_checkable
class Picture(Protocol):
    """An image whose size is known and whose pixels may not be decoded yet."""

    height: int
    width: int

    @property
    def reductions(self) -> tuple[int, ...]:
        """Fractions of its size that it can be decoded at for less."""
        ...

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """Uint8 [ceil(H / reduction), ceil(W / reduction), 3], upright; `reduction` is 1 or one of
        `reductions`.
        """
        ...


class _Pixels:
    reductions = ()

    def __init__(self, array: np.ndarray):
        self._array = array
        self.height, self.width = array.shape[:2]

    def pixels(self, reduction: int = 1) -> np.ndarray:
        return self._array


class _Jpeg:
    """Three or one channels, upright as they are: what libjpeg-turbo decodes without help."""

    reductions = REDUCTIONS

    def __init__(self, data: bytes, height: int, width: int):
        self._data, self.height, self.width = data, height, width
        # Repeated augmentation asks more than once.
        self._decoded: dict[int, np.ndarray] = {}

    def pixels(self, reduction: int = 1) -> np.ndarray:
        if reduction not in self._decoded:
            self._decoded[reduction] = self._decode(reduction)
        return self._decoded[reduction]

    def _decode(self, reduction: int) -> np.ndarray:
        height, width = -(-self.height // reduction), -(-self.width // reduction)
        try:
            if reduction == 1:
                return simplejpeg.decode_jpeg(self._data)
            return simplejpeg.decode_jpeg(
                self._data, min_height=height, min_width=width, min_factor=reduction
            )
        except ValueError:
            # What it calls an error may be a flaw that Pillow reads past: Pillow is the judge.
            array = _decode_with_pillow(self._data)
            if reduction > 1:
                array = cv2.resize(array, (width, height), interpolation=cv2.INTER_AREA)
            return array


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins so is a JPEG, PNG, WebP or BMP."""
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM")) or (
        head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    )


def opened(content: bytes | np.ndarray) -> Picture:
    """A picture of a file's bytes, or of pixels uint8 [H, W, 3].

    Unreadable where the bytes are no image; a file that ends too early may show it only when its
    pixels are asked for.
    """
    if isinstance(content, np.ndarray):
        return _Pixels(content)
    if content.startswith(b"\xff\xd8\xff") and not _has_exif(content):
        try:
            found = simplejpeg.decode_jpeg_header(content)
        except ValueError:
            return _Pixels(_decode_with_pillow(content))
        height, width, colours = int(found[0]), int(found[1]), found[2]
        _refuse_bomb(width, height)
        if colours in ("YCbCr", "Gray"):
            return _Jpeg(content, height, width)
    return _Pixels(_decode_with_pillow(content))


def decode(data: bytes) -> np.ndarray:
    """Uint8 [H, W, 3], upright: EXIF orientation applied; grey, palette, CMYK, alpha and 16 bits
    become RGB.

    Unreadable for anything that cannot be decoded whole.
    """
    return opened(data).pixels()


def _has_exif(jpeg: bytes) -> bool:
    """Whether a JPEG has EXIF data, which may turn it."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] != 0xDA:
        if jpeg[at + 1] == 0xE1 and jpeg[at + 4 : at + 10] == b"Exif\0\0":
            return True
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAXIMUM_PIXELS:
        raise Unreadable(f"{width} x {height} pixels are more than {MAXIMUM_PIXELS}")


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_bomb(image.width, image.height)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                # Pillow's own conversion would clip 16 bits to white.
                grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                upright = Image.fromarray(grey)
            return np.asarray(upright.convert("RGB"))
    except Unreadable:
        raise
    except Exception as error:
        # Decoders raise whatever a broken file provokes (OSError, SyntaxError, struct.error, ...).
        raise Unreadable(f"{type(error).__name__}: {error}") from None
