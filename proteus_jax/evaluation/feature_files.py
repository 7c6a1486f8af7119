"""Files of features: one where they are few, a folder of parts that can be gone on with where they
are many.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow
import pyarrow.parquet

from proteus_jax.errors import InputError
from proteus_jax.runtime.filesystem import atomic_file, write_atomically

INDEX = "index.json"
SUFFIXES = (".npz", ".parquet", ".npy")
# A single file holds no more than this in bytes.
MOST_IN_A_FILE = 4 << 30
# Bytes of a part, about.
PART_BYTES = 256 << 20


class Rows(NamedTuple):
    """Features of some images: arrays [n, ...] by kind, and of each image its number in the source,
    its name, and its class (-1 for none).
    """

    arrays: Mapping[str, np.ndarray]
    numbers: np.ndarray
    names: Sequence[str]
    labels: np.ndarray | None


@runtime_checkable
class FeatureFile(Protocol):
    """A place that rows are written to, in order."""

    def done(self) -> int:
        """How many images, readable or not, need not be looked at again."""
        ...

    def add(self, rows: Rows, until: int, lost: Sequence[str]) -> None:
        """Takes rows; all images below the number `until` have been looked at, and those that are
        `lost` cannot be read.
        """
        ...

    def unreadable(self) -> list[str]:
        """Names of all images that cannot be read, those of before too."""
        ...

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Gives the whole its name."""
        ...


def concatenated(parts: Sequence[Rows]) -> Rows:
    """Joins rows."""
    kinds = parts[0].arrays
    labels = [part.labels for part in parts if part.labels is not None]
    return Rows(
        {kind: np.concatenate([part.arrays[kind] for part in parts]) for kind in kinds},
        np.concatenate([part.numbers for part in parts]),
        [name for part in parts for name in part.names],
        np.concatenate(labels) if labels else None,
    )


def _columns(rows: Rows) -> dict[str, np.ndarray]:
    columns = dict(rows.arrays) | {"numbers": rows.numbers, "names": np.array(rows.names, str)}
    return columns if rows.labels is None else columns | {"labels": rows.labels}


class SingleFile:
    """One .npz, .parquet or .npy, written at the end, whole or not at all."""

    def __init__(self, path: Path):
        self._path, self._parts, self._lost = path, [], []

    def done(self) -> int:
        """See FeatureFile. A file that was not finished is begun anew."""
        return 0

    def add(self, rows: Rows, until: int, lost: Sequence[str]) -> None:
        """See FeatureFile."""
        self._lost += lost
        if len(rows.numbers):
            self._parts.append(rows)

    def unreadable(self) -> list[str]:
        """See FeatureFile."""
        return self._lost

    def finish(self, facts: Mapping[str, Any]) -> None:
        """See FeatureFile. Beside a .npy, which holds numbers alone, NAME.json has the rest."""
        rows = concatenated(self._parts)
        with atomic_file(self._path) as temporary:
            _WRITERS[self._path.suffix](temporary, rows, facts)
            if self._path.suffix == ".npy":
                # First, so that an array that is there has its names.
                labels = None if rows.labels is None else rows.labels.tolist()
                beside = dict(facts) | {"names": list(rows.names), "labels": labels}
                write_atomically(self._path.with_suffix(".json"), json.dumps(beside) + "\n")


def _write_npz(path: Path, rows: Rows, facts: Mapping[str, Any]) -> None:
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **_columns(rows), facts=np.array(json.dumps(facts)))


def _write_npy(path: Path, rows: Rows, facts: Mapping[str, Any]) -> None:
    (array,) = rows.arrays.values()
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def _write_parquet(path: Path, rows: Rows, facts: Mapping[str, Any]) -> None:
    columns: dict[str, Any] = {}
    for name, column in _columns(rows).items():
        if column.ndim == 1:
            columns[name] = pyarrow.array(column.tolist() if column.dtype.kind == "U" else column)
            continue
        flat = pyarrow.array(np.ascontiguousarray(column).reshape(-1))
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(flat, int(np.prod(column.shape[1:])))
    shapes = {name: list(array.shape[1:]) for name, array in rows.arrays.items()}
    table = pyarrow.table(columns).replace_schema_metadata(
        {"proteus_jax": json.dumps(dict(facts) | {"shapes": shapes})}
    )
    pyarrow.parquet.write_table(table, path)


_WRITERS = {".npz": _write_npz, ".npy": _write_npy, ".parquet": _write_parquet}


class PartFolder:
    """A folder of part-00000.npz, part-00001.npz ... and index.json, which says what they are."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        """InputError where the folder holds anything but parts of the same features."""
        self._folder = folder
        # As they come back from a file.
        self._facts = json.loads(json.dumps(dict(facts)))
        self._parts: list[dict[str, Any]] = []
        self._waiting: list[Rows] = []
        self._lost: list[str] = []
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            self._parts = self._of_before()

    def _of_before(self) -> list[dict[str, Any]]:
        path = self._folder / INDEX
        try:
            index = json.loads(path.read_text())
            before, parts = index["features"], list(index["parts"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{self._folder}: expected a new folder, found no features") from None
        other = [name for name in self._facts if before.get(name) != self._facts[name]]
        if other or before.keys() != self._facts.keys():
            names = ", ".join(other) or "version"
            raise InputError(f"{self._folder}: holds other features (of another {names})")
        missing = [part["file"] for part in parts if not (self._folder / part["file"]).is_file()]
        if missing:
            raise InputError(f"{self._folder}: its part {missing[0]} is missing")
        return parts

    def done(self) -> int:
        """See FeatureFile."""
        return self._parts[-1]["until"] if self._parts else 0

    def unreadable(self) -> list[str]:
        """See FeatureFile."""
        return [name for part in self._parts for name in part["unreadable"]] + self._lost

    def add(self, rows: Rows, until: int, lost: Sequence[str]) -> None:
        """See FeatureFile. A part is written as soon as it is large enough."""
        self._lost += lost
        if len(rows.numbers):
            self._waiting.append(rows)
        size = sum(array.nbytes for part in self._waiting for array in part.arrays.values())
        if size >= PART_BYTES:
            self._write(until)

    def _write(self, until: int) -> None:
        rows, self._waiting = concatenated(self._waiting), []
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"part-{len(self._parts):05}.npz"
        with atomic_file(self._folder / name) as temporary:
            _write_npz(temporary, rows, self._facts)
        part = {"file": name, "rows": len(rows.names), "until": until, "unreadable": self._lost}
        self._parts.append(part)
        self._lost = []
        self._write_index(complete=False)

    def _write_index(self, complete: bool, **more: Any) -> None:
        index = {"features": self._facts, "complete": complete, "parts": self._parts} | more
        write_atomically(self._folder / INDEX, json.dumps(index, indent=1) + "\n")

    def finish(self, facts: Mapping[str, Any]) -> None:
        """See FeatureFile."""
        if self._waiting:
            self._write(facts["images"])
        self._write_index(complete=True, **facts)


def read_features(path: str | Path) -> Iterator[dict[str, np.ndarray]]:
    """Yields the arrays of a .npz, or of each part of a folder, in their order."""
    place = Path(path).expanduser()
    parts = [place]
    if place.is_dir():
        parts = [place / part["file"] for part in json.loads((place / INDEX).read_text())["parts"]]
    for part in parts:
        with np.load(part) as arrays:
            yield {name: arrays[name] for name in arrays.files}
