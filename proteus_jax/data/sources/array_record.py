"""One's own images in ArrayRecord files."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import grain

from proteus_jax.data import image_formats
from proteus_jax.data.absl_settings import silence
from proteus_jax.data.passed_over import PassedOver
from proteus_jax.data.sources.base import FOUND, Columns, Source
from proteus_jax.data.sources.tfds import PREFIX
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.runtime import remote_fs


class RecordSource(Source):
    """ArrayRecord files each of whose records is the bytes of an image; they have no classes."""

    def __init__(self, paths: Sequence[str]):
        self._paths = list(paths)
        silence()
        try:
            self._records = grain.sources.ArrayRecordDataSource(self._paths)
            self._length = len(self._records)  # pyright: ignore[reportArgumentType]
        except Exception as error:
            # The reader raises whatever its C++ part says.
            raise InputError(f"{paths[0]}: expected ArrayRecord files: {error}") from None
        if not self._length:
            raise InputError(f"{paths[0]}: no record")
        head = self._records[0][: image_formats.HEAD]
        if not image_formats.looks_like_image(head):
            raise InputError(
                f"{paths[0]}: expected records that are image files, found one that begins with "
                f"{head[:16]!r}; a data set that tensorflow-datasets prepared is named as "
                f"{PREFIX}NAME or {PREFIX}DIRECTORY"
            )
        joined = hashlib.sha256()
        for path in self._paths:
            joined.update(os.fsencode(f"{Path(path).name} {remote_fs.size_and_time(path)[0]}"))
        self.fingerprint = joined.hexdigest()

    def __reduce__(self) -> tuple:
        return RecordSource, (self._paths,)

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """The number of the record."""
        return f"{self._paths[0]}: record {index}"

    def key(self, index: int) -> str:
        """See Source."""
        return remote_fs.absolute(self.name(index))

    def read(self, index: int) -> bytes:
        """See Source."""
        try:
            return self._records[index]
        except Exception as error:
            raise Unreadable(str(error)) from None


def open_records(paths: Sequence[str], columns: Columns = FOUND) -> tuple[RecordSource, PassedOver]:
    """ArrayRecord files of one's own. InputError for other files, and for files on a store."""
    remote = [path for path in paths if remote_fs.is_remote(path)]
    if remote:
        raise InputError(f"{remote[0]}: ArrayRecord files are read from a disk; copy them to one")
    return RecordSource([str(Path(path)) for path in paths]), PassedOver()
