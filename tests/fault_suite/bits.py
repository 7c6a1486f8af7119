"""Checkpoints that are no longer what was saved."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fault_suite.account import Fault
from fault_suite.bench import EVERY, STEPS, Bench, arrays
from proteus_jax.checkpoint.checksums import SEAL
from proteus_jax.checkpoint.store import CheckpointStore
from proteus_jax.errors import InputError

NEWEST = STEPS
# Of the undisturbed run, so many of the newest are looked at.
KEPT = 3
# What says that something was saved, beside the directory.
NOTED = "checkpoints.json"


def _files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(step: Path, rng: random.Random) -> None:
    """One bit of one file."""
    path = rng.choice([path for path in _files(step) if path.stat().st_size])
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(step: Path, rng: random.Random) -> None:
    """A file without its end."""
    path = rng.choice([path for path in _files(step) if path.stat().st_size])
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(step: Path, rng: random.Random) -> None:
    """A file less."""
    rng.choice(_files(step)).unlink()


def empty_file(step: Path, rng: random.Random) -> None:
    """A file of no bytes."""
    rng.choice([path for path in _files(step) if path.stat().st_size]).write_bytes(b"")


def exchange(step: Path, rng: random.Random) -> None:
    """Two files under each other's names."""
    one, two = rng.sample([p for p in _files(step) if p.stat().st_size > 100], 2)
    first, second = one.read_bytes(), two.read_bytes()
    if first == second:
        delete(step, rng)
        return
    one.write_bytes(second)
    two.write_bytes(first)


def zeros(step: Path, rng: random.Random) -> None:
    """A page that was never written, as after a power cut."""
    path = rng.choice([path for path in _files(step) if path.stat().st_size > 64])
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) - 16)
    if not any(content[start : start + 512]):
        content[start] = 1
    else:
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def empty(step: Path, rng: random.Random) -> None:
    """A directory with nothing in it."""
    shutil.rmtree(step)
    step.mkdir()


def gone(step: Path, rng: random.Random) -> None:
    """No directory at all."""
    shutil.rmtree(step)


def renamed(step: Path, rng: random.Random) -> None:
    """An older step under this one's name."""
    shutil.rmtree(step)
    shutil.copytree(step.parent / str(NEWEST - KEPT * EVERY + EVERY), step)


def unsealed(step: Path, rng: random.Random) -> None:
    """A save that was killed before its seal."""
    (step / SEAL).unlink()


def sealed_by_half(step: Path, rng: random.Random) -> None:
    """A seal without its end."""
    path = step / SEAL
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


SPOIL = (flip, flip, flip, truncate, delete, empty_file, exchange, zeros)
SPOIL_WHOLE = (empty, gone, renamed, unsealed, sealed_by_half)
# Beside whole checkpoints: nothing of it may be taken for one.
BESIDE: dict[str, Callable[[Path], object]] = {
    "an empty directory of a later step": lambda root: (root / "99").mkdir(),
    "a file named like a step": lambda root: (root / "99").write_bytes(b""),
    "a save that was not finished": lambda root: shutil.copytree(
        root / str(NEWEST), root / "99.orbax-checkpoint-tmp"
    ),
    "a note of nothing": lambda root: (root.parent / NOTED).write_text("{"),
    "no note": lambda root: (root.parent / NOTED).unlink(),
    "a loop of links": lambda root: (root / "98").symlink_to(root / "98"),
    "a stranger's file": lambda root: (root / "notes.txt").write_text("mine"),
}


def corruptions(bench: Bench, count: int, seed: int) -> list[Fault]:
    """So many random ones of the newest checkpoints; what is left whole must be found."""
    known = {
        step: arrays(bench.undisturbed, step)
        for step in range(NEWEST - (KEPT - 1) * EVERY, NEWEST + 1, EVERY)
    }
    faults = [
        Fault(f"{number}", lambda number=number: _spoilt(bench, known, number, seed))
        for number in range(count - len(BESIDE))
    ]
    for name, act in BESIDE.items():
        faults.append(Fault(name, lambda name=name, act=act: _beside(bench, known, name, act)))
    return faults


Known = dict[int, dict[str, np.ndarray]]


def _spoilt(bench: Bench, known: Known, number: int, seed: int) -> None:
    rng = random.Random(seed * 1000 + number)
    root = _few(bench, known, f"spoilt {number}")
    # One, two or all of them.
    spoilt = sorted(known, reverse=True)[: rng.choice((1, 1, 1, 2, KEPT))]
    kinds = []
    for step in spoilt:
        kind = rng.choice(SPOIL + SPOIL if number % 3 else SPOIL_WHOLE)
        if kind is renamed and len(spoilt) == KEPT:
            kind = flip
        kind(root / str(step), rng)
        kinds.append(kind.__name__)
    if number % 7 == 0:
        (root.parent / NOTED).unlink()
    left = [step for step in known if step not in spoilt]
    shelf = CheckpointStore(str(root))
    if not left:
        _nothing_is_left(shelf, root, spoilt, kinds)
        return
    found = shelf.newest()
    assert found.step == max(left), (found, kinds)
    for step, kind in zip(spoilt, kinds, strict=True):
        if not (kind == "gone" and (step != NEWEST or not (root.parent / NOTED).exists())):
            assert found.faults[step], kinds
    shelf.quarantine_and_clean(found)
    assert sorted(shelf.steps()) == left
    _is(root, max(left), known)
    shutil.rmtree(root.parent)


def _nothing_is_left(
    shelf: CheckpointStore, root: Path, spoilt: list[int], kinds: list[str]
) -> None:
    """An error that names every one; only without a trace of a finished save may a run begin."""
    before = sorted(str(path) for path in root.rglob("*"))
    finished = [step for step in spoilt if (root / str(step) / "_CHECKPOINT_METADATA").exists()]
    if (root.parent / NOTED).exists() or list(root.rglob(SEAL)) or len(finished) > 1:
        with pytest.raises(InputError) as error:
            shelf.newest()
        for step, kind in zip(spoilt, kinds, strict=True):
            assert kind == "gone" or f"step {step}: " in str(error.value)
    else:
        assert shelf.newest().step is None, kinds
    assert sorted(str(path) for path in root.rglob("*")) == before


def _beside(bench: Bench, known: Known, name: str, act: Callable[[Path], object]) -> None:
    root = _few(bench, known, f"beside {name}")
    act(root)
    shelf = CheckpointStore(str(root))
    found = shelf.newest()
    assert found.step == NEWEST, found
    assert found.unfinished == [path.name for path in root.glob("*tmp*")]
    shelf.quarantine_and_clean(found)
    assert sorted(shelf.steps()) == sorted(known)
    assert not list(root.glob("*tmp*"))
    _is(root, NEWEST, known)


def _few(bench: Bench, known: Known, name: str) -> Path:
    root = bench.root / name / "checkpoints"
    for step in known:
        shutil.copytree(bench.undisturbed / "checkpoints" / str(step), root / str(step))
    shutil.copy(bench.undisturbed / NOTED, root.parent)
    return root


def _is(root: Path, step: int, known: Known) -> None:
    found = arrays(root.parent, step)
    assert found.keys() == known[step].keys()
    for key, array in known[step].items():
        assert found[key].tobytes() == array.tobytes(), key


def resumed(bench: Bench, count: int, seed: int) -> list[Fault]:
    """The same through the command line: the run goes on from what is whole, to the same end."""
    return [
        Fault(f"resumed {number}", lambda number=number: _resumed(bench, number, seed))
        for number in range(count)
    ]


def _resumed(bench: Bench, number: int, seed: int) -> None:
    rng = random.Random(seed * 1000 + 900 + number)
    workdir = bench.copy(f"spoilt run {number}")
    kind = rng.choice(SPOIL + SPOIL_WHOLE)
    kind(workdir / "checkpoints" / str(NEWEST), rng)
    printed = bench.goes_on_and_is_the_same(workdir, "--config.keep_checkpoints=100")
    assert f"the checkpoint of step {NEWEST} is not whole: " in printed, kind.__name__
    assert f"resuming at step {NEWEST - EVERY}" in printed
    shutil.rmtree(workdir)


def nothing_left(bench: Bench) -> list[Fault]:
    """All checkpoints damaged or gone: an error, and the workdir as it was."""
    return [
        Fault("no good one left", lambda: _refused(bench, "spoilt", _spoil_all)),
        Fault("an empty folder left", lambda: _refused(bench, "emptied", _empty_all)),
        Fault("no folder left", lambda: _refused(bench, "removed", shutil.rmtree)),
    ]


def _spoil_all(folder: Path) -> None:
    for step in folder.iterdir():
        flip(step, random.Random(0))


def _empty_all(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _refused(bench: Bench, name: str, act: Callable[[Path], None]) -> None:
    workdir = bench.copy(f"nothing left, {name}")
    act(workdir / "checkpoints")
    before = _contents(workdir)
    result = bench.run(bench.command(workdir))
    assert result.returncode == 2, result.stdout
    assert f"a run was saved here at step {NEWEST}, and no checkpoint of it is whole" in (
        result.stderr
    )
    assert _contents(workdir) == before


def _contents(workdir: Path) -> dict[Path, bytes]:
    # The lock says who was here last.
    return {path: path.read_bytes() for path in _files(workdir) if path.name != ".lock"}
