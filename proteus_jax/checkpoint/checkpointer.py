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
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from proteus_jax.checkpoint.items import FACTS, PARAMS, PROGRESS, STATISTICS
from proteus_jax.checkpoint.store import CheckpointStore, RetentionPolicy
from proteus_jax.errors import InputError, Interrupted

# Hosts wait for each other so long in a save before it fails, in seconds.
PATIENCE = 600


class Checkpoints:
    """The checkpoints of a run: pytrees by name, and the facts that a resumed run must agree with.

    `saved` hears of every step that is complete on the disk, `failed` of every one that could not
    be saved and why; both from another thread.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep: RetentionPolicy | None = None,
        saved: Callable[[int, float], None] = lambda step, seconds: None,
        failed: Callable[[int, str], None] = lambda step, reason: None,
    ):
        self.store, self._keep = CheckpointStore(directory), keep
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

    def save(self, step: int, items: Mapping[str, Any], facts: dict[str, Any]) -> None:
        """Waits for the save before, starts this one, and returns as soon as the arrays of `items`
        may change again.
        """
        self.wait()
        if self.failed_in_a_row and jax.process_index() == 0:
            # The threads of the save that failed may have written on after it had.
            with contextlib.suppress(Exception):
                self.store.clear()
        written: dict[str, Any] = {
            name: ocp.args.StandardSave(item) for name, item in items.items()
        }
        written[FACTS] = ocp.args.JsonSave(facts)
        start = time.monotonic()
        try:
            self._orbax.save(self.store.place(step), args=ocp.args.Composite(**written))
        except Exception as error:
            self.fail(step, error)
            if jax.process_count() > 1:
                # The others wait for this one somewhere in it: with it they end, in words.
                raise Interrupted(
                    f"the checkpoint of step {step} could not be saved: {_error_text(error)}"
                ) from None
            return
        self._writing = threading.Thread(target=self._finish, args=(step, start))
        self._writing.start()

    def _finish(self, step: int, start: float) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self.store.complete(step)
        except Exception as error:
            self.fail(step, error)
            return
        self.failed_in_a_row = 0
        self._saved(step, time.monotonic() - start)
        if jax.process_index() == 0 and self._keep is not None:
            with contextlib.suppress(Exception):
                self.store.remove_oldest(self._keep)

    def fail(self, step: int, error: Exception) -> None:
        """Counts and tells of a save that came to nothing, and removes what there is of it."""
        self.failed_in_a_row += 1
        self._ever_failed = True
        self._failed(step, _error_text(error))
        if jax.process_index() == 0:
            # Each file system has its own errors.
            with contextlib.suppress(Exception):
                self.store.discard(step)

    def restore(
        self, step: int, shapes: Mapping[str, Any], shardings: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The named items of a step, born on the given shardings, or else whole on the first
        device.
        """
        if shardings is None:
            first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: first, shapes)
        wanted = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            shapes,
            shardings,
        )
        arguments = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
        restored = self._restore(step, arguments)
        return {name: restored[name] for name in wanted}

    def facts(self, step: int) -> dict[str, Any]:
        """The facts of a step."""
        return self._restore(step, {FACTS: ocp.args.JsonRestore()})[FACTS]

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        try:
            return self._orbax.restore(self.store.place(step), args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"the checkpoint of step {step} does not fit this run: {_error_text(error)}"
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
            self.store.clear_for_good()


def _error_text(error: Exception) -> str:
    """One line of an error. TensorStore's go on for a page, with the system's own word in it."""
    text = str(error).strip()
    system = re.search(r"\[OS error (\d+)", text)
    if system:
        return os.strerror(int(system.group(1)))
    lines = text.splitlines()
    return lines[0][:300] if lines else type(error).__name__
