"""The directories of a run's checkpoints: which are whole, which stay, and what goes.

A directory a step, `checkpoints/4`, sealed when it is complete; the newest step that was said to be
saved is noted in checkpoints.json beside them.
"""

import contextlib
import errno
import json
import time
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from proteus_jax.checkpoint.checksums import (
    SEAL,
    is_sealed,
    path_exists,
    verify_checksums,
    write_checksums,
    write_whole,
)
from proteus_jax.checkpoint.items import FACTS, PARAMS, PROGRESS, STATISTICS
from proteus_jax.errors import InputError

# Every directory that orbax finished has the one; and the other, where it says so by a file.
ORBAXS, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
UNFINISHED = ".orbax-checkpoint-tmp"
# Where damaged ones are put.
DAMAGED = "damaged"
# So much has to find room, in bytes.
TRIAL = 2**16
# The threads of a failed save have come to rest when they leave nothing new for so long, and are
# waited for so long at most; in seconds.
REST, RESTLESS = 0.5, 15


class RetentionPolicy(NamedTuple):
    """Which checkpoints stay: the newest ones, and every so many steps one for ever."""

    last: int
    every: int | None = None

    def steps_to_delete(self, steps: Sequence[int]) -> list[int]:
        """Selects the saved steps to be removed; never the newest."""
        older = sorted(steps)[: -self.last]
        return [step for step in older if not (self.every and step % self.every == 0)]


class Found(NamedTuple):
    """The newest checkpoint that is whole, or None; what is wrong with those after it, in words by
    the name of their directory; and the names of what saves have left unfinished.
    """

    step: int | None
    faults: dict[int, str]
    unfinished: list[str]


class CheckpointStore:
    """The checkpoints in a directory. Only the first of several hosts changes anything there."""

    def __init__(self, directory: str):
        self._root = epath.Path(directory)
        # Not in the directory: one that is lost, or was emptied, must not pass for one that never
        # was.
        self._note = self._root.parent / f"{self._root.name}.json"

    def place(self, step: int) -> epath.Path:
        """The directory of a step."""
        return self._root / str(step)

    def steps(self) -> list[int]:
        """Steps of all directories with a number as their name, whatever is in them."""
        if not path_exists(self._root) or not self._root.is_dir():
            return []
        names = [path.name for path in self._root.iterdir()]
        return [int(name) for name in names if name.isdecimal() and name == str(int(name))]

    def newest(self) -> Found:
        """The newest checkpoint that is whole. InputError where there is none, but one had been
        saved: a run that lost its checkpoints must not begin anew without a word.
        """
        last = self.last_saved_step()
        faults: dict[int, str] = {}
        unfinished = sorted(path.name for path in self._unfinished())
        for step in sorted(self.steps(), reverse=True):
            reason = verify_checksums(self.place(step), _name(step))
            if reason is None:
                if last is not None and last > step:
                    faults.setdefault(last, "it is gone")
                return Found(step, faults, unfinished)
            faults[step] = reason
        directories = [self.place(step) for step in faults]
        # A kill between orbax's end and the seal leaves one; several are a run of a version
        # without seals.
        several = sum(map(_is_orbaxs, directories)) > 1
        if last is not None or several or any(map(is_sealed, directories)):
            known = "" if last is None else f" at step {last}"
            reasons = [f"step {step}: {reason}" for step, reason in faults.items()]
            raise InputError(
                f"{self._root}: a run was saved here{known}, and no checkpoint of it is whole "
                f"({'; '.join(reasons) or 'there is none'})"
            )
        return Found(None, faults, unfinished)

    def quarantine_and_clean(self, newest: Found) -> None:
        """Puts what is damaged, or none of ours, aside; removes what saves left unfinished."""
        if not path_exists(self._root):
            return
        last = self.last_saved_step()
        for step in self.steps():
            directory = self.place(step)
            if step == newest.step or (step not in newest.faults and is_sealed(directory)):
                continue
            was_saved = is_sealed(directory) or (step in newest.faults and (last or -1) >= step)
            was_saved |= newest.step is None and _is_orbaxs(directory)
            if was_saved or not _is_a_part(directory):
                _quarantine(directory, self._root / DAMAGED)
            else:
                _remove(directory)
        self.clear()

    def clear(self) -> bool:
        """Removes what saves left unfinished; whether there was any."""
        unfinished = self._unfinished()
        for path in unfinished:
            _remove(path)
        return bool(unfinished)

    def _unfinished(self) -> list[epath.Path]:
        if not path_exists(self._root) or not self._root.is_dir():
            return []
        return [path for path in self._root.iterdir() if UNFINISHED in path.name]

    def clear_for_good(self) -> None:
        """The same where threads of a failed save may still write, below a directory that is being
        removed too: orbax ends a save with its first error, whatever its other threads do.
        """
        begin = quiet = time.monotonic()
        while time.monotonic() < min(quiet + REST, begin + RESTLESS):
            try:
                there_was_some = self.clear()
            except Exception:
                there_was_some = True
            if there_was_some:
                quiet = time.monotonic()
            time.sleep(REST / 10)

    def save_error(self, step: int) -> OSError | None:
        """Returns the error that would stop a save at once: then no host has to begin it."""
        target, trial = self.place(step), self._root / f"trial{UNFINISHED}"
        try:
            if target.exists():
                raise FileExistsError(errno.EEXIST, "something is there already", str(target))
            trial.mkdir(parents=True, exist_ok=True)
            (trial / "file").write_bytes(bytes(TRIAL))
            trial.rmtree()
        except OSError as error:
            return error
        return None

    def complete(self, step: int) -> None:
        """Seals and notes what orbax has written; OSError where that fails."""
        write_checksums(self.place(step), _name(step))
        write_whole(self._note, json.dumps({"step": step}) + "\n")

    def discard(self, step: int) -> None:
        """Removes what there is of a save that failed."""
        directory = self.place(step)
        if _is_a_part(directory) and not is_sealed(directory):
            _remove(directory)
        self.clear()

    def remove_oldest(self, keep: RetentionPolicy) -> None:
        """Removes the steps that the policy does not keep. One that cannot be removed now is tried
        again at the next save.
        """
        steps = self.steps()
        sealed = [step for step in steps if is_sealed(self.place(step))]
        incomplete = [step for step in steps if step < max(sealed) and step not in sealed]
        for step in [*incomplete, *keep.steps_to_delete(sealed)]:
            directory = self.place(step)
            with contextlib.suppress(Exception):
                if _is_a_part(directory):
                    # Without its seal first: killed meanwhile, what is left is no checkpoint.
                    (directory / SEAL).unlink(missing_ok=True)
                    directory.rmtree()

    def forget(self) -> None:
        """Removes all there is, to begin anew."""
        self._note.unlink(missing_ok=True)
        for step in self.steps():
            if _is_a_part(self.place(step)):
                _remove(self.place(step))
        self.clear()

    def last_saved_step(self) -> int | None:
        """The newest step that was said to be saved; 0 where that cannot be read, None where there
        is no note. InputError where something else is in its place.
        """
        if not path_exists(self._note):
            return None
        if not self._note.is_file():
            raise InputError(f"{self._note}: expected a file, which says what was saved last")
        try:
            return int(json.loads(self._note.read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return 0


def _name(step: int) -> str:
    return f"step {step}"


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink()


def _is_orbaxs(directory: epath.Path) -> bool:
    """Returns True where orbax finished the directory."""
    return (directory / ORBAXS).exists() and (directory / PARAMS).exists()


def _is_a_part(directory: epath.Path) -> bool:
    """Returns True where a directory holds only items of a checkpoint."""
    own = (PARAMS, PROGRESS, STATISTICS, FACTS, SEAL, COMMITTED)
    return directory.is_dir() and all(
        # Orbax's other ones begin so; and what a file system keeps of files that are still open.
        path.name in own or path.name.startswith(("_", "."))
        for path in directory.iterdir()
    )


def _quarantine(directory: epath.Path, folder: epath.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # A store has no folders but those with something in them.
    (folder / "README").write_text("Checkpoints that are not as they were saved.\n")
    target, number = folder / directory.name, 0
    while target.exists():
        number += 1
        target = folder / f"{directory.name}-{number}"
    directory.rename(target)
