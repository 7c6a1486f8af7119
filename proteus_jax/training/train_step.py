"""One training step: frozen teachers and their students see the same images, and a method says what
the students learn of them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, UInt8

from proteus_jax.methods.base import Batch, Method, NamedLosses
from proteus_jax.methods.feature_standardization import (
    RunningMoments,
    batch_moments,
    ema_update,
    moments_for_step,
    standardize,
)
from proteus_jax.methods.resample import resize_images
from proteus_jax.methods.teacher import Teacher, common_grid_size, teacher_features
from proteus_jax.models.functional import Params, StudentFunction
from proteus_jax.models.normalization import Normalization
from proteus_jax.models.vit import Features
from proteus_jax.training.random_erasing import random_erasing
from proteus_jax.training.train_state import Skipped, TrainState, updates_made

Metrics = dict[str, jax.Array]


class _Results(NamedTuple):
    """Results of a part of a batch: by student (gradients, losses), by teacher moments."""

    students: dict[str, tuple[Params, NamedLosses]]
    moments: dict[str, RunningMoments]


# Equal to itself alone: JAX compiles one step once.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainStep:
    """train_step(state, teacher_params, images) -> (state, metrics), to be compiled with the state
    donated.

    Images are as large as the largest that a model wants; `normalization` is the students'.
    `erasing` is the share of the images that get a box of noise. The batch goes through in
    `grad_accum_steps` parts, one after the other, for one update. Randomness is a function of
    (seed, state.step) alone. A step whose losses or gradients are not finite changes nothing but
    the counters of steps and of skipped updates. Metrics are float32 scalars: `<student>/loss` and
    `<student>/<name>` for each of the method's losses, `learning_rate`, and `skipped` and
    `skipped_in_a_row`, int32.
    """

    # By which profiles and compiled programs know it.
    __name__ = "train_step"

    method: Method
    teachers: Mapping[str, Teacher]
    students: Mapping[str, StudentFunction]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    normalization: Normalization
    ema_decay: float
    seed: int
    erasing: float = 0.0
    grad_accum_steps: int = 1

    @property
    def grid(self) -> int:
        """The side of the students' grid of patches."""
        return common_grid_size(self.students)

    @property
    def crop(self) -> int:
        """The side of the students' images in pixels."""
        return self.grid * next(iter(self.students.values())).spec.patch_size

    def __call__(
        self, state: TrainState, teacher_params: dict[str, Params], images: UInt8[Array, "b h w 3"]
    ) -> tuple[TrainState, Metrics]:
        """Makes one step."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        draw_key, drop_key, erasing_key = jax.random.split(key, 3)
        pixels = self.normalization(images)
        if self.erasing:
            pixels = random_erasing(erasing_key, pixels, self.erasing)
        draws = self.method.draw(draw_key, len(images), self.grid**2)
        results = _mean_over_parts(
            lambda part: self._gradients(state, teacher_params, part),
            Batch(pixels, draws, drop_key),
            self.grad_accum_steps,
            self.method.group,
        )
        good = _finite(results)
        made, metrics = self._updated(state, results)
        total, in_a_row = state.skipped
        skipped = Skipped(total + jnp.where(good, 0, 1), jnp.where(good, 0, in_a_row + 1))
        metrics |= {"skipped": skipped.total, "skipped_in_a_row": skipped.in_a_row}
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), made, state)
        return kept._replace(step=state.step + 1, skipped=skipped), metrics

    def _targets(
        self, state: TrainState, teacher_params: dict[str, Params], pixels: jax.Array
    ) -> tuple[dict[str, Features], dict[str, RunningMoments]]:
        """Teacher targets, and the moments of those that are standardized."""
        targets, moments = {}, {}
        for name, teacher in self.teachers.items():
            features = teacher_features(
                teacher, teacher_params[name], pixels, self.normalization, self.crop, self.grid
            )
            if teacher.standardize:
                moments[name] = batch_moments(features)
                known = moments_for_step(updates_made(state), state.statistics[name], moments[name])
                features = standardize(features, known)
            targets[name] = features
        return targets, moments

    def _gradients(
        self, state: TrainState, teacher_params: dict[str, Params], part: Batch
    ) -> _Results:
        """Gradients and losses of every student, from one pass of the teachers."""
        targets, moments = self._targets(state, teacher_params, part.pixels)
        batch = part._replace(pixels=resize_images(part.pixels, self.crop))

        def objective(values: Params, student: StudentFunction) -> tuple[jax.Array, NamedLosses]:
            loss, named = self.method.loss(student, values, batch, targets)
            return loss, {"loss": loss} | named

        gradients = jax.grad(objective, has_aux=True)
        by_student = {
            name: gradients(state.params[name], student) for name, student in self.students.items()
        }
        return _Results(by_student, moments)

    def _updated(self, state: TrainState, results: _Results) -> tuple[TrainState, Metrics]:
        """The state with every update made, its counters as they were, and the metrics."""
        updates_before = updates_made(state)
        params, optimizer_state, ema = {}, {}, {}
        metrics: Metrics = {"learning_rate": jnp.asarray(self.schedule(updates_before))}
        for name, (gradients, losses) in results.students.items():
            updates, optimizer_state[name] = self.optimizer.update(
                gradients, state.optimizer[name], state.params[name]
            )
            params[name] = optax.apply_updates(state.params[name], updates)
            # In the method's order: JAX sorts a dict that goes through it.
            metrics |= {f"{name}/{key}": losses[key] for key in ("loss", *self.method.loss_names)}
            if state.ema is not None:
                decay = jnp.minimum(self.ema_decay, ramp(updates_before))
                ema[name] = optax.incremental_update(
                    params[name]["backbone"], state.ema[name], 1.0 - decay
                )
        statistics = {
            name: ema_update(updates_before, state.statistics[name], moments)
            for name, moments in results.moments.items()
        }
        averages = ema if state.ema is not None else None
        made = TrainState(state.step, params, optimizer_state, averages, statistics, state.skipped)
        return made, metrics


def ramp(updates: jax.Array) -> jax.Array:
    """The largest decay of an average after so many updates, as in TensorFlow's moving average:
    with a constant one a run that is short beside 1 / (1 - decay) would keep its random start.
    """
    return (1.0 + updates) / (10.0 + updates)


def _finite(tree: Any) -> Bool[Array, ""]:
    """Returns True where all numbers and their squares are finite: AdamW keeps the squares of
    gradients, and one that overflows would stay. A number that is not finite makes the sum of its
    array not finite.
    """
    sums = [jnp.sum(jnp.square(array.astype(jnp.float32))) for array in jax.tree.leaves(tree)]
    return jnp.all(jnp.isfinite(jnp.stack(sums)))


def _mean_over_parts(function: Callable[[Batch], Any], whole: Batch, count: int, group: int) -> Any:
    """The mean of a function over `count` equal parts of a batch, taken one after the other.

    A part takes every `count`-th group of images, so that each device keeps its own share of the
    batch.
    """
    if count == 1:
        return function(whole)
    groups = len(whole.pixels) // group

    def divided(array: jax.Array) -> jax.Array:
        together = len(array) // groups
        parts = array.reshape(-1, count, together, *array.shape[1:]).swapaxes(0, 1)
        return parts.reshape(count, -1, *array.shape[1:])

    parts = Batch(
        divided(whole.pixels),
        jax.tree.map(divided, whole.draws),
        jax.random.split(whole.key, count),
    )
    nothing = jax.tree.map(
        lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(function, whole)
    )

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = jax.lax.scan(add, nothing, parts)
    return jax.tree.map(lambda value: value / count, total)
