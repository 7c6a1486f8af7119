"""Checkpoints through orbax: written in the background, sealed when they are complete, believed
only while they equal their seal, restored onto whatever devices there are.

Orbax writes a directory; the first host then seals it, notes the step, says so, and removes the
oldest. Orbax's own manager is not used: it takes an empty directory for the newest step, and
forgets the others when a save fails.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from proteus_jax.checkpoint.store import FACTS, PARAMS, PROGRESS, STATISTICS, Keep, Shelf
from proteus_jax.errors import InputError, Interrupted
from proteus_jax.methods.feature_standardization import Moments, no_moments
from proteus_jax.training.train_step import Skipped, TrainState

# Hosts wait for each other so long in a save before it fails, in seconds.
PATIENCE = 600


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
        self.shelf, self._keep = Shelf(directory), keep
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

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Waits for the save before, starts this one, and returns as soon as the state may change
        again.
        """
        self.wait()
        if self.failed_in_a_row and jax.process_index() == 0:
            # The threads of the save that failed may have written on after it had.
            with contextlib.suppress(Exception):
                self.shelf.clear()
        items = {
            PARAMS: ocp.args.StandardSave(state.params),
            PROGRESS: ocp.args.StandardSave(_progress(state)),
            FACTS: ocp.args.JsonSave(facts),
        }
        if state.statistics:
            items[STATISTICS] = ocp.args.StandardSave(_named(state.statistics))
        start = time.monotonic()
        try:
            self._orbax.save(self.shelf.place(step), args=ocp.args.Composite(**items))
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
                self.shelf.complete(step)
        except Exception as error:
            self.fail(step, error)
            return
        self.failed_in_a_row = 0
        self._saved(step, time.monotonic() - start)
        if jax.process_index() == 0 and self._keep is not None:
            with contextlib.suppress(Exception):
                self.shelf.remove_oldest(self._keep)

    def fail(self, step: int, error: Exception) -> None:
        """Counts and tells of a save that came to nothing, and removes what there is of it."""
        self.failed_in_a_row += 1
        self._ever_failed = True
        self._failed(step, _in_words(error))
        if jax.process_index() == 0:
            # Each file system has its own errors.
            with contextlib.suppress(Exception):
                self.shelf.discard(step)

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
            return self._orbax.restore(self.shelf.place(step), args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"the checkpoint of step {step} does not fit this run: {_in_words(error)}"
            ) from None

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
            self.shelf.clear_for_good()


def _in_words(error: Exception) -> str:
    """One line of an error. TensorStore's go on for a page, with the system's own word in it."""
    text = str(error).strip()
    system = re.search(r"\[OS error (\d+)", text)
    if system:
        return os.strerror(int(system.group(1)))
    lines = text.splitlines()
    return lines[0][:300] if lines else type(error).__name__


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
