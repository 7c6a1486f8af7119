"""Data sets of tensorflow-datasets in TFRecord files, read without TensorFlow: on a disk, or on
gs:// and s3://. Random access by an index that is made once, and kept.
"""

import contextlib
import functools
import hashlib
import json
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from proteus_jax.data.mmap_table import Table, read_table, write_table
from proteus_jax.data.sources.base import Source
from proteus_jax.data.sources.tf_example import values_of
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime import remote_fs
from proteus_jax.runtime.filesystem import cache_directory

INFO, FEATURES = "dataset_info.json", "features.json"
# A record is its length, a checksum of that, the data, and a checksum of the data.
_LENGTH, _BEFORE, _AFTER = struct.Struct("<Q"), 12, 4
# Read at once while files are indexed on a store: a request for each length would take days.
_BLOCK = 32 << 20
_THREADS = 16


class Description(NamedTuple):
    """Facts from the files beside a prepared data set: format, the files of each split in their
    order and how many examples each holds, its features' kinds by name, and names of classes.
    """

    place: str
    full_name: str
    file_format: str
    splits: dict[str, tuple[tuple[str, int], ...]]
    kinds: dict[str, str]

    def class_names(self, feature: str) -> list[str]:
        """Names of the classes by number; none where there is no such file."""
        with contextlib.suppress(Unreadable):
            text = remote_fs.read(self.place, f"{feature}.labels.txt").decode()
            return [line.strip() for line in text.splitlines() if line.strip()]
        return []


def describe(place: str) -> Description:
    """Reads the description of a prepared data set; InputError where there is none."""
    try:
        info = json.loads(remote_fs.read(place, INFO))
        features = json.loads(remote_fs.read(place, FEATURES))["featuresDict"]["features"]
        name = info["name"]
        file_format = str(info.get("fileFormat") or "tfrecord")
        splits = {str(split["name"]): _files(name, file_format, split) for split in info["splits"]}
        kinds = {
            str(feature): str(each["pythonClassName"]).rpartition(".")[2]
            for feature, each in features.items()
        }
    except Unreadable as error:
        raise InputError(f"{place}: no data set of tensorflow-datasets: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{place}: its description makes no sense: {error!r}") from None
    full_name = "/".join(
        str(part) for part in (name, info.get("configName"), info.get("version")) if part
    )
    return Description(place, full_name, file_format, splits, kinds)


def _files(name: str, file_format: str, split: Any) -> tuple[tuple[str, int], ...]:
    lengths = [int(length) for length in split["shardLengths"]]
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    files = []
    for number, length in enumerate(lengths):
        values = {
            "DATASET": name,
            "SPLIT": split["name"],
            "FILEFORMAT": file_format,
            "SHARD_INDEX": f"{number:05}",
            "NUM_SHARDS": f"{len(lengths):05}",
            "SHARD_X_OF_Y": f"{number:05}-of-{len(lengths):05}",
        }
        files.append((template.format(**values), length))
    return tuple(files)


class TfRecordSource(Source):
    """A split of a data set in TFRecord files."""

    def __init__(self, description: Description, split: str, table: Table):
        self._description, self._split, self._table = description, split, table
        images = [name for name, kind in description.kinds.items() if kind == "Image"]
        self._image = "image" if "image" in images else images[0]
        self._label = "label" if "label" in description.kinds else None
        self.fingerprint: str = table.facts["fingerprint"]

    def __reduce__(self) -> tuple:
        return TfRecordSource, (self._description, self._split, self._table)

    def __len__(self) -> int:
        return len(self._table.columns["offset"])

    def name(self, index: int) -> str:
        """The number of the example."""
        return f"tfds:{self._description.full_name}: example {index} of {self._split}"

    def key(self, index: int) -> str:
        """See Source. The same as of the ArrayRecord form, which has the same order."""
        return f"{self._description.full_name} {self._split} {index}"

    def _record(self, index: int) -> bytes:
        columns = self._table.columns
        number, offset = int(columns["file"][index]), int(columns["offset"][index])
        name = self._description.splits[self._split][number][0]
        with remote_fs.open_file(f"{self._description.place}/{name}") as file:
            file.seek(offset)
            return file.read(int(columns["size"][index]))

    def read(self, index: int) -> bytes:
        """See Source."""
        try:
            values = values_of(self._record(index), self._image)
        except (OSError, ValueError) as error:
            raise Unreadable(str(error)) from None
        if not values:
            raise Unreadable(f"the example has no {self._image}")
        return values[0]

    @functools.cached_property
    def _classes(self) -> np.ndarray:
        place = cache_directory() / "listings" / f"{self.fingerprint[:32]}-labels"
        with contextlib.suppress(OSError, ValueError, KeyError):
            return read_table(place).columns["label"]
        every = self.values(str(self._label))
        try:
            labels = np.array([int(values[0]) if values else -1 for values in every], np.int64)
        except ValueError:
            kind = self._description.kinds[str(self._label)]
            raise InputError(
                f"{self._description.place}: expected numbers in its feature label, found {kind}"
            ) from None
        with contextlib.suppress(OSError):  # read again next time
            write_table(place, {}, {"label": labels})
        return labels

    def values(self, feature: str) -> Iterator[Sequence[Any]]:
        """The values of a feature of every example, in order; no image is decoded."""
        return (values_of(self._record(index), feature) for index in range(len(self)))

    def labels(self) -> np.ndarray | None:
        """The feature `label`; read once from every example, and kept in the cache."""
        return None if self._label is None else self._classes

    def class_names(self) -> Sequence[str]:
        """Names of the classes, where the data set has them."""
        return () if self._label is None else self._description.class_names(self._label)


def open_tfrecord(description: Description, split: str) -> TfRecordSource:
    """Opens a split; its index is made where none of these files is in the cache.

    InputError where files are missing, are no TFRecord, or hold another number of examples.
    """
    files = description.splits[split]
    if "Image" not in description.kinds.values():
        features = ", ".join(description.kinds)
        raise InputError(f"{description.place}: no image among its features {features}")
    paths = [f"{description.place}/{name}" for name, _ in files]
    facts = [list(remote_fs.size_and_time(path)) for path in paths]
    key = hashlib.sha256(f"tfrecord 1 {list(map(remote_fs.absolute, paths))}".encode()).hexdigest()
    place = cache_directory() / "listings" / key[:32]
    with contextlib.suppress(OSError, ValueError, KeyError):
        table = read_table(place)
        if table.facts["files"] == facts:
            return TfRecordSource(description, split, table)
    columns = _indexed(paths, [size for size, _ in facts], [count for _, count in files])
    content = hashlib.sha256(f"{description.full_name} {split}".encode())
    for column in columns.values():
        content.update(column.data)
    table = Table({"fingerprint": content.hexdigest(), "files": facts}, columns)
    with contextlib.suppress(OSError):  # made again next time
        write_table(place, table.facts, table.columns)
        table = read_table(place)
    return TfRecordSource(description, split, table)


def _indexed(
    paths: Sequence[str], sizes: Sequence[int], counts: Sequence[int]
) -> dict[str, np.ndarray]:
    """File, offset and size of every record."""
    began, offsets, lengths, numbers = time.monotonic(), [], [], []
    with ThreadPoolExecutor(_THREADS if remote_fs.is_remote(paths[0]) else 1) as pool:
        indexed = pool.map(_records, paths, sizes)
        for number, (path, records) in enumerate(zip(paths, indexed, strict=True)):
            if len(records) != counts[number]:
                raise InputError(
                    f"{path}: expected {counts[number]} examples, found {len(records)}"
                )
            offsets.append(records[:, 0])
            lengths.append(records[:, 1])
            numbers.append(np.full(len(records), number, np.int64))
            if time.monotonic() - began > 2 and (number % 50 == 49 or number == len(paths) - 1):
                print(f"indexing {number + 1} of {len(paths)} files", flush=True)
    return {
        "file": np.concatenate(numbers),
        "offset": np.concatenate(offsets),
        "size": np.concatenate(lengths),
    }


def _records(path: str, size: int) -> np.ndarray:
    """Offsets and sizes of the data of a file's records, [n, 2]."""
    rows, at = [], 0
    block = _BLOCK if remote_fs.is_remote(path) else _BEFORE
    try:
        with remote_fs.open_file(path) as file:
            start, held = 0, b""
            while at < size:
                if not start <= at <= start + len(held) - _BEFORE:
                    file.seek(at)
                    start, held = at, file.read(max(block, _BEFORE))
                if len(held) - (at - start) < _BEFORE:
                    raise InputError(f"{path}: ends inside a record")
                (length,) = _LENGTH.unpack_from(held, at - start)
                if at + _BEFORE + length + _AFTER > size:
                    raise InputError(f"{path}: no TFRecord file, or cut short")
                rows.append((at + _BEFORE, length))
                at += _BEFORE + length + _AFTER
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    return np.array(rows, np.int64).reshape(-1, 2)


def newest_version(place: str) -> str:
    """The folder of the newest version below a data set's, where `place` is none itself."""
    if remote_fs.is_remote(place) or (remote_fs.local(place) / INFO).is_file():
        return place
    folder = remote_fs.local(place)
    versions = sorted(folder.glob(f"**/{INFO}"), key=lambda path: _version(path.parent.name))
    return str(versions[-1].parent) if versions else str(folder)


def _version(name: str) -> tuple[int, ...]:
    parts = PurePosixPath(name).name.split(".")
    return tuple(int(part) for part in parts) if all(p.isdecimal() for p in parts) else (-1,)
