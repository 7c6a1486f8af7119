"""Image files as uint8 RGB arrays: JPEG by libjpeg-turbo, the rest, and all that is unusual, by
Pillow.
"""

from typing import Protocol, runtime_checkable

import cv2
import numpy as np
import simplejpeg

from proteus_jax.data.pillow_images import (
    PLAIN,
    Decoding,
    decode_with_pillow,
    is_turned,
    refuse_bomb,
)

REDUCTIONS = (8, 4, 2)
# Rows that a JPEG codes together, at most.
_MCU = 16


@runtime_checkable
class LazyImage(Protocol):
    """An image whose size is known and whose pixels may not be decoded yet."""

    height: int
    width: int

    @property
    def reductions(self) -> tuple[int, ...]:
        """Fractions of its size that it can be decoded at for less."""
        ...

    def pixels(self, reduction: int = 1, bottom: int | None = None) -> np.ndarray:
        """Uint8 [at least ceil(bottom / reduction), ceil(W / reduction), 3], upright, from the top;
        `reduction` is 1 or one of `reductions`, `bottom` a row of the whole or all.
        """
        ...


class _Pixels:
    reductions = ()

    def __init__(self, array: np.ndarray):
        self._array = array
        self.height, self.width = array.shape[:2]

    def pixels(self, reduction: int = 1, bottom: int | None = None) -> np.ndarray:
        return self._array


class _Jpeg:
    """Three or one channels, upright as they are: what libjpeg-turbo decodes without help."""

    reductions = REDUCTIONS

    def __init__(self, data: bytes, height: int, width: int, frame: int, reused: bool):
        self._data, self.height, self.width = data, height, width
        self._frame, self._reused = frame, reused
        self._decoded: dict[int, np.ndarray] = {}

    def pixels(self, reduction: int = 1, bottom: int | None = None) -> np.ndarray:
        rows = self.height if bottom is None or self._reused else bottom
        decoded = self._decoded.get(reduction)
        if decoded is None or len(decoded) * reduction < rows:
            decoded = self._decoded[reduction] = self._decode(reduction, rows)
        return decoded

    def _decode(self, reduction: int, rows: int) -> np.ndarray:
        data, strict = self._data, True
        # Two rows more, as colors of neighboring rows are mixed.
        rows = -(-(rows + 2) // _MCU) * _MCU
        if rows < self.height and self._frame and _ends(data):
            # A decoder stops at the height that the header tells; that data follow is no error
            # then, and Pillow reads past all else that strictness would refuse.
            data, strict = bytearray(data), False
            data[self._frame + 5 : self._frame + 7] = rows.to_bytes(2, "big")
        else:
            rows = self.height
        height, width = -(-rows // reduction), -(-self.width // reduction)
        try:
            if reduction == 1:
                return simplejpeg.decode_jpeg(data, strict=strict)
            return simplejpeg.decode_jpeg(
                data, min_height=height, min_width=width, min_factor=reduction, strict=strict
            )
        except Exception:
            # What it calls an error may be a flaw that Pillow reads past: Pillow is the judge.
            array = decode_with_pillow(self._data)
            if reduction > 1:
                whole = (width, -(-self.height // reduction))
                array = cv2.resize(array, whole, interpolation=cv2.INTER_AREA)
            return array


def open_image(
    content: bytes | np.ndarray, decoding: Decoding = PLAIN, *, reused: bool = False
) -> LazyImage:
    """A picture of a file's bytes, or of pixels uint8 [H, W, 3]; `reused` where more than one view
    of it is wanted.

    Unreadable where the bytes are no image; a file that ends too early may show it only when its
    pixels are asked for.
    """
    if isinstance(content, np.ndarray):
        return _Pixels(content)
    if content.startswith(b"\xff\xd8\xff"):
        tagged, frame = _markers(content)
        try:
            header = simplejpeg.decode_jpeg_header(content)
        except Exception:
            # It raises what it likes for what it does not know; Pillow is the judge.
            return _Pixels(decode_with_pillow(content))
        height, width, colors = int(header[0]), int(header[1]), header[2]
        refuse_bomb(width, height)
        if colors in ("YCbCr", "Gray") and not (tagged and is_turned(content)):
            return _Jpeg(content, height, width, frame, reused)
    return _Pixels(decode_with_pillow(content, decoding))


def decode(data: bytes, decoding: Decoding = PLAIN) -> np.ndarray:
    """Uint8 [H, W, 3], upright: EXIF orientation applied; gray, palette, CMYK, alpha and more than
    8 bits become RGB.

    Unreadable for anything that cannot be decoded whole.
    """
    return open_image(data, decoding).pixels()


def _markers(jpeg: bytes) -> tuple[bool, int]:
    """Returns whether a JPEG has a segment that may tell of an orientation (EXIF, XMP), and where
    its frame header begins if it is a baseline one; 0 if not.
    """
    tagged, frame, at = False, 0, 2
    while at + 10 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] != 0xDA:
        marker = jpeg[at + 1]
        if marker == 0xFF:  # any number of these may come before a marker
            at += 1
            continue
        tagged = tagged or marker == 0xE1
        frame = at if marker == 0xC0 else frame
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return tagged, frame


def _ends(jpeg: bytes) -> bool:
    """Returns True where a JPEG has its end: it was not cut short."""
    return jpeg.endswith(b"\xff\xd9") or b"\xff\xd9" in jpeg[-64:]
