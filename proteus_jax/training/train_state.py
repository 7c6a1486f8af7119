"""The state that a training step takes and returns, and how a checkpoint holds it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from proteus_jax.checkpoint.items import PARAMS, PROGRESS, STATISTICS
from proteus_jax.methods.feature_standardization import RunningMoments, init_moments
from proteus_jax.models.functional import Params, StudentFunction


class Skipped(NamedTuple):
    """How many updates were not made: in all, and the last ones without a good one between."""

    total: jax.Array
    in_a_row: jax.Array


class TrainState(NamedTuple):
    """All that a checkpoint keeps. Teachers are not in it; `ema` is None where it is off.

    Params, optimizer and averages are dicts by student name; `statistics` has the running moments
    of each teacher whose tokens are standardized. `skipped` counts the updates that were not made,
    as a loss or gradient was not finite: int32, all of them and those in a row until now.
    """

    step: jax.Array
    params: dict[str, Params]
    optimizer: dict[str, Any]
    ema: dict[str, Params] | None
    statistics: dict[str, RunningMoments]
    skipped: Skipped


def updates_made(state: TrainState) -> jax.Array:
    """How many were made, as AdamW counts them too."""
    return state.step - state.skipped.total


def init_state(
    students: Mapping[str, StudentFunction],
    optimizer: optax.GradientTransformation,
    *,
    ema: bool,
    seed: int,
    standardize: Mapping[str, int] | None = None,
) -> TrainState:
    """Step 0: every student from the same seed, so that one among several equals one alone.
    `standardize` has the widths of the teachers whose tokens are.
    """
    key = jax.random.key(seed)
    params = {name: student.init(key) for name, student in students.items()}
    averages = {name: jax.tree.map(jnp.copy, values["backbone"]) for name, values in params.items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer={name: optimizer.init(values) for name, values in params.items()},
        ema=averages if ema else None,
        statistics={name: init_moments(width) for name, width in (standardize or {}).items()},
        skipped=Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
    )


def to_items(state: TrainState) -> dict[str, Any]:
    """Splits a state, or its shapes or shardings, into the items of a checkpoint."""
    progress = {
        "step": state.step,
        "optimizer": state.optimizer,
        "skipped": state.skipped._asdict(),
    }
    items = {
        PARAMS: state.params,
        PROGRESS: progress if state.ema is None else progress | {"ema": state.ema},
    }
    if state.statistics:
        named = {name: moments._asdict() for name, moments in state.statistics.items()}
        items[STATISTICS] = named
    return items


def from_items(items: Mapping[str, Any]) -> TrainState:
    """Makes a state of what to_items made of it."""
    progress = items[PROGRESS]
    statistics = items.get(STATISTICS, {})
    return TrainState(
        progress["step"],
        items[PARAMS],
        progress["optimizer"],
        progress.get("ema"),
        {name: RunningMoments(**moments) for name, moments in statistics.items()},
        Skipped(**progress["skipped"]),
    )
