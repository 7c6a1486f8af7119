"""Every image that is no plain JPEG, by Pillow; colors of more than 8 bits by OpenCV, as Pillow
drops the lower bits of those.
"""

import contextlib
import importlib
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageColor, ImageOps, TiffImagePlugin

from proteus_jax.data.image_formats import FORMATS, HAS_HEIF, HEIF_PLUGIN
from proteus_jax.data.pixel_range import AUTO, FULL, DeepImage, PixelRange
from proteus_jax.errors import Unreadable

# A header can claim any size: what would need gigabytes is refused before it is decoded.
MAXIMUM_PIXELS = 2**27
Image.MAX_IMAGE_PIXELS = None
if HAS_HEIF:
    importlib.import_module(HEIF_PLUGIN).register_heif_opener()

DROP = "drop"
_OPAQUE = 255
_TIFF = (b"II*\0", b"MM\0*")
# Tags of TIFF.
_WIDTH, _HEIGHT, _BITS, _CHANNELS, _SAMPLE_FORMAT = 256, 257, 258, 277, 339
_UNSIGNED = 1
ORIENTATION = 0x0112


class Decoding(NamedTuple):
    """How files become uint8 RGB: the range of images of more than 8 bits, and what becomes of
    transparency: dropped, so that hidden colors show, or laid on a color.
    """

    range: PixelRange = AUTO
    alpha: Literal["drop"] | tuple[int, int, int] = DROP

    @classmethod
    def of(cls, range_: str, alpha: str) -> "Decoding":
        """Reads the fields data.range (auto, full, or LOW,HIGH) and data.alpha (drop, or a color as
        white or #808080). ValueError for anything else.
        """
        limits: PixelRange = range_  # pyright: ignore[reportAssignmentType]
        if range_ not in (AUTO, FULL):
            low, high = (float(part) for part in range_.split(","))
            if not -math.inf < low < high < math.inf:
                raise ValueError(range_)
            limits = (low, high)
        color = DROP if alpha == DROP else ImageColor.getrgb(alpha)[:3]
        return cls(limits, color)


PLAIN = Decoding()


@contextlib.contextmanager
def image_of(data: bytes) -> Iterator[Image.Image]:
    """Opens an image by its header. Unreadable for whatever goes wrong with it in the block."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except Unreadable:
        raise
    except Exception as error:
        # Decoders raise whatever a broken file provokes (OSError, SyntaxError, struct.error, ...).
        raise Unreadable(f"{type(error).__name__}: {_without_addresses(str(error))}") from None


def decode_with_pillow(data: bytes, decoding: Decoding = PLAIN) -> np.ndarray:
    """Uint8 [H, W, 3], upright: the first page or frame of an image."""
    deep = _of_floating_colors(data)
    if deep is not None:
        return _from_deep(deep, decoding)
    with image_of(data) as image:
        refuse_bomb(image.width, image.height)
        deep = _deep(image, data)
        if deep is not None:
            return _from_deep(deep, decoding)
        upright = ImageOps.exif_transpose(image)
        if decoding.alpha != DROP and upright.has_transparency_data:
            page = Image.new("RGBA", upright.size, (*decoding.alpha, _OPAQUE))
            upright = Image.alpha_composite(page, upright.convert("RGBA"))
        return np.asarray(upright.convert("RGB"))


def deep_image(data: bytes) -> DeepImage | None:
    """The values of an image of more than 8 bits, upright; None of any other."""
    deep = _of_floating_colors(data)
    if deep is not None:
        return deep
    with image_of(data) as image:
        refuse_bomb(image.width, image.height)
        return _deep(image, data)


def is_turned(data: bytes) -> bool:
    """Returns True where an image would be turned or mirrored to stand upright."""
    try:
        with image_of(data) as image:
            return image.getexif().get(ORIENTATION, 1) not in (0, 1)
    except Unreadable:
        return True  # for the decoder to say what is wrong


def refuse_bomb(width: int, height: int) -> None:
    """Unreadable for an image that would take gigabytes."""
    if width * height > MAXIMUM_PIXELS:
        raise Unreadable(f"{width} x {height} pixels are more than {MAXIMUM_PIXELS}")


def _deep(image: Image.Image, data: bytes) -> DeepImage | None:
    if image.mode.startswith(("I", "F")):
        unsigned = _is_unsigned_32(image)
        bits = _bits(image)
        values = np.asarray(ImageOps.exif_transpose(image))
        return _of_one_channel(values.view(np.uint32) if unsigned else values, bits)
    if not _has_deep_colors(image, data):
        return None
    if image.format == "PPM":
        return _of_ppm(image, data)
    return _of_colors(data, int(image.getexif().get(ORIENTATION, 1)))


def _of_one_channel(values: np.ndarray, bits: int) -> DeepImage:
    if values.dtype.kind == "f":
        return DeepImage(values, 0.0, 1.0)
    if values.dtype.kind == "u":
        return DeepImage(values, 0.0, float(np.iinfo(values.dtype).max))
    # Pillow holds as signed 32 bits what has 16 of either kind, and what has 32.
    if bits == 16 and values.min(initial=0) >= 0:
        return DeepImage(values, 0.0, 65535.0)
    return DeepImage(values, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)


def _of_colors(data: bytes, orientation: int) -> DeepImage:
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    values = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if values is None or values.ndim != 3 or values.shape[2] not in (3, 4):
        raise Unreadable("colors of more than 8 bits, which OpenCV cannot decode")
    values = _upright(values, orientation)
    highest = float(np.iinfo(values.dtype).max) if values.dtype.kind == "u" else 1.0
    alpha = values[..., 3] / highest if values.shape[2] == 4 else None
    return DeepImage(np.ascontiguousarray(values[..., 2::-1]), 0.0, highest, alpha)


def _of_floating_colors(data: bytes) -> DeepImage | None:
    """TIFF whose channels Pillow has no mode for: colors in floating point. None of any other file;
    Unreadable where there are not 1, 3 or 4 channels.
    """
    if not data.startswith(_TIFF):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)):
            return None
    except Exception:
        tags = _tiff_tags(data)
    channels = int(tags.get(_CHANNELS, 1))
    if channels not in (1, 3, 4):
        raise Unreadable(f"expected 1, 3 or 4 channels, found {channels}")
    if channels == 1 or _BITS not in tags:
        return None  # for Pillow to say what is wrong
    refuse_bomb(int(tags.get(_WIDTH, 0)), int(tags.get(_HEIGHT, 0)))
    return _of_colors(data, int(tags.get(ORIENTATION, 1)))


def _tiff_tags(data: bytes) -> Mapping[int, Any]:
    """Tags of a TIFF's first page; none where it is broken."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    with contextlib.suppress(Exception):
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return {number: tags[number] for number in tags}
    return {}


def _of_ppm(image: Image.Image, data: bytes) -> DeepImage:
    """Binary PPM of two bytes a value, which Pillow scales by the largest value it may have."""
    tile = _tile(image)
    shape = (image.height, image.width, 3)
    values = np.frombuffer(data, ">u2", int(np.prod(shape)), tile[2]).reshape(shape)
    return DeepImage(values, 0.0, float(tile[3][1]))


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors as the EXIF orientation asks for."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    flipped_rows = orientation in (3, 4, 7, 8)
    flipped_columns = orientation in (2, 3, 6, 7)
    return values[:: -1 if flipped_rows else 1, :: -1 if flipped_columns else 1]


def _from_deep(deep: DeepImage, decoding: Decoding) -> np.ndarray:
    pixels = deep.to_uint8(decoding.range)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if deep.alpha is None or decoding.alpha == DROP:
        return pixels
    share = deep.alpha[..., None]
    page = np.array(decoding.alpha, np.float64)
    return np.rint(pixels * share + page * (1 - share)).astype(np.uint8)


def _tile(image: Image.Image) -> Any:
    """The decoder, the extents, the offset and the arguments by which Pillow reads a file."""
    tiles = getattr(image, "tile", None)
    return tiles[0] if tiles else ("", None, 0, "")


def _raw_mode(image: Image.Image) -> str:
    """How an image's file packs its pixels, in Pillow's words."""
    arguments = _tile(image)[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _has_deep_colors(image: Image.Image, data: bytes) -> bool:
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    if image.format == "JPEG2000":
        return _jpeg2000_bits(data) > 8
    if image.format == "PPM":
        tile = _tile(image)
        return tile[0] == "ppm" and tile[3][1] > 255
    return ";16" in _raw_mode(image)


def _jpeg2000_bits(data: bytes) -> int:
    """Bits of the first channel, as the marker that begins the codestream tells."""
    at = data.find(b"\xff\x4f\xff\x51")
    return (data[at + 42] & 0x7F) + 1 if 0 <= at < len(data) - 42 else 8


def _bits(image: Image.Image) -> int:
    """Bits of a channel in an image's file, where Pillow has 32: those that TIFF tells, or 16 as
    PNG and PGM have at most.
    """
    tags = getattr(image, "tag_v2", None)
    return int(tags.get(_BITS, (16,))[0]) if tags is not None else 16


def _is_unsigned_32(image: Image.Image) -> bool:
    tags = getattr(image, "tag_v2", None)
    if image.mode != "I" or tags is None or _bits(image) != 32:
        return False
    return int(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0]) == _UNSIGNED


def _without_addresses(text: str) -> str:
    """Replaces what Pillow says of a file that it cannot identify, which holds an address."""
    return "no image that can be read" if "cannot identify image file" in text else text
