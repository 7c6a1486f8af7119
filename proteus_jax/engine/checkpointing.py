"""When a run saves, what it says of it, and when failed saves are a reason to stop."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from proteus_jax.checkpoint.checkpointer import Checkpoints
from proteus_jax.checkpoint.store import RetentionPolicy
from proteus_jax.errors import Interrupted
from proteus_jax.runtime import collectives
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.heartbeat import Heartbeat
from proteus_jax.runtime.workdir import Workdir


class CheckpointManager:
    """The checkpoints of a run, and which one it would go on from."""

    heartbeat: Heartbeat

    def __init__(
        self, place: Workdir, console: Console, keep: RetentionPolicy, max_failed_saves: int
    ):
        self._limit, self._console = max_failed_saves, console
        # The newest checkpoint that is complete on the disk.
        self.newest: int | None = None
        self.checkpoints = Checkpoints(
            place.checkpoints,
            keep=keep,
            saved=self._note_saved,
            failed=self._note_failed,
        )

    def resumed(self, step: int) -> None:
        """The run goes on from there."""
        self.newest = step
        self.heartbeat.resumed(step)

    def _note_saved(self, step: int, seconds: float) -> None:
        self.newest = step
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
        self.checkpoints.wait()
        failure = rows_written()
        if failure is None and jax.process_index() == 0:
            failure = self.checkpoints.shelf.save_error(step)
        if collectives.broadcast_from_rank0(int(failure is None)):
            self.checkpoints.save(step, items, facts)
        else:
            self.checkpoints.fail(step, failure or OSError("host 0 cannot write"))

    def reason_to_stop(self) -> Interrupted | None:
        """Returns an Interrupted where too many saves failed one after the other."""
        failed = self.checkpoints.failed_in_a_row
        if failed <= self._limit:
            return None
        return Interrupted(f"{failed} saves in a row failed (--config.max_failed_saves)")

    def resume_point(self) -> str:
        """The step that a resumed run would go on from, in words."""
        return "its beginning" if self.newest is None else f"step {self.newest}"
