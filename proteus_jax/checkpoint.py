"""Checkpoints through orbax: written in the background, sealed when they are complete, believed
only while they equal their seal, restored onto whatever devices there are.

A directory a step, `checkpoints/4`. Orbax writes it; the first host then seals it, notes the step
in checkpoints.json beside the directory, says so, and removes the oldest. Orbax's own manager is
not used: it takes an empty directory for the newest step, and forgets the others when a save fails.
"""

import contextlib
import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from proteus_jax.errors import InputError, Interrupted
from proteus_jax.integrity import SEAL, damage, is_sealed, seal, there, write_whole
from proteus_jax.standardise import Moments, no_moments
from proteus_jax.step import Skipped, TrainState

# Parameters are an item of their own: who only wants the model need not know the optimizer.
PARAMS, PROGRESS, STATISTICS, FACTS = "params", "progress", "statistics", "facts"
# Where damaged ones are put.
DAMAGED = "damaged"
UNFINISHED = ".orbax-checkpoint-tmp"
# So much has to find room, in bytes.
TRIAL = 2**16
# Every directory that orbax finished has the one; and the other, where it says so by a file.
ORBAXS, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
# Hosts wait for each other so long in a save before it fails, in seconds.
PATIENCE = 600
# The threads of a failed save have come to rest when they leave nothing new for so long, and are
# waited for so long at most; in seconds.
REST, RESTLESS = 0.5, 15


class Keep(NamedTuple):
    """Which checkpoints stay: the newest ones, and every so many steps one for ever."""

    last: int
    every: int | None = None

    def superfluous(self, steps: Sequence[int]) -> list[int]:
        """Of the steps that are saved, those to be removed; never the newest."""
        older = sorted(steps)[: -self.last]
        return [step for step in older if not (self.every and step % self.every == 0)]


class Found(NamedTuple):
    """The newest checkpoint that is whole, or None, and what is wrong with those after it, in words
    by the name of their directory.
    """

    step: int | None
    faults: dict[int, str]


class Checkpoints:
    """The checkpoints of a run: the train state, and the facts that a resumed run must agree
    with.

    `saved` hears of every step that is complete on the disk, `failed` of every one that could not
    be saved and why; both from another thread.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep: Keep | None = None,
        saved: Callable[[int, float], None] = lambda step, seconds: None,
        failed: Callable[[int, str], None] = lambda step, reason: None,
    ):
        self._root, self._keep = epath.Path(directory), keep
        # The newest step that was said to be saved. Not in the directory: one that is lost, or was
        # emptied, must not pass for one that never was.
        self._noted = self._root.parent / f"{self._root.name}.json"
        self._saved, self._failed = saved, failed
        self._writing: threading.Thread | None = None
        # Saves that failed since the last good one; and whether one ever did.
        self.failed_in_a_row, self._ever_failed = 0, False
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(PARAMS, PROGRESS, STATISTICS, FACTS),
            # Where directories cannot be made the save fails at once: threads that wait for them
            # would keep the process from its end.
            async_options=ocp.options.AsyncOptions(
                timeout_secs=PATIENCE, create_directories_asynchronously=False
            ),
            # With their processes named hosts wait for each other with a limit of time; else in a
            # collective, for ever where one of them failed.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count()))
                if jax.process_count() > 1
                else None
            ),
        )

    def newest(self) -> Found:
        """The newest checkpoint that is whole. InputError where there is none, but one had been
        saved: a run that lost its checkpoints must not begin anew without a word.
        """
        last = self._last_saved()
        faults: dict[int, str] = {}
        for step in sorted(self.steps(), reverse=True):
            reason = damage(self._root / str(step), _name(step))
            if reason is None:
                if last is not None and last > step:
                    faults.setdefault(last, "it is gone")
                return Found(step, faults)
            faults[step] = reason
        directories = [self._root / str(step) for step in faults]
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
        return Found(None, faults)

    def make_way(self, found: Found) -> None:
        """Puts what is damaged, or nothing of ours, aside, and removes what saves left unfinished;
        on one host.
        """
        if not there(self._root):
            return
        last = self._last_saved()
        for step in self.steps():
            directory = self._root / str(step)
            if step == found.step or (step not in found.faults and is_sealed(directory)):
                continue
            was_saved = is_sealed(directory) or (step in found.faults and (last or -1) >= step)
            was_saved |= found.step is None and _is_orbaxs(directory)
            if was_saved or not _is_a_part(directory):
                _put_aside(directory, self._root / DAMAGED)
            else:
                _remove(directory)
        self._clear()

    def _clear(self) -> bool:
        """Removes what saves left unfinished; whether there was any."""
        if not self._root.is_dir():
            return False
        unfinished = [path for path in self._root.iterdir() if UNFINISHED in path.name]
        for path in unfinished:
            _remove(path)
        return bool(unfinished)

    def _clear_for_good(self) -> None:
        """The same where threads of a failed save may still write, below a directory that is being
        removed too: orbax ends a save with its first error, whatever its other threads do.
        """
        begin = quiet = time.monotonic()
        while time.monotonic() < min(quiet + REST, begin + RESTLESS):
            try:
                there_was_some = self._clear()
            except Exception:
                there_was_some = True
            if there_was_some:
                quiet = time.monotonic()
            time.sleep(REST / 10)

    def why_not(self, step: int) -> OSError | None:
        """What would stop a save at once, on the first host: then no host has to begin with it."""
        target, trial = self._root / str(step), self._root / f"trial{UNFINISHED}"
        try:
            if target.exists():
                raise FileExistsError(errno.EEXIST, "something is there already", str(target))
            trial.mkdir(parents=True, exist_ok=True)
            (trial / "file").write_bytes(bytes(TRIAL))
            trial.rmtree()
        except OSError as error:
            return error
        return None

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Waits for the save before, starts this one, and returns as soon as the state may change
        again.
        """
        self.wait()
        if self.failed_in_a_row and jax.process_index() == 0:
            # The threads of the save that failed may have written on after it had.
            with contextlib.suppress(Exception):
                self._clear()
        items = {
            PARAMS: ocp.args.StandardSave(state.params),
            PROGRESS: ocp.args.StandardSave(_progress(state)),
            FACTS: ocp.args.JsonSave(facts),
        }
        if state.statistics:
            items[STATISTICS] = ocp.args.StandardSave(_named(state.statistics))
        start = time.monotonic()
        try:
            self._orbax.save(self._root / str(step), args=ocp.args.Composite(**items))
        except Exception as error:
            self.fail(step, error)
            if jax.process_count() > 1:
                # The others wait for this one somewhere in it: with it they end, in words.
                raise Interrupted(
                    f"the checkpoint of step {step} could not be saved: {_in_words(error)}"
                ) from None
            return
        self._writing = threading.Thread(target=self._finish, args=(step, start))
        self._writing.start()

    def _finish(self, step: int, start: float) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                seal(self._root / str(step), _name(step))
                write_whole(self._noted, json.dumps({"step": step}) + "\n")
        except Exception as error:
            self.fail(step, error)
            return
        self.failed_in_a_row = 0
        self._saved(step, time.monotonic() - start)
        if jax.process_index() == 0 and self._keep is not None:
            with contextlib.suppress(Exception):
                self._remove_oldest(self._keep)

    def fail(self, step: int, error: Exception) -> None:
        """Counts and tells of a save that came to nothing, and removes what there is of it."""
        self.failed_in_a_row += 1
        self._ever_failed = True
        self._failed(step, _in_words(error))
        if jax.process_index() == 0:
            # Each file system has its own errors.
            with contextlib.suppress(Exception):
                if str(step) in map(str, self.steps()) and not is_sealed(self._root / str(step)):
                    _remove(self._root / str(step))
                self._clear()

    def _remove_oldest(self, keep: Keep) -> None:
        """What cannot be removed now is met again at the next save."""
        steps = self.steps()
        sealed = [step for step in steps if is_sealed(self._root / str(step))]
        begun = [step for step in steps if step < max(sealed) and step not in sealed]
        for step in [*begun, *keep.superfluous(sealed)]:
            directory = self._root / str(step)
            with contextlib.suppress(Exception):
                if _is_a_part(directory):
                    # Without its seal first: killed meanwhile, what is left is no checkpoint.
                    (directory / SEAL).unlink(missing_ok=True)
                    directory.rmtree()

    def forget(self) -> None:
        """Removes all there is, to begin anew; on one host."""
        self._noted.unlink(missing_ok=True)
        if there(self._root):
            self._root.rmtree()

    def restore(self, step: int, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The state of a step, born on the given shardings."""
        wanted = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            shapes,
            shardings,
        )
        items = {
            PARAMS: ocp.args.StandardRestore(wanted.params),
            PROGRESS: ocp.args.StandardRestore(_progress(wanted)),
        }
        if wanted.statistics:
            items[STATISTICS] = ocp.args.StandardRestore(_named(wanted.statistics))
        restored = self._restore(step, items)
        progress = restored[PROGRESS]
        return TrainState(
            progress["step"],
            restored[PARAMS],
            progress["optimizer"],
            progress.get("ema"),
            _moments(restored.get(STATISTICS)),
            Skipped(**progress["skipped"]),
        )

    def statistics(self, step: int, widths: dict[str, int]) -> dict[str, Moments]:
        """The moments of those teachers whose tokens are standardised, whole on the first
        device.
        """
        if not widths:
            return {}
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device),
            {name: no_moments(width)._asdict() for name, width in widths.items()},
        )
        restored = self._restore(step, {STATISTICS: ocp.args.StandardRestore(wanted)})
        return _moments(restored[STATISTICS])

    def params(self, step: int, shapes: dict[str, Any]) -> dict[str, Any]:
        """The parameters alone, whole on the first device."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=device), shapes
        )
        return self._restore(step, {PARAMS: ocp.args.StandardRestore(wanted)})[PARAMS]

    def facts(self, step: int) -> dict[str, Any]:
        """The facts of a step."""
        return self._restore(step, {FACTS: ocp.args.JsonRestore()})[FACTS]

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        try:
            return self._orbax.restore(self._root / str(step), args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"the checkpoint of step {step} does not fit this run: {_in_words(error)}"
            ) from None

    def steps(self) -> list[int]:
        """Of all directories that are named like one, whatever is in them."""
        if not there(self._root) or not self._root.is_dir():
            return []
        names = [path.name for path in self._root.iterdir()]
        return [int(name) for name in names if name.isdecimal() and name == str(int(name))]

    def _last_saved(self) -> int | None:
        """What was noted; 0 where that says nothing that can be read, None where nothing was."""
        if not there(self._noted):
            return None
        try:
            return int(json.loads(self._noted.read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def wait(self) -> None:
        """Returns when what was started is on the disk, or has failed and was told of."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self.wait()
        self._orbax.close()
        if self._ever_failed and jax.process_index() == 0:
            self._clear_for_good()


def _name(step: int) -> str:
    return f"step {step}"


def _in_words(error: Exception) -> str:
    """One line of an error. TensorStore's go on for a page, with the system's own word in it."""
    text = str(error).strip()
    system = re.search(r"\[OS error (\d+)", text)
    if system:
        return os.strerror(int(system.group(1)))
    lines = text.splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink()


def _is_orbaxs(directory: epath.Path) -> bool:
    """Whether orbax had come to its end there."""
    return (directory / ORBAXS).exists() and (directory / PARAMS).exists()


def _is_a_part(directory: epath.Path) -> bool:
    """Whether there is nothing in it but what belongs to a checkpoint."""
    own = (PARAMS, PROGRESS, STATISTICS, FACTS, SEAL, COMMITTED)
    return directory.is_dir() and all(
        # Orbax's other ones begin so; and what a file system keeps of files that are still open.
        path.name in own or path.name.startswith(("_", "."))
        for path in directory.iterdir()
    )


def _put_aside(directory: epath.Path, folder: epath.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # A store has no folders but those with something in them.
    (folder / "README").write_text("Checkpoints that are not as they were saved.\n")
    target, number = folder / directory.name, 0
    while target.exists():
        number += 1
        target = folder / f"{directory.name}-{number}"
    directory.rename(target)


def _progress(state: TrainState) -> dict[str, Any]:
    """All of a state but its parameters."""
    progress = {
        "step": state.step,
        "optimizer": state.optimizer,
        "skipped": state.skipped._asdict(),
    }
    return progress if state.ema is None else progress | {"ema": state.ema}


def _named(statistics: dict[str, Moments]) -> dict[str, dict[str, Any]]:
    return {name: moments._asdict() for name, moments in statistics.items()}


def _moments(named: dict[str, dict[str, Any]] | None) -> dict[str, Moments]:
    return {name: Moments(**each) for name, each in (named or {}).items()}
