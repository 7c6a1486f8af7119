"""Images in ArrayRecord files: one's own, or a tensorflow-datasets builder's, read without
TensorFlow.
"""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from proteus_jax.data.mmap_table import read_table, write_table
from proteus_jax.data.sources.base import Source, SubsetSource
from proteus_jax.data.sources.tfrecord import (
    INFO,
    TfRecordSource,
    describe,
    newest_version,
    open_tfrecord,
)
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime import remote_fs
from proteus_jax.runtime.filesystem import cache_directory

PREFIX = "tfds:"


class TfdsSource(Source):
    """A split of a tensorflow-datasets builder prepared as ArrayRecord."""

    def __init__(self, name: str, split: str, data_dir: str | None):
        self._asked = (name, split, data_dir)
        self._builder = _builder(name, data_dir)
        where = f"{PREFIX}{name}"
        if split not in self._builder.info.splits:
            known = ", ".join(self._builder.info.splits) or "none that is prepared"
            raise InputError(f"{where}: expected a split out of {known}, found {split}")
        features = self._builder.info.features
        keys = [key for key, feature in features.items() if type(feature).__name__ == "Image"]
        if not keys:
            raise InputError(f"{where}: no image among its features {', '.join(features)}")
        self._image = "image" if "image" in keys else keys[0]
        self._label = "label" if "label" in features else None
        info = self._builder.info
        part = info.splits[split]
        identity = f"{info.full_name} {split} {part.num_examples} {part.num_bytes}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def __reduce__(self) -> tuple:
        return TfdsSource, self._asked

    @functools.cached_property
    def _records(self) -> Any:
        from tensorflow_datasets.core import decode

        return self._builder.as_data_source(
            self._asked[1], decoders={self._image: decode.SkipDecoding()}
        )

    def __len__(self) -> int:
        return self._builder.info.splits[self._asked[1]].num_examples

    def name(self, index: int) -> str:
        """The number of the example."""
        return f"{PREFIX}{self._asked[0]}: example {index} of {self._asked[1]}"

    def key(self, index: int) -> str:
        """See Source."""
        return f"{self._builder.info.full_name} {self._asked[1]} {index}"

    def read(self, index: int) -> bytes:
        """See Source."""
        try:
            return self._records[index][self._image]
        except Exception as error:
            raise Unreadable(str(error)) from None

    def class_names(self) -> list[str]:
        """Names of the classes by number; none where the builder does not know them."""
        feature = self._builder.info.features[self._label] if self._label else None
        return list(getattr(feature, "names", None) or ())

    def labels(self) -> np.ndarray | None:
        """The feature `label`; read once from every example, and kept in the cache."""
        if self._label is None:
            return None
        place = cache_directory() / "listings" / f"{self.fingerprint[:32]}-labels"
        try:
            return read_table(place).columns["label"]
        except (OSError, ValueError, KeyError):
            pass
        labels = np.array(list(self.values(self._label)))
        with contextlib.suppress(OSError):  # read again next time
            write_table(place, {}, {"label": labels})
        return labels

    def values(self, feature: str) -> Iterator[Any]:
        """A feature of every example, in order; no image is decoded."""
        return (self._records[index][feature] for index in range(len(self)))


def _builder(name: str, data_dir: str | None) -> Any:
    # Only where it is asked for: it takes a second to import and memory in every worker.
    import tensorflow_datasets as tfds

    where = f"{PREFIX}{name}"
    try:
        if remote_fs.local(name).is_dir():
            builder = tfds.builder_from_directory(newest_version(name))
        else:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{where}: tensorflow-datasets cannot open it: {first}") from None
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        raise InputError(
            f"{where}: expected it prepared as array_record or tfrecord, found "
            f"{file_format.value if file_format else 'nothing'} in "
            f"{data_dir or '~/tensorflow_datasets'} (TFDS_DATA_DIR); prepare it where "
            'TensorFlow is installed with download_and_prepare(file_format="array_record")'
        )
    return builder


# NAME or NAME/CONFIG, or a directory or address; a version; a split, perhaps a part of it.
_ROOT = re.compile(
    r"(?P<name>.+?)(:(?P<version>\d+\.[\d*]+\.[\d*]+))?(:(?P<split>[A-Za-z_]\w*)(?P<part>\[[^\]]*\])?)?"
)
_PART = re.compile(r"\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\]")


# A split in one of the two formats.
Examples = TfdsSource | TfRecordSource


def open_tfds(root: str) -> Source:
    """tfds:NAME, tfds:NAME:VERSION, tfds:DIRECTORY, or an address on gs:// or s3://; each perhaps
    with :SPLIT, as train (where none is named), or :train[:50%]. The data sets lie in
    $TFDS_DATA_DIR or ~/tensorflow_datasets, as ArrayRecord or TFRecord.

    InputError for what is not prepared.
    """
    return _part_of(open_examples(root), _parsed(root)["part"], root)


def open_examples(root: str) -> Examples:
    """Opens a whole split; see open_tfds."""
    match = _parsed(root)
    name, version, split = match["name"], match["version"], match["split"] or "train"
    place = _prepared(name, version)
    if place is not None:
        description = describe(place)
        if description.file_format == "tfrecord":
            if split not in description.splits:
                known = ", ".join(description.splits) or "none"
                raise InputError(f"{root}: expected a split out of {known}, found {split}")
            return open_tfrecord(description, split)
        if remote_fs.is_remote(place):
            raise InputError(
                f"{root}: ArrayRecord files are read from a disk; copy the data set to one, or "
                "name its TFRecord form"
            )
        name = place
    elif version:
        name = f"{name}:{version}"
    return TfdsSource(name, split, os.environ.get("TFDS_DATA_DIR"))


def _parsed(root: str) -> re.Match[str]:
    match = _ROOT.fullmatch(root[len(PREFIX) :])
    if match is None:
        raise InputError(f"{root}: expected {PREFIX}NAME:SPLIT")
    return match


def _prepared(name: str, version: str | None) -> str | None:
    """The directory of a prepared data set that is here, or an address; None for tfds to find."""
    if remote_fs.is_remote(name):
        return f"{name.rstrip('/')}/{version}" if version else name.rstrip("/")
    data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if remote_fs.is_remote(data_dir):
        return f"{data_dir.rstrip('/')}/{name}/{version}" if version else None
    for folder in (remote_fs.local(name), remote_fs.local(data_dir) / name):
        if folder.is_dir():
            chosen = str(folder / version) if version else newest_version(str(folder))
            if (remote_fs.local(chosen) / INFO).is_file():
                return chosen
    return None


def _part_of(source: Source, part: str | None, root: str) -> Source:
    """A part of a split, as tensorflow-datasets counts: percent are rounded to the nearest."""
    if not part:
        return source
    match = _PART.fullmatch(part)
    if match is None:
        raise InputError(f"{root}: expected a part as [:50%] or [100:200], found {part}")

    def place(text: str | None, otherwise: int) -> int:
        if text is None:
            return otherwise
        number = int(text.removesuffix("%"))
        if text.endswith("%"):
            number = round(number * len(source) / 100)
        return min(max(number + len(source) if number < 0 else number, 0), len(source))

    first, last = place(match["first"], 0), place(match["last"], len(source))
    if first >= last:
        raise InputError(f"{root}: {part} of {len(source)} examples is empty")
    return SubsetSource(source, np.arange(first, last))
