"""Files of `torch.save` without PyTorch: both forms are read as data, the newer one is written.

Since PyTorch 1.6 a file is an uncompressed zip archive: `NAME/data.pkl` describes the objects, and
`NAME/data/KEY` holds the bytes of each storage. Before, it was a row of pickles with the storages
behind them. The pickle is read by `inert_pickle`: no object in it is built.
"""

import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proteus_jax.errors import InputError, refusing
from proteus_jax.weights.convert import inert_pickle
from proteus_jax.weights.convert.inert_pickle import Global
from proteus_jax.weights.convert.torch_dtypes import BY_NAME, BY_STORAGE

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# A tensor may repeat its storage (expanded ones do), and an archive may be compressed: but what a
# file grows to in memory stays within this many times its size, and so many bytes.
GROWTH, ALLOWANCE = 16, 1 << 26
MOST_DIMENSIONS = 32
LONGEST_PICKLE = 1 << 28


class Storage(NamedTuple):
    """Bytes of a file that tensors are views of: from `start` in elements of `dtype`."""

    key: str
    dtype: np.dtype
    start: int = 0


class Tensor(NamedTuple):
    """A tensor that has not been read yet; offset and strides in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugate: bool = False
    negative: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TorchFile:
    """An opened file: `value` is what was saved, with a `Tensor` for each tensor.

    InputError where the file is of neither form, or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._big_endian = False
        self._storages: dict[str, memoryview | bytes] = {}
        self._dtypes: dict[str, np.dtype] = {}
        with refusing(f"{path}: not a readable PyTorch file"):
            with open(path, "rb") as file:
                # Read as its pages are wanted: a file of gigabytes is never copied as a whole.
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._left = GROWTH * len(self._bytes) + ALLOWANCE
            self.value = self._open()

    def _open(self) -> Any:
        if self._bytes[:4] == b"PK\x03\x04":
            return self._open_archive()
        if self._bytes[257:262] == b"ustar":
            raise InputError(
                f"{self.path}: a tar archive, as PyTorch wrote before its version 0.1.10; load and "
                "save it anew with a later one"
            )
        return self._open_row_of_pickles()

    def array(self, tensor: Tensor) -> np.ndarray:
        """A tensor's numbers, contiguous, in its own dtype; InputError where the file has not as
        many.
        """
        data = self._storages.get(tensor.storage.key)
        if data is None:
            raise InputError(f"{self.path}: damaged: it has no storage {tensor.storage.key!r}")
        width = tensor.dtype.itemsize
        self._left -= tensor.size * width
        if self._left < 0:
            raise InputError(
                f"{self.path}: refused: its tensors grow to more than {GROWTH} times the file"
            )
        start = tensor.storage.start * tensor.storage.dtype.itemsize + tensor.offset * width
        if not tensor.size:
            return np.zeros(tensor.shape, tensor.dtype)
        reach = sum(
            (side - 1) * stride for side, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        if start + (reach + 1) * width > len(data):
            raise InputError(
                f"{self.path}: damaged: a tensor {list(tensor.shape)} reaches beyond its storage "
                f"of {len(data)} bytes"
            )
        strides = [stride * width for stride in tensor.strides]
        view = np.ndarray(tensor.shape, tensor.dtype, data, start, strides)
        # A copy: nothing of the file stays open.
        array = view.copy(order="C")
        if self._big_endian:
            array = _swapped(array)
        array = np.conj(array) if tensor.conjugate else array
        return -array if tensor.negative else array

    # The newer form.

    def _open_archive(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            members = self._members(archive)
            pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise ValueError(f"expected one data.pkl in it, found {len(pickles)}")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in members:
                self._big_endian = archive.read(f"{root}byteorder").strip() == b"big"
            if members[pickles[0]].file_size > LONGEST_PICKLE:
                raise ValueError(f"its description is longer than {LONGEST_PICKLE} bytes")
            text = self._member(archive, members[pickles[0]])
            value = inert_pickle.load(io.BytesIO(text), self._calls(), self._storage)
            for key in self._dtypes:
                member = members.get(f"{root}data/{key}")
                if member is not None:
                    self._storages[key] = self._member(archive, member)
        return value

    def _members(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("a name stands in it twice")
        if sum(member.file_size for member in members.values()) > self._left:
            raise ValueError(f"it unpacks to more than {GROWTH} times its size")
        return members

    def _member(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> memoryview | bytes:
        """The bytes of a member: those of the file itself where they are not compressed."""
        if member.compress_type != zipfile.ZIP_STORED:
            return archive.read(member)
        names = struct.unpack_from("<HH", self._bytes, member.header_offset + 26)
        start = member.header_offset + 30 + sum(names)
        data = memoryview(self._bytes)[start : start + member.file_size]
        # PyTorch can be told to leave the checksums out: 0.
        if len(data) != member.file_size or (member.CRC and zlib.crc32(data) != member.CRC):
            raise ValueError(f"{member.filename} is damaged")
        return data

    # The older form.

    def _open_row_of_pickles(self) -> Any:
        stream: Any = self._bytes
        first = inert_pickle.load(stream, {}, _no_storage)
        if first != MAGIC or inert_pickle.load(stream, {}, _no_storage) != PROTOCOL:
            raise ValueError("a pickle, but not one of torch.save")
        # What machine wrote it: its storages are little-endian in any case.
        inert_pickle.load(stream, {}, _no_storage)
        value = inert_pickle.load(stream, self._calls(), self._storage)
        for key in inert_pickle.load(stream, {}, _no_storage):
            (count,) = struct.unpack("<q", stream.read(8))
            size = count * self._dtypes[key].itemsize
            start = stream.tell()
            if not 0 <= size <= len(stream) - start:
                raise ValueError(f"it ends before its storage {key!r} does")
            self._storages[key] = memoryview(stream)[start : start + size]
            stream.seek(start + size)
        return value

    # What the pickles of both describe.

    def _storage(self, identity: Any) -> Storage:
        """A persistent id: ("storage", class, key, place, number of elements), and, in the older
        form, what part of it this is.
        """
        kind, storage, key, _place, _count, *view = identity
        name = storage.name.lstrip("_")
        if kind != "storage" or name not in BY_STORAGE:
            raise ValueError(f"a storage of the unknown type {storage}")
        dtype = np.dtype(BY_STORAGE[name])
        key = str(key)
        self._dtypes.setdefault(key, dtype)
        start = view[0][1] if view and view[0] is not None else 0
        return Storage(key, dtype, _whole(start))

    def _calls(self) -> dict[str, Any]:
        return {
            "collections.OrderedDict": lambda *pairs: dict(*pairs),
            "torch.Size": lambda *sides: tuple(*sides),
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_tensor_v3": _typed_tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": _of_subclass,
        }


def _no_storage(_: Any) -> Any:
    raise ValueError("a storage where none belongs")


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _gradient: Any = None,
    _hooks: Any = None,
    metadata: Any = None,
    *,
    dtype: np.dtype | None = None,
) -> Tensor:
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise ValueError("a tensor without a storage, or of unequal shape and strides")
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    marks = metadata if isinstance(metadata, Mapping) else {}
    return Tensor(
        storage,
        storage.dtype if dtype is None else dtype,
        _whole(offset),
        tuple(map(_whole, shape)),
        tuple(map(_whole, strides)),
        bool(marks.get("conj")),
        bool(marks.get("neg")),
    )


def _typed_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    gradient: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    """A tensor of a dtype that has no storage class of its own; opaque where numpy has no such
    dtype.
    """
    if not isinstance(dtype, Global) or dtype.name not in BY_NAME:
        return inert_pickle.Opaque(f"a tensor of {dtype}")
    kind = np.dtype(BY_NAME[dtype.name])
    return _tensor(storage, offset, shape, strides, gradient, hooks, metadata, dtype=kind)


def _of_subclass(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """The tensor inside one of a subclass, where it is a plain one."""
    calls = {"_rebuild_tensor_v2": _tensor, "_rebuild_tensor_v3": _typed_tensor}
    if isinstance(function, Global) and function.module == "torch._utils":
        if function.name in calls:
            return calls[function.name](*arguments)
        if function.name.startswith("_rebuild_parameter"):
            return arguments[0]
    return inert_pickle.Opaque(str(function))


def _whole(number: Any) -> int:
    if not isinstance(number, int) or not 0 <= number < 2**62:
        raise ValueError(f"expected a whole number, found {number!r}"[:100])
    return number


def _swapped(array: np.ndarray) -> np.ndarray:
    """The same numbers from bytes in the other order."""
    width = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    return array.view(f"u{width}").byteswap().view(array.dtype) if width > 1 else array
