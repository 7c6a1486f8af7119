"""Image files as uint8 RGB arrays."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# A header can claim any size: what would need gigabytes is refused before it is decoded.
MAXIMUM_PIXELS = 2**27
Image.MAX_IMAGE_PIXELS = None


class Unreadable(Exception):
    """A file that should be an image and is none."""


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins so is a JPEG, PNG, WebP or BMP."""
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM")) or (
        head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    )


def decode(data: bytes) -> np.ndarray:
    """Uint8 [H, W, 3], upright: EXIF orientation applied; grey, palette, CMYK, alpha and 16 bits
    become RGB.

    Unreadable for anything that cannot be decoded whole.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "BMP")) as image:
            if image.width * image.height > MAXIMUM_PIXELS:
                raise Unreadable(
                    f"{image.width} x {image.height} pixels are more than {MAXIMUM_PIXELS}"
                )
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


def read(path: str | Path) -> np.ndarray:
    """`decode` of a file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    return decode(data)
