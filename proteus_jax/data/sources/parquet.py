"""Images in parquet files, as Hugging Face publishes image sets."""

import functools
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from proteus_jax.data import image_formats
from proteus_jax.data.passed_over import PassedOver
from proteus_jax.data.sources.base import FOUND, Columns, Source
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime import remote_fs

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "photo", "picture", "bytes")
_LABELS = ("label", "labels", "cls", "class", "fine_label", "category", "class_name", "target")
# Columns that hold pictures of something else than the scene.
_NO_IMAGES = ("mask", "segmentation", "annotation", "depth", "label", "thumbnail")
# Row groups are kept decoded up to so many bytes a process.
_ROW_GROUPS_BYTES = 96 << 20
_BYTES, _PATH = "bytes", "path"
# Where Hugging Face's datasets keeps the types of columns.
_METADATA = b"huggingface"


class _Roles(NamedTuple):
    """The columns of a set: that of the images, how it holds them, and that of the classes."""

    image: str
    # Structures with bytes and path, bytes, or text with a path.
    form: str
    label: str | None
    # Names of the classes by number.
    classes: tuple[str, ...] = ()


class ParquetSource(Source):
    """Images in a column of parquet files, read a row group at a time.

    Only a few row groups are held at once: in a shuffled order nearly every image costs the
    reading of its whole group.
    """

    def __init__(self, paths: Sequence[str], roles: _Roles, groups: np.ndarray):
        self._paths, self._roles, self._groups = list(paths), roles, groups
        content = hashlib.sha256(np.ascontiguousarray(groups).tobytes() + roles.image.encode())
        for path in paths:
            content.update(
                os.fsencode(f"{PurePosixPath(path).name} {remote_fs.size_and_time(path)[0]}")
            )
        self.fingerprint = content.hexdigest()
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return ParquetSource, (self._paths, self._roles, self._groups)

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
        return self._content(value, self._paths[int(self._groups[group, 0])])

    def _content(self, value: Any, file: str) -> bytes:
        """The bytes of a row: its own, or those of the file that it names."""
        content, path = value, None
        if isinstance(value, dict):
            content, path = value.get(_BYTES), value.get(_PATH)
        elif isinstance(value, str):
            content, path = None, value
        if content:
            return content
        if not path:
            raise Unreadable("the row holds no image")
        beside = str(PurePosixPath(file).parent)
        if path.startswith("/") or remote_fs.is_remote(path):
            return remote_fs.read("", path)
        return remote_fs.read(beside, path)

    def _load(self, group: int) -> Any:
        path, number, _ = self._groups[group]
        try:
            with remote_fs.open_file(self._paths[path]) as file:
                table = pyarrow.parquet.ParquetFile(file).read_row_group(
                    int(number), columns=[self._roles.image]
                )
        except (OSError, pyarrow.ArrowException) as error:
            raise Unreadable(str(error)) from None
        return table.column(0)

    @functools.cached_property
    def _classes(self) -> tuple[np.ndarray, tuple[str, ...]]:
        values = []
        for path in self._paths:
            with remote_fs.open_file(path) as file:
                table = pyarrow.parquet.read_table(file, columns=[self._roles.label])
                values += table.column(0).to_pylist()
        has = np.array([value is not None and value != "" for value in values])
        there = [value for value, is_there in zip(values, has, strict=True) if is_there]
        labels, names = np.full(len(values), -1, np.int64), self._roles.classes
        if all(isinstance(value, int) for value in there):
            labels[has] = there
        else:
            texts, labels[has] = np.unique([str(value) for value in there], return_inverse=True)
            names = tuple(texts.tolist())
        return labels, names

    def labels(self) -> np.ndarray | None:
        """The column of classes, where there is one; -1 of a row without."""
        return None if self._roles.label is None else self._classes[0]

    def class_names(self) -> Sequence[str]:
        """Names of the classes, where labels are words or the files name them."""
        return () if self._roles.label is None else self._classes[1]


def open_parquet(
    paths: Sequence[str], columns: Columns = FOUND
) -> tuple[ParquetSource, PassedOver]:
    """The images of parquet files: a column of structures with `bytes` and `path`, as Hugging
    Face's Image feature, of bytes, or of paths.

    InputError for what is no parquet file, has no such column, or several.
    """
    groups, end, roles = [], 0, None
    for number, path in enumerate(paths):
        try:
            with remote_fs.open_file(path) as file:
                parquet = pyarrow.parquet.ParquetFile(file)
                metadata, schema = parquet.metadata, parquet.schema_arrow
                own = _roles(path, parquet, schema, columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{path}: expected a parquet file: {error}") from None
        if roles is not None and own[:3] != roles[:3]:
            raise InputError(f"{path}: has columns {own[:3]}, the files before it {roles[:3]}")
        roles = own
        for group in range(metadata.num_row_groups):
            end += metadata.row_group(group).num_rows
            groups.append((number, group, end))
    if roles is None or not end:
        raise InputError(f"{paths[0]}: no rows")
    return ParquetSource(paths, roles, np.array(groups, np.int64)), PassedOver()


def _roles(path: str, parquet: Any, schema: pyarrow.Schema, columns: Columns) -> _Roles:
    image, form = _image_column(path, parquet, schema, columns.image)
    label = _label_column(path, schema, image, columns.label)
    return _Roles(image, form, label, _class_names(schema, label))


def _image_column(path: str, parquet: Any, schema: pyarrow.Schema, wanted: str) -> tuple[str, str]:
    forms = {name: _form(schema.field(name).type) for name in schema.names}
    if wanted:
        if wanted not in forms:
            raise InputError(
                f"{path}: no column {wanted!r} (data.image_column) among {', '.join(forms)}"
            )
        if not forms[wanted]:
            raise InputError(
                f"{path}: expected images in {wanted!r} (data.image_column), found "
                f"{schema.field(wanted).type}"
            )
        return wanted, forms[wanted]
    lists = [name for name in schema.names if _is_list_of_images(schema.field(name).type)]
    candidates = [name for name, form in forms.items() if form == _BYTES] or [
        name for name, form in forms.items() if form == _PATH and _holds_paths(parquet, name)
    ]
    named = [name for usual in _IMAGES for name in candidates if name.lower() == usual]
    others = [name for name in candidates if not any(word in name.lower() for word in _NO_IMAGES)]
    # What has the structure of an image before plain bytes.
    others.sort(key=lambda name: not pyarrow.types.is_struct(schema.field(name).type))
    chosen = named or others or candidates
    structured = [name for name in chosen if pyarrow.types.is_struct(schema.field(name).type)]
    if not named and len(structured) > 1:
        raise InputError(
            f"{path}: several columns hold images, {', '.join(structured)}; choose one with "
            "data.image_column"
        )
    if chosen:
        return chosen[0], forms[chosen[0]]
    if lists:
        raise InputError(
            f"{path}: {lists[0]} holds lists of images; expected one image a row: write each image "
            "to a row of its own"
        )
    raise InputError(
        f"{path}: expected a column of images (structures with bytes, bytes, or paths), found "
        f"{', '.join(schema.names) or 'none'}"
    )


def _form(kind: pyarrow.DataType) -> str:
    """How a column may hold images: by bytes, by paths, or not at all ("")."""
    types = pyarrow.types
    if types.is_struct(kind):
        return _BYTES if {_BYTES, _PATH} & {field.name for field in kind} else ""
    if types.is_binary(kind) or types.is_large_binary(kind):
        return _BYTES
    return _PATH if types.is_string(kind) or types.is_large_string(kind) else ""


def _is_list_of_images(kind: pyarrow.DataType) -> bool:
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return is_list and pyarrow.types.is_struct(kind.value_type) and bool(_form(kind.value_type))


def _holds_paths(parquet: Any, column: str) -> bool:
    """Returns True where the first texts of a column end as names of images do."""
    for batch in parquet.iter_batches(batch_size=8, columns=[column]):
        texts = [text for text in batch.column(0).to_pylist() if text]
        return bool(texts) and all(map(image_formats.has_image_suffix, texts))
    return False


def _label_column(path: str, schema: pyarrow.Schema, image: str, wanted: str) -> str | None:
    if wanted:
        if wanted not in schema.names:
            raise InputError(
                f"{path}: no column {wanted!r} (data.label_column) among {', '.join(schema.names)}"
            )
        return wanted

    def may_be(name: str) -> bool:
        kind, types = schema.field(name).type, pyarrow.types
        text = types.is_string(kind) or types.is_large_string(kind) or types.is_dictionary(kind)
        return name != image and (types.is_integer(kind) or text)

    lower = {name.lower(): name for name in schema.names if may_be(name)}
    return next((lower[name] for name in _LABELS if name in lower), None)


def _class_names(schema: pyarrow.Schema, label: str | None) -> tuple[str, ...]:
    """The names that Hugging Face's datasets keeps of the numbers of a ClassLabel."""
    described = (schema.metadata or {}).get(_METADATA)
    if label is None or described is None:
        return ()
    try:
        feature: Mapping[str, Any] = json.loads(described)["info"]["features"][label]
        return tuple(map(str, feature.get("names") or ()))
    except (ValueError, KeyError, TypeError):
        return ()
