"""The kinds of sources that a place of images can name; a new one is a module and a line here."""

from collections.abc import Callable, Sequence

from proteus_jax.data.sources.array_record import open_records
from proteus_jax.data.sources.base import Source
from proteus_jax.data.sources.shards import open_parquet, open_tar
from proteus_jax.data.sources.tfds import open_tfds

# By what stands before the first colon of a place; each is given the whole place.
SCHEMES: dict[str, Callable[[str], Source]] = {"tfds": open_tfds}
# By the suffix of files that hold many images; each is given the paths of all of them.
SHARDS: dict[str, Callable[[Sequence[str]], Source]] = {
    ".tar": open_tar,
    ".parquet": open_parquet,
    ".array_record": open_records,
}
