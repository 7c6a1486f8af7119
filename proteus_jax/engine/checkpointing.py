"""When a run saves, what it says of it, and when failed saves are a reason to stop."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from proteus_jax.checkpoint.checkpointer import Checkpoints
from proteus_jax.checkpoint.store import Found, RetentionPolicy
from proteus_jax.errors import Interrupted
from proteus_jax.runtime import collectives
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.heartbeat import Heartbeat


class CheckpointManager:
    """The checkpoints of a run, and which one it would go on from."""

    def __init__(
        self, address: str, console: Console, keep: RetentionPolicy, max_failed_saves: int
    ):
        self._limit, self._console = max_failed_saves, console
        # Hears of what is saved; set before the first save.
        self.heartbeat: Heartbeat | None = None
        # The newest checkpoint that is complete on the disk.
        self.newest: int | None = None
        self._checkpoints = Checkpoints(
            address,
            keep=keep,
            saved=self._note_saved,
            failed=self._note_failed,
        )

    def resumed(self, step: int) -> None:
        """Notes that the run goes on from there."""
        self.newest = step

    def latest(self) -> Found:
        """Looks for the newest checkpoint that is whole; InputError where all are lost."""
        return self._checkpoints.store.newest()

    def quarantine(self, newest: Found) -> None:
        """Puts aside what is damaged or not finished after the newest checkpoint."""
        self._checkpoints.store.quarantine_and_clean(newest)

    def steps(self) -> list[int]:
        """Lists the steps of the checkpoints that this host sees."""
        return self._checkpoints.store.steps()

    def facts(self, step: int) -> dict[str, Any]:
        """Reads the facts of a checkpoint."""
        return self._checkpoints.facts(step)

    def restore(
        self, step: int, shapes: Mapping[str, Any], shardings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Reads the items of a checkpoint onto the given shardings."""
        return self._checkpoints.restore(step, shapes, shardings)

    def forget(self) -> None:
        """Removes all of them."""
        self._checkpoints.store.forget()

    def wait(self) -> None:
        """Returns when what was begun is saved, or has failed and was told of."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self._checkpoints.close()

    def _note_saved(self, step: int, seconds: float) -> None:
        self.newest = step
        if self.heartbeat is not None:
            self.heartbeat.saved(step)
        self._console.log(f"step {step} is saved, in {seconds:.1f} s")

    def _note_failed(self, step: int, reason: str) -> None:
        before = (
            "there is none yet" if self.newest is None else f"the newest is of step {self.newest}"
        )
        self._console.line(f"the checkpoint of step {step} could not be saved: {reason}; {before}")

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        facts: dict[str, Any],
        rows_written: Callable[[], OSError | None],
    ) -> None:
        """A checkpoint, once the rows before it are where a resumed run looks for them.

        All hosts save, or none does: they wait for each other in it.
        """
        self._checkpoints.wait()
        failure = rows_written()
        if failure is None and jax.process_index() == 0:
            failure = self._checkpoints.store.save_error(step)
        if collectives.broadcast_from_rank0(int(failure is None)):
            self._checkpoints.save(step, items, facts)
        else:
            self._checkpoints.fail(step, failure or OSError("host 0 cannot write"))

    def reason_to_stop(self) -> Interrupted | None:
        """Returns an Interrupted where too many saves failed one after the other."""
        failed = self._checkpoints.failed_in_a_row
        if failed <= self._limit:
            return None
        return Interrupted(f"{failed} saves in a row failed (--config.max_failed_saves)")

    def resume_point(self) -> str:
        """The step that a resumed run would go on from, in words."""
        return "its beginning" if self.newest is None else f"step {self.newest}"
