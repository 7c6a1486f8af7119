"""Trains a probe on a frozen backbone, by the loop that trains everything: it is saved as it goes,
stops when it is asked to, and goes on from there.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from proteus_jax.checkpoint.items import FORMAT, PARAMS, PROGRESS, VERSION
from proteus_jax.checkpoint.store import RetentionPolicy
from proteus_jax.engine.checkpointing import CheckpointManager
from proteus_jax.engine.hooks import Checkpointing
from proteus_jax.engine.loop import Hook, Loop, StepEnd, StepFunction, StopSignal
from proteus_jax.engine.monitors import StepTimer
from proteus_jax.errors import InputError, Interrupted
from proteus_jax.evaluation.protocol import Context, Saving
from proteus_jax.runtime import collectives, sharding
from proteus_jax.runtime.preemption import PreemptionHandler

# Steps between two checkpoints of a probe, and saves in a row that may fail.
CHECKPOINT_EVERY, MAX_FAILED_SAVES = 1000, 3
# Steps between two renewals of the live line.
SHOW_EVERY = 10


class _Showing(Hook):
    """The live line; the loss is fetched seldom, as that waits for the device."""

    def __init__(self, progress: Callable[[str], None], steps: int, what: str):
        self._progress, self._steps, self._what = progress, steps, what

    def at_step_end(self, end: StepEnd) -> None:
        """Renews it where it is time."""
        if end.step % SHOW_EVERY == 0 or end.last:
            loss = float(jax.device_get(end.metrics["loss"]))
            self._progress(f"step {end.step}/{self._steps} of {self._what}, mean loss {loss:.3f}")


class _Waiting(Hook):
    """From the first step on a request to stop waits for one."""

    def __init__(self, handler: PreemptionHandler):
        self._handler = handler

    def after_step(self, step: int, metrics: Mapping[str, jax.Array], batch: Any) -> None:
        """Hears of a step."""
        self._handler.waits = True


def train_probe(
    context: Context,
    train_step: StepFunction,
    place: Callable[[Any], tuple[Any, ...]],
    batches: Callable[[int], Generator[Any]],
    *,
    init: Callable[[], Any],
    steps: int,
    what: str,
    facts: dict[str, Any],
) -> Any:
    """Trains to the last step and returns the state, a dict with the arrays `heads`, `momenta` and
    `step`.

    `batches` makes this host's batches from a step on, `place` the inputs of `train_step` of one.
    A checkpoint that was made with other `facts` is of another probe, and is not gone on from.
    Interrupted where somebody asks it to stop.
    """
    saving, manager, stop = context.saving, None, StopSignal()
    hooks: list[Hook] = [_Showing(context.progress, steps, what)]
    state = jax.jit(init, out_shardings=sharding.replicated(context.mesh))()
    step = 0
    with contextlib.ExitStack() as stack:
        if saving is not None:
            stop = StopSignal(lambda: saving.handler.requested)
            manager = CheckpointManager(
                saving.address, saving.console, RetentionPolicy(1), MAX_FAILED_SAVES
            )
            stack.callback(manager.close)
            facts = {FORMAT: VERSION, **facts}
            state, step = _resumed(manager, saving, state, facts, context.mesh)
            hooks += [_Waiting(saving.handler), _checkpointing(manager, stop, facts)]
        loop = Loop(
            train_step,
            place,
            hooks,
            mesh=context.mesh,
            state=state,
            step=step,
            total_steps=steps,
            stop=stop,
            timer=StepTimer(),
            progress=context.progress,
        )
        loop.run(batches(step))
        if saving is not None and manager is not None:
            manager.wait()
            # From here on there is no step that a request to stop could wait for.
            saving.handler.waits = False
            if loop.step < steps or saving.handler.requested:
                raise stop.failure or Interrupted(
                    f"interrupted at step {loop.step} of {steps} of the probe; the same command "
                    f"goes on from {manager.resume_point()}"
                )
    return loop.state


def _checkpointing(
    manager: CheckpointManager, stop: StopSignal, facts: dict[str, Any]
) -> Checkpointing:
    return Checkpointing(
        manager,
        contextlib.nullcontext,
        stop,
        every=CHECKPOINT_EVERY,
        items_of=_items,
        facts=facts,
        before=(),
        rows_written=lambda: None,
    )


def _items(state: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in state.items() if name != "heads"}
    return {PARAMS: state["heads"], PROGRESS: rest}


def _resumed(
    manager: CheckpointManager, saving: Saving, state: Any, facts: dict[str, Any], mesh: Mesh
) -> tuple[Any, int]:
    """The state and the step of the newest checkpoint, where it is of the same probe."""
    step = collectives.broadcast_from_rank0(_newest_step(manager, saving))
    if step < 0:
        return state, 0
    # All hosts read them together.
    if manager.facts(step) != facts:
        saving.console.line("the probe that was saved here is of something else: begun anew")
        if jax.process_index() == 0:
            manager.forget()
        # Nobody saves before it is gone.
        collectives.broadcast_from_rank0(0)
        return state, 0
    manager.resumed(step)
    saving.console.line(f"the probe goes on from step {step}")
    places = jax.tree.map(lambda _: sharding.replicated(mesh), _items(state))
    items = manager.restore(step, jax.eval_shape(lambda: _items(state)), places)
    return {"heads": items[PARAMS], **items[PROGRESS]}, step


def _newest_step(manager: CheckpointManager, saving: Saving) -> int:
    """The step of the newest checkpoint that is whole, -1 where there is none, looked for on the
    first host; what is damaged or unfinished is put out of the way of the next save.
    """
    if jax.process_index():
        return -1
    try:
        newest = manager.latest()
    except InputError as error:
        # A probe can be trained again, other than a run.
        saving.console.line(f"{error}: the probe is begun anew")
        manager.forget()
        return -1
    manager.quarantine(newest)
    return -1 if newest.step is None else newest.step
