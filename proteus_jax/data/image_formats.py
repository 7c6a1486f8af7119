"""The image formats that are read: their suffixes, and how their files begin."""

import functools
import importlib.util
from pathlib import PurePosixPath

# Pillow's names of formats, and the suffixes that each goes by. Of those that Pillow knows these
# are not read: EPS and PS (which would run a program), WMF and EMF (Windows only), BUFR, GRIB,
# HDF5 and MPEG (known to Pillow by name only).
_READ = {
    "AVIF": (".avif", ".avifs"),
    "BLP": (".blp",),
    "BMP": (".bmp",),
    "CUR": (".cur",),
    "DCX": (".dcx",),
    "DDS": (".dds",),
    "DIB": (".dib",),
    "FITS": (".fit", ".fits"),
    "FLI": (".fli", ".flc"),
    "FTEX": (".ftc", ".ftu"),
    "GBR": (".gbr",),
    "GIF": (".gif",),
    "ICNS": (".icns",),
    "ICO": (".ico",),
    "IM": (".im",),
    "IPTC": (".iim",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "MPO": (".mpo",),
    "MSP": (".msp",),
    "PCD": (".pcd",),
    "PCX": (".pcx",),
    "PIXAR": (".pxr",),
    "PNG": (".png", ".apng"),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "SGI": (".bw", ".rgb", ".rgba", ".sgi"),
    "SUN": (".ras",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
}
HEIF, _HEIF_SUFFIXES = "HEIF", (".heic", ".heif", ".hif")
# Registers HEIF with Pillow where it is installed (the extra heic).
HEIF_PLUGIN = "pillow_heif"
HAS_HEIF = importlib.util.find_spec(HEIF_PLUGIN) is not None

# Pillow opens what cameras of two lenses write (MPO) as JPEG.
FORMATS = tuple(name for name in _READ if name != "MPO") + ((HEIF,) if HAS_HEIF else ())
SUFFIXES = tuple(suffix for suffixes in _READ.values() for suffix in suffixes)
SUFFIXES += _HEIF_SUFFIXES if HAS_HEIF else ()
_KNOWN = frozenset(SUFFIXES)

_BEGINNINGS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "BMP": (b"BM",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "JPEG2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "PPM": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF"),
    "QOI": (b"qoif",),
    "DDS": (b"DDS ",),
    "PSD": (b"8BPS",),
    "ICO": (b"\0\0\1\0",),
    "CUR": (b"\0\0\2\0",),
    "ICNS": (b"icns",),
    "SGI": (b"\x01\xda",),
    "FITS": (b"SIMPLE  =",),
    "SUN": (b"\x59\xa6\x6a\x95",),
    "XPM": (b"/* XPM */",),
}
_ALWAYS = tuple(
    beginning
    for name, beginnings in _BEGINNINGS.items()
    for beginning in beginnings
    if name not in ("BMP", "PPM", "ICO", "CUR", "SGI")
)
# Two bytes, or bytes as common as zero and one, say little: the suffix has to say the same.
_AMBIGUOUS = {
    suffix: _BEGINNINGS[name] for name in ("PPM", "ICO", "CUR", "SGI") for suffix in _READ[name]
}
# The suffix alone tells these.
_UNMARKED = frozenset(
    suffix
    for name, suffixes in _READ.items()
    if name not in (*_BEGINNINGS, "WEBP", "AVIF", "MPO")
    for suffix in suffixes
)
_AVIF_BRANDS, _HEIF_BRANDS = (b"avif", b"avis"), (b"heic", b"heix", b"hevc", b"hevx", b"heim")
# As many bytes as tell the format.
HEAD = 64


def has_image_suffix(name: str) -> bool:
    """Returns True for a file name whose suffix is that of an image, in any case."""
    return suffix_of(name) in _KNOWN


def suffix_of(name: str) -> str:
    """Returns the suffix of a file name in lower case, with its dot; "" where there is none."""
    return PurePosixPath(name).suffix.lower()


def looks_like_image(head: bytes, name: str = "") -> bool:
    """Returns True for the first HEAD bytes of a file of a format that is read.

    Some formats have no mark of their own: of those the suffix of `name` decides.
    """
    if head.startswith(_ALWAYS) or (head.startswith(b"BM") and _is_bmp(head)):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        return _is_heif_or_avif(head)
    suffix = suffix_of(name)
    if suffix in _AMBIGUOUS or (not suffix and head[:2] in _BEGINNINGS["PPM"]):
        return head.startswith(_AMBIGUOUS.get(suffix, _BEGINNINGS["PPM"])) and head[2:3] != b""
    return suffix in _UNMARKED and head != b""


def _is_bmp(head: bytes) -> bool:
    """Returns True where what follows "BM" is a header of a length that the format knows."""
    return int.from_bytes(head[14:18], "little") in (12, 40, 52, 56, 64, 108, 124)


def _is_heif_or_avif(head: bytes) -> bool:
    length = int.from_bytes(head[:4], "big")
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(length, HEAD), 4))]
    wanted = _AVIF_BRANDS + (_HEIF_BRANDS if HAS_HEIF else ())
    return any(brand in wanted for brand in brands)


@functools.cache
def listed() -> str:
    """Names the formats for messages, by their common suffixes."""
    return "JPEG, PNG, WebP, TIFF, AVIF, GIF, BMP, JPEG 2000, PPM" + ", HEIC" * HAS_HEIF
