"""Images in zip files, read in place: nothing is unpacked to the disk."""

import contextlib
import functools
import hashlib
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from proteus_jax.data import image_formats
from proteus_jax.data.mmap_table import Names, Table
from proteus_jax.data.passed_over import PassedOver, joined, kind_of, lies_in_clutter
from proteus_jax.data.sources.archive import folder_paths, leaves_archive
from proteus_jax.data.sources.base import FOUND, Columns, Source, folder_classes
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime import remote_fs

# What a member may be once it is unpacked, in bytes, and how many members there may be.
MOST_BYTES, MOST_MEMBERS = 1 << 30, 1 << 24
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
# The header before each member: a mark, fields that the directory repeats, two lengths.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MARK = b"PK\x03\x04"
_LINK, _TYPE = 0o120000, 0o170000


class ZipSource(Source):
    """Images of zip files, read by their offsets."""

    def __init__(self, paths: Sequence[str], table: Table):
        self._paths, self._table = list(paths), table
        self._names = Names(table.columns["text"], table.columns["ends"])
        self.fingerprint: str = table.facts["fingerprint"]

    def __reduce__(self) -> tuple:
        return ZipSource, (self._paths, self._table)

    def __len__(self) -> int:
        return len(self._names.ends)

    def name(self, index: int) -> str:
        """File and member."""
        return f"{self._paths[int(self._table.columns['file'][index])]}: {self._names[index]}"

    def key(self, index: int) -> str:
        """See Source."""
        return remote_fs.absolute(self.name(index))

    @functools.cached_property
    def _folders(self) -> list[str]:
        return folder_paths([self._names[index] for index in range(len(self))])

    def path(self, index: int) -> str:
        """See Source."""
        return self._folders[index]

    def labels(self) -> np.ndarray | None:
        """The folder that holds an image is its class; None where one holds all."""
        return folder_classes(self._folders)

    def read(self, index: int) -> bytes:
        """See Source. What unpacks to more than the directory says is refused."""
        columns = self._table.columns
        offset, packed, size, method, checksum = (
            int(columns[name][index]) for name in ("offset", "packed", "size", "method", "crc")
        )
        if size > MOST_BYTES:
            raise Unreadable(f"{size} bytes are more than {MOST_BYTES}")
        try:
            with remote_fs.open_file(self._paths[int(columns["file"][index])]) as file:
                file.seek(offset)
                mark, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                file.seek(offset + _LOCAL_HEADER.size + name + extra)
                content = file.read(packed)
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None
        except (struct.error, zlib.error) as error:
            raise Unreadable(f"broken in its archive: {error}") from None
        if mark != _MARK or len(content) != size or zlib.crc32(content) != checksum:
            raise Unreadable("broken in its archive")
        return content


def open_zip(paths: Sequence[str], columns: Columns = FOUND) -> tuple[ZipSource, PassedOver]:
    """The images of zip files, in the order of the files and of the names in each, and what was
    passed over.

    InputError for what is no zip file, is encrypted or packed in an uncommon way, or holds no
    image.
    """
    listed = [_images(path) for path in paths]
    rows = [(number, info) for number, (images, _) in enumerate(listed) for info in images]
    passed = joined(part for _, part in listed)
    if not rows:
        there = "; ".join(passed.lines()) or "nothing at all"
        raise InputError(f"{paths[0]}: no image (of {image_formats.listed()}), but {there}")
    names = Names.of([info.filename for _, info in rows])
    table = {"text": names.text, "ends": names.ends}
    table["file"] = np.array([number for number, _ in rows], np.int64)
    for column, field in (
        ("offset", "header_offset"),
        ("packed", "compress_size"),
        ("size", "file_size"),
        ("method", "compress_type"),
        ("crc", "CRC"),
    ):
        table[column] = np.array([getattr(info, field) for _, info in rows], np.int64)
    content = hashlib.sha256()
    for column in table.values():
        content.update(column.data)
    return ZipSource(paths, Table({"fingerprint": content.hexdigest()}, table)), passed


def _images(path: str) -> tuple[list[zipfile.ZipInfo], PassedOver]:
    try:
        with remote_fs.open_file(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            images, passed = _sorted_out(path, archive, members)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: expected a zip file: {error}") from None
    strange = [info for info in images if info.compress_type not in _METHODS]
    if any(info.flag_bits & _ENCRYPTED for info in images):
        raise InputError(f"{path}: is encrypted; unpack it")
    if strange:
        raise InputError(f"{path}: {strange[0].filename} is packed in an uncommon way; unpack it")
    if len(members) > MOST_MEMBERS:
        raise InputError(f"{path}: {len(members)} members are more than {MOST_MEMBERS}; unpack it")
    return sorted(images, key=lambda info: info.filename), passed


def _sorted_out(
    path: str, archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo]
) -> tuple[list[zipfile.ZipInfo], PassedOver]:
    images: list[zipfile.ZipInfo] = []
    kinds, hidden, links = Counter[str](), 0, 0
    for info in members:
        name = info.filename
        if info.is_dir():
            continue
        if (info.external_attr >> 16) & _TYPE == _LINK or leaves_archive(name):
            links += 1
        elif lies_in_clutter(name):
            hidden += 1
        elif _is_image(archive, info):
            images.append(info)
        else:
            kinds[kind_of(name)] += 1
    return images, PassedOver(dict(kinds), hidden, links)


def _is_image(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    if image_formats.suffix_of(info.filename):
        return image_formats.has_image_suffix(info.filename)
    if info.flag_bits & _ENCRYPTED:
        return False
    # Whatever a broken member provokes: it is no image then.
    with contextlib.suppress(Exception), archive.open(info) as file:
        return image_formats.looks_like_image(file.read(image_formats.HEAD))
    return False
