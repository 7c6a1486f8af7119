"""Images inside larger files: tar shards as WebDataset packs them, and parquet as Hugging Face
publishes image sets. Random access by an index that is made once.
"""

import hashlib
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from proteus_jax.data import decode
from proteus_jax.data.mmap_table import Names, Table, read_table, write_table
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime import remote_fs
from proteus_jax.runtime.filesystem import cache_directory

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "bytes")
_LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")
# Row groups are kept decoded up to so many bytes a process.
_ROW_GROUPS_BYTES = 96 << 20


class TarSource:
    """Images of tar shards, read by their offsets."""

    def __init__(self, paths: Sequence[str], table: Table):
        self._paths, self._table = list(paths), table
        self._names = Names(table.columns["text"], table.columns["ends"])
        self.fingerprint: str = table.facts["fingerprint"]

    def __reduce__(self) -> tuple:
        return TarSource, (self._paths, self._table)

    def __len__(self) -> int:
        return len(self._names.ends)

    def name(self, index: int) -> str:
        """Shard and member."""
        shard = self._paths[int(self._table.columns["shard"][index])]
        return f"{shard}: {self._names[index]}"

    def key(self, index: int) -> str:
        """See Source."""
        return remote_fs.absolute(self.name(index))

    def read(self, index: int) -> bytes:
        """See Source."""
        columns = self._table.columns
        shard = int(columns["shard"][index])
        offset, size = int(columns["offset"][index]), int(columns["size"][index])
        path = self._paths[shard]
        try:
            with remote_fs.open_file(path) as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None

    def labels(self) -> np.ndarray | None:
        """The number in the member .cls beside an image; None where not all have one."""
        labels = self._table.columns["label"]
        return None if (labels < 0).any() else np.asarray(labels)

    def digests(self) -> None:
        """Not known without reading everything."""


def open_tar(paths: Sequence[str]) -> TarSource:
    """The images of shards, in the order of the shards and of the members in each.

    The index lies in the cache, and is made again where a shard has changed. InputError for what
    is no tar file, is compressed, or holds no image.
    """
    facts = [remote_fs.size_and_time(path) for path in paths]
    absolute = "\0".join(map(remote_fs.absolute, paths))
    key = hashlib.sha256(os.fsencode(absolute)).hexdigest()
    place = cache_directory() / "listings" / key[:32]
    shards = [list(fact) for fact in facts]
    try:
        table = read_table(place)
        if table.facts["shards"] == shards:
            return TarSource(paths, table)
    except (OSError, ValueError, KeyError):
        pass
    members = [
        (number, *member)
        for number, (path, (size, _)) in enumerate(zip(paths, facts, strict=True))
        for member in _members(path, size)
    ]
    if not members:
        raise InputError(f"{paths[0]}: no image ({', '.join(decode.SUFFIXES)}) in these shards")
    names = Names.of([member[1] for member in members])
    columns = {"text": names.text, "ends": names.ends}
    for column, position in (("shard", 0), ("offset", 2), ("size", 3), ("label", 4)):
        columns[column] = np.array([member[position] for member in members], np.int64)
    joined = hashlib.sha256()
    for column in columns.values():
        joined.update(column.data)
    table = Table({"fingerprint": joined.hexdigest(), "shards": shards}, columns)
    try:
        write_table(place, table.facts, table.columns)
        table = read_table(place)
    except OSError:
        pass  # made again next time
    return TarSource(paths, table)


def _members(path: str, size: int) -> list[tuple[str, int, int, int]]:
    """(name, offset, size, class or -1) of every image of a shard."""
    members: list[tuple[str, int, int, int]] = []
    classes: dict[str, int] = {}
    try:
        with remote_fs.open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise InputError(f"{path}: ends inside its member {member.name}")
                # WebDataset's key ends at the first dot of the last part.
                name = PurePosixPath(member.name)
                key = str(name.parent / name.name.split(".")[0])
                if name.suffix == ".cls":
                    text = shard.extractfile(member).read(32)  # pyright: ignore[reportOptionalMemberAccess]
                    classes[key] = int(text) if text.strip().isdigit() else -1
                elif name.suffix.lower() in decode.SUFFIXES:
                    members.append((member.name, member.offset_data, member.size, key))  # pyright: ignore[reportArgumentType]
    except tarfile.TarError as error:
        raise InputError(f"{path}: expected an uncompressed tar file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    return [(name, at, length, classes.get(str(key), -1)) for name, at, length, key in members]


class ParquetSource:
    """Images in a column of parquet files, read a row group at a time.

    Only a few row groups are held at once: in a shuffled order nearly every image costs the
    reading of its whole group.
    """

    def __init__(self, paths: Sequence[str], columns: tuple[str, str | None], groups: np.ndarray):
        self._paths, self._columns, self._groups = list(paths), columns, groups
        joined = hashlib.sha256(np.ascontiguousarray(groups).tobytes())
        for path in paths:
            joined.update(
                os.fsencode(f"{PurePosixPath(path).name} {remote_fs.size_and_time(path)[0]}")
            )
        self.fingerprint = joined.hexdigest()
        self._held: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return ParquetSource, (self._paths, self._columns, self._groups)

    def __len__(self) -> int:
        return int(self._groups[-1, 2])

    def _find(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._groups[:, 2], index, side="right"))
        return group, index - (int(self._groups[group - 1, 2]) if group else 0)

    def name(self, index: int) -> str:
        """File and row."""
        group, row = self._find(index)
        path, number, _ = self._groups[group]
        return f"{self._paths[path]}: row {row} of group {number}"

    def key(self, index: int) -> str:
        """See Source."""
        return remote_fs.absolute(self.name(index))

    def read(self, index: int) -> bytes:
        """See Source."""
        group, row = self._find(index)
        with self._lock:
            if group not in self._held:
                self._held[group] = self._load(group)
            self._held.move_to_end(group)
            held = sum(column.nbytes for column in self._held.values())
            while held > _ROW_GROUPS_BYTES and len(self._held) > 1:
                held -= self._held.popitem(last=False)[1].nbytes
            value = self._held[group][row].as_py()
        if value is None:
            raise Unreadable("the row holds no image")
        return value

    def _load(self, group: int) -> pyarrow.ChunkedArray:
        path, number, _ = self._groups[group]
        try:
            with remote_fs.open_file(self._paths[path]) as file:
                table = pyarrow.parquet.ParquetFile(file).read_row_group(
                    int(number), columns=[self._columns[0]]
                )
        except (OSError, pyarrow.ArrowException) as error:
            raise Unreadable(str(error)) from None
        column = table.column(0)
        if pyarrow.types.is_struct(column.type):
            column = pyarrow.compute.struct_field(column, "bytes")  # pyright: ignore[reportAttributeAccessIssue]
        return column

    def labels(self) -> np.ndarray | None:
        """The column of class numbers, where there is one."""
        if self._columns[1] is None:
            return None
        chunks = []
        for path in self._paths:
            with remote_fs.open_file(path) as file:
                table = pyarrow.parquet.read_table(file, columns=[self._columns[1]])
                chunks.append(table.column(0).to_numpy())
        return np.concatenate(chunks)

    def digests(self) -> None:
        """Not known without reading everything."""


def open_parquet(paths: Sequence[str]) -> ParquetSource:
    """The images of parquet files: a column of bytes, or of structures with `bytes`, as Hugging
    Face's Image feature.

    InputError for what is no parquet file or has no such column.
    """
    groups, end, columns = [], 0, None
    for number, path in enumerate(paths):
        try:
            with remote_fs.open_file(path) as file:
                parquet = pyarrow.parquet.ParquetFile(file)
                metadata, schema = parquet.metadata, parquet.schema_arrow
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{path}: expected a parquet file: {error}") from None
        roles = _columns(path, schema)
        if columns is not None and roles != columns:
            raise InputError(f"{path}: has columns {roles}, the files before it {columns}")
        columns = roles
        for group in range(metadata.num_row_groups):
            end += metadata.row_group(group).num_rows
            groups.append((number, group, end))
    if columns is None or not end:
        raise InputError(f"{paths[0]}: no rows")
    return ParquetSource(paths, columns, np.array(groups, np.int64))


def _columns(path: str, schema: pyarrow.Schema) -> tuple[str, str | None]:
    """The columns of the images, to its leaf, and of their classes."""

    def holds_bytes(kind: pyarrow.DataType) -> bool:
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    for name in sorted(
        schema.names, key=lambda name: (name not in _IMAGE_COLUMNS, schema.names.index(name))
    ):
        kind = schema.field(name).type
        nested = pyarrow.types.is_struct(kind) and "bytes" in {field.name for field in kind}
        if nested or holds_bytes(kind):
            label = next(
                (
                    other
                    for other in _LABEL_COLUMNS
                    if other in schema.names and pyarrow.types.is_integer(schema.field(other).type)
                ),
                None,
            )
            return (f"{name}.bytes" if nested else name), label
    raise InputError(
        f"{path}: expected a column of image bytes, found {', '.join(schema.names) or 'none'}"
    )
