"""Writes arrays as torch.save does, without PyTorch."""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes float32 arrays as `torch.save` writes a state dict, for `torch.load` of any version
    since 1.6 and with weights_only.
    """
    root = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _write(archive, f"{root}/data.pkl", _description(arrays))
        _write(archive, f"{root}/byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            _write(archive, f"{root}/data/{key}", np.ascontiguousarray(array, "<f4").tobytes())
        _write(archive, f"{root}/version", b"3\n")


def _write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """A member whose bytes begin at a multiple of 64, so that PyTorch can map them into memory."""
    member = zipfile.ZipInfo(name)
    assert archive.fp is not None
    padding = -(archive.fp.tell() + 30 + len(name.encode()) + 4) % 64
    member.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    archive.writestr(member, content)


def _description(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The pickle of {name: tensor}, by its opcodes: `pickle` itself would import PyTorch."""
    parts = [pickle.PROTO + b"\2", pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, array) in enumerate(arrays.items()):
        steps = np.empty(array.shape, np.int8).strides
        storage = [
            *(pickle.MARK, _pickled("storage"), _named("torch", "FloatStorage")),
            *(_pickled(str(key)), _pickled("cpu"), _pickled(int(array.size))),
            *(pickle.TUPLE, pickle.BINPERSID),
        ]
        parts += [_pickled(name), _named("torch._utils", "_rebuild_tensor_v2"), pickle.MARK]
        parts += [*storage, _pickled(0), _pickled(array.shape), _pickled(steps), pickle.NEWFALSE]
        parts += [_named("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE]
        parts += [pickle.TUPLE, pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _pickled(value: str | int | tuple[int, ...]) -> bytes:
    """The opcodes that make a value, without the frame around them."""
    return pickle.dumps(value, 2)[2:-1]


def _named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
