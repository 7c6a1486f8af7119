"""A model directory in the formats of other libraries, each loaded back with the library it is
meant for and compared before it gets its name.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from proteus_jax.errors import InputError
from proteus_jax.runtime.filesystem import as_open_as_any_other, atomic_directory, made_folder
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert.export_formats import FORMATS, ExportSource, Settings
from proteus_jax.weights.convert.parity import Comparison, compare, our_outputs
from proteus_jax.weights.model_dir import load_model

# Largest error of an export that counts as done, in standard deviations of our own tokens.
TOLERANCE = 1e-4

# As the table says.
DEFAULTS = Settings()


def export(
    directory: Path,
    name: str,
    output: Path,
    photographs: Callable[[int, int], UInt8[np.ndarray, "b h w 3"]],
    settings: Settings = DEFAULTS,
    *,
    check: bool = True,
) -> list[Comparison]:
    """Writes a format and returns how it compares; `photographs` makes images of a height
    and width.

    Without `check` it is not loaded back: the library it is meant for is not needed, and nothing is
    returned. InputError where the format has no place for this model, where the output exists, or
    where an output is further off than TOLERANCE: then nothing is left.
    """
    subject = _subject(Path(directory).expanduser())
    chosen = FORMATS[name]
    output = Path(output).expanduser()
    if chosen.suffixes and output.suffix not in chosen.suffixes:
        raise InputError(f"{output}: expected a name that ends in {' or '.join(chosen.suffixes)}")
    sides = settings.sides_of(subject.spec)
    with _unfinished(output, is_directory=not chosen.suffixes) as temporary:
        chosen.write(subject, temporary, settings)
        if not check:
            return []
        images = photographs(*sides)
        if settings.batch:
            images = np.resize(images, (settings.batch, *images.shape[1:]))
        ours = our_outputs(subject.params, subject.spec, subject.pixels(images))
        comparisons = list(compare(ours, chosen.outputs(subject, temporary, images)))
        far = [one for one in comparisons if not one.largest <= TOLERANCE]
        if far:
            raise InputError(
                f"{output}: not written: loaded back, its {far[0].name} is {far[0].largest:.1e} "
                f"standard deviations off, more than {TOLERANCE:g}"
            )
    return comparisons


def _subject(directory: Path) -> ExportSource:
    params, card = load_model(directory)
    arrays = state_dict.from_params(params, card.spec)
    arrays = {name: np.asarray(a) for name, a in arrays.items() if name not in card.absent}
    return ExportSource(directory, params, card, arrays)


@contextlib.contextmanager
def _unfinished(output: Path, *, is_directory: bool) -> Iterator[Path]:
    """A place to write to that becomes the output when the block ends well."""
    if is_directory:
        with atomic_directory(output) as temporary:
            yield temporary
        return
    if output.exists():
        raise InputError(f"{output}: exists already; give another name or remove it first")
    with (
        made_folder(output.parent),
        tempfile.TemporaryDirectory(prefix=f".{output.stem}-", dir=output.parent) as folder,
    ):
        temporary = Path(folder) / output.name
        yield temporary
        as_open_as_any_other(temporary)
        os.replace(temporary, output)
