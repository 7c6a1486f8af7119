"""Checkpoints through orbax: written in the background, restored onto whatever devices there
are.
"""

import json
from typing import Any

import jax
import orbax.checkpoint as ocp

from proteus_jax.errors import InputError
from proteus_jax.standardise import Moments, no_moments
from proteus_jax.step import Skipped, TrainState

# Parameters are an item of their own: who only wants the model need not know the optimizer.
PARAMS, PROGRESS, STATISTICS, FACTS = "params", "progress", "statistics", "facts"
# The fact that is none of a run's identity.
CARRIED_ON = "card"


class Checkpoints:
    """The checkpoints of a run: the train state, and the facts that a resumed run must agree
    with.
    """

    def __init__(self, directory: str, *, keep: int | None = None):
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
            item_names=(PARAMS, PROGRESS, STATISTICS, FACTS),
        )

    def latest(self) -> int | None:
        """The newest saved step."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Starts to save; returns as soon as the state may change again."""
        items = {
            PARAMS: ocp.args.StandardSave(state.params),
            PROGRESS: ocp.args.StandardSave(_progress(state)),
            FACTS: ocp.args.JsonSave(facts),
        }
        if state.statistics:
            items[STATISTICS] = ocp.args.StandardSave(_named(state.statistics))
        # force: orbax would otherwise skip a step of its own accord, without a word.
        if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"the checkpoint of step {step} was not saved")

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
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"the checkpoint of step {step} does not fit this run: {reason}"
            ) from None

    def wait(self) -> None:
        """Returns when everything that was started is on the disk, or raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self._manager.wait_until_finished()
        self._manager.close()


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


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What differs between the facts of a checkpoint and those of this run, in words; what its
    student carries on may.
    """
    return [
        f"{key}: the checkpoint has {json.dumps(found.get(key))}, this run has {json.dumps(value)}"
        for key, value in expected.items()
        if key != CARRIED_ON and found.get(key) != value
    ]
