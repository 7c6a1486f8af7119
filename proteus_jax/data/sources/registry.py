"""The kinds of sources that a place of images can name; a new one is a module and a line here."""

from collections.abc import Callable, Sequence

from proteus_jax.data.passed_over import PassedOver
from proteus_jax.data.sources.array_record import open_records
from proteus_jax.data.sources.base import Columns, Source
from proteus_jax.data.sources.parquet import open_parquet
from proteus_jax.data.sources.tar_archive import open_tar
from proteus_jax.data.sources.tfds import open_tfds
from proteus_jax.data.sources.zip_archive import open_zip

# By what stands before the first colon of a place; each is given the whole place.
SCHEMES: dict[str, Callable[[str], Source]] = {"tfds": open_tfds}
# By the suffix of files that hold many images; each is given the paths of all of them, and the
# columns that are asked for; it returns what was passed over as well.
SHARDS: dict[str, Callable[[Sequence[str], Columns], tuple[Source, PassedOver]]] = {
    ".tar": open_tar,
    ".zip": open_zip,
    ".parquet": open_parquet,
    ".array_record": open_records,
}
