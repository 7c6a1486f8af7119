"""Columns of numbers and names in one file that is mapped into memory: a listing of millions of
images that processes share.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proteus_jax.errors import InputError
from proteus_jax.runtime.filesystem import as_open_as_any_other

_MAGIC = b"proteus_jax table 1\n"
_ALIGNMENT = 64


class Table(NamedTuple):
    """Facts about the whole, and columns of equal or different lengths.

    One that was read from a file travels to another process as the file's path.
    """

    facts: dict[str, Any]
    columns: dict[str, np.ndarray]
    path: Path | None = None

    def __reduce__(self) -> tuple:
        if self.path is not None:
            return _same_table, (self.path, self.facts.get("fingerprint"))
        return Table, (self.facts, self.columns)


class Names(NamedTuple):
    """Texts one after the other in one array of bytes, a zero after each but the last, and the
    places where they end.
    """

    text: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str]) -> "Names":
        """Packs names; bytes that are no Unicode survive, as in the names of the operating
        system.
        """
        text = np.frombuffer(os.fsencode("\0".join(names)), np.uint8)
        return cls(text, np.append(np.flatnonzero(text == 0), len(text)))

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        start = int(self.ends[index - 1]) + 1 if index else 0
        return os.fsdecode(self.text[start : int(self.ends[index])].tobytes())


def write_table(path: Path, facts: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> None:
    """Writes a file that `read_table` maps; it is the old one or the whole new one."""
    places, offset = {}, 0
    for name, column in columns.items():
        places[name] = (column.dtype.str, len(column), offset)
        offset += -(-column.nbytes // _ALIGNMENT) * _ALIGNMENT
    header = json.dumps({"facts": dict(facts), "columns": places}).encode()
    start = -(-(len(_MAGIC) + 8 + len(header)) // _ALIGNMENT) * _ALIGNMENT
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        try:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for name, column in columns.items():
                file.seek(start + places[name][2])
                file.write(np.ascontiguousarray(column).data)
            file.truncate(start + offset)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            as_open_as_any_other(Path(file.name))
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read_table(path: Path) -> Table:
    """Maps a file of `write_table`; ValueError where it is none."""
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path}: no table of this version")
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    start = -(-(len(_MAGIC) + 8 + length) // _ALIGNMENT) * _ALIGNMENT
    memory = np.asarray(np.memmap(path, np.uint8, "r"))
    columns = {}
    for name, (dtype, count, offset) in header["columns"].items():
        size = np.dtype(dtype).itemsize * count
        if start + offset + size > len(memory):
            raise ValueError(f"{path}: cut short")
        columns[name] = memory[start + offset : start + offset + size].view(dtype)
    return Table(header["facts"], columns, path)


def _same_table(path: Path, fingerprint: str | None) -> Table:
    """The table in another process; InputError where it is another one by now."""
    table = read_table(path)
    if table.facts.get("fingerprint") != fingerprint:
        raise InputError(f"{path}: the images were listed anew while a run was starting")
    return table
