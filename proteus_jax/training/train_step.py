"""One training step: what Proteus is. Frozen teachers and a student see the same images; the
student follows.

Source: arXiv 2407.10366, section 3, and the authors' pretrain/models_proteus_dinov2.py.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, UInt8

from proteus_jax.methods.feature_standardization import (
    Moments,
    known_at,
    moments_of,
    standardised,
    updated,
)
from proteus_jax.methods.losses import Losses, LossWeights, distillation_losses
from proteus_jax.methods.resample import regridded, renormalised, resized
from proteus_jax.models.functional import BackboneFunction, Params, StudentFunction
from proteus_jax.models.normalization import Normalisation
from proteus_jax.models.vit import Features
from proteus_jax.training.random_erasing import erase
from proteus_jax.training.train_state import Skipped, TrainState, updates_made

Metrics = dict[str, jax.Array]


class Teacher(NamedTuple):
    """Who is followed: a frozen ViT, the statistics and size of the images that it sees, and what
    its objectives weigh. With `standardise` its tokens are brought to mean 0 and deviation 1 first.

    `side` is None where it sees images of the students' size.
    """

    backbone: BackboneFunction
    normalisation: Normalisation
    weights: LossWeights = LossWeights()
    side: int | None = None
    standardise: bool = False


def random_masks(key: jax.Array, count: int, patches: int, ratio: float) -> Bool[Array, "m n"]:
    """`count` masks of exactly floor(patches * ratio) patches each, uniformly without
    replacement.
    """
    masked = int(patches * ratio)
    noise = jax.random.uniform(key, (count, patches))
    ranks = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return ranks < masked


def student_losses(
    student: StudentFunction,
    params: Params,
    images: Float[Array, "b h w 3"],
    targets: Mapping[str, Features],
    mask: Bool[Array, "m n"] | None,
    weights: Mapping[str, LossWeights],
    *,
    masked_rows: slice = slice(None, None, 2),
    key: jax.Array | None = None,
) -> dict[str, Losses]:
    """The objectives of one student on one batch, by teacher; `masked_rows` are the half of the
    batch that `mask` covers.

    The masked pass runs those rows only. The reference runs the whole batch through it and uses
    half: without stochastic depth the losses and gradients are the same, at three quarters of the
    cost. Every second row rather than the first half, so that on many devices each has its share
    and nothing moves.
    """
    masked_images = None if mask is None else images[masked_rows]
    predictions = student(params, images, masked_images, mask, key)
    losses = {}
    for name, target in targets.items():
        # A teacher whose patches count for nothing is not asked for them.
        asked = mask is not None and weights[name].patch > 0
        masked_target = target.patches[masked_rows] if asked else None
        losses[name] = distillation_losses(
            predictions.answers[name], target, masked_target, mask, weights[name]
        )
    return losses


def seen_by(
    teacher: Teacher,
    params: Params,
    pixels: Float[Array, "b h w 3"],
    normalisation: Normalisation,
    crop: int,
    grid: int,
) -> Features:
    """A teacher's features, without gradient, of images that have a student's `normalisation`:
    at the teacher's own size and statistics, its patches on the students' `grid`.
    """
    pixels = resized(pixels, teacher.side or crop)
    pixels = renormalised(pixels, normalisation, teacher.normalisation)
    return regridded(jax.lax.stop_gradient(teacher.backbone(params, pixels)), grid)


def make_train_step(
    *,
    teachers: Mapping[str, Teacher],
    students: Mapping[str, StudentFunction],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    normalisation: Normalisation,
    mask_ratio: float,
    ema_decay: float,
    seed: int,
    erasing: float = 0.0,
    accumulate: int = 1,
) -> Callable[[TrainState, dict[str, Params], UInt8[Array, "b h w 3"]], tuple[TrainState, Metrics]]:
    """train_step(state, teacher_params, images) -> (state, metrics), to be compiled with the state
    donated.

    Images are as large as the largest that a model wants; `normalisation` is the students'.
    `erasing` is the share of the images that get a box of noise. The batch goes through in
    `accumulate` parts, one after the other, for one update. Randomness is a function of
    (seed, state.step) alone. A step whose losses or gradients are not finite changes nothing but
    the counters of steps and of skipped updates. Metrics are float32 scalars: `<student>/loss`,
    `<student>/token_loss`, `<student>/feature_loss`, `<student>/patch_loss`, those of a second
    teacher as `<student>/<teacher>_token_loss`, `learning_rate`, and `skipped` and
    `skipped_in_a_row`, int32.
    """
    grid = one_grid(students)
    crop = grid * next(iter(students.values())).spec.patch_size
    weights = {name: teacher.weights for name, teacher in teachers.items()}
    masked = any(factors.patch for factors in weights.values())

    def targets_of(
        state: TrainState, teacher_params: dict[str, Params], pixels: jax.Array
    ) -> tuple[dict[str, Features], dict[str, Moments]]:
        """What every teacher says, and the moments of those who are standardised."""
        targets, moments = {}, {}
        for name, teacher in teachers.items():
            said = seen_by(teacher, teacher_params[name], pixels, normalisation, crop, grid)
            if teacher.standardise:
                moments[name] = moments_of(said)
                known = known_at(updates_made(state), state.statistics[name], moments[name])
                said = standardised(said, known)
            targets[name] = said
        return targets, moments

    def gradients_of(state: TrainState, teacher_params: dict[str, Params], part: _Part) -> _Found:
        """Gradients and losses of every student, from one pass of the teachers."""
        targets, moments = targets_of(state, teacher_params, part.pixels)
        images = resized(part.pixels, crop)

        def objective(
            values: Params, student: StudentFunction
        ) -> tuple[jax.Array, dict[str, Losses]]:
            key = part.key if student.drop_path else None
            losses = student_losses(student, values, images, targets, part.mask, weights, key=key)
            return sum((each.loss for each in losses.values()), jnp.zeros(())), losses

        gradients = jax.grad(objective, has_aux=True)
        found = {name: gradients(state.params[name], s) for name, s in students.items()}
        return _Found(found, moments)

    def train_step(
        state: TrainState, teacher_params: dict[str, Params], images: jax.Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mask_key, drop_key, erasing_key = jax.random.split(key, 3)
        pixels = normalisation(images)
        if erasing:
            pixels = erase(erasing_key, pixels, erasing)
        mask = random_masks(mask_key, len(images) // 2, grid**2, mask_ratio) if masked else None
        found = _mean_over_parts(
            lambda part: gradients_of(state, teacher_params, part),
            _Part(pixels, mask, drop_key),
            accumulate,
        )

        good = _finite(found)
        params, optimizer_state, ema = {}, {}, {}
        metrics: Metrics = {"learning_rate": jnp.asarray(schedule(updates_made(state)))}
        for name, (gradients, losses) in found.students.items():
            updates, optimizer_state[name] = optimizer.update(
                gradients, state.optimizer[name], state.params[name]
            )
            params[name] = optax.apply_updates(state.params[name], updates)
            # In the configuration's order: JAX sorts a dict that goes through it.
            metrics |= _named(name, {teacher: losses[teacher] for teacher in teachers})
            if state.ema is not None:
                decay = jnp.minimum(ema_decay, ramp(updates_made(state)))
                ema[name] = optax.incremental_update(
                    params[name]["backbone"], state.ema[name], 1.0 - decay
                )
        statistics = {
            name: updated(updates_made(state), state.statistics[name], moments)
            for name, moments in found.moments.items()
        }
        averages = ema if state.ema is not None else None
        total, in_a_row = state.skipped
        skipped = Skipped(total + jnp.where(good, 0, 1), jnp.where(good, 0, in_a_row + 1))
        metrics |= {"skipped": skipped.total, "skipped_in_a_row": skipped.in_a_row}
        made = TrainState(state.step, params, optimizer_state, averages, statistics, state.skipped)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), made, state)
        return kept._replace(step=state.step + 1, skipped=skipped), metrics

    return train_step


def ramp(updates: jax.Array) -> jax.Array:
    """The largest decay of an average after so many updates, as in TensorFlow's moving average:
    with a constant one a run that is short beside 1 / (1 - decay) would keep its random start.
    """
    return (1.0 + updates) / (10.0 + updates)


def _finite(found: Any) -> Bool[Array, ""]:
    """Whether all numbers are, and their squares: AdamW keeps those of gradients, and one that
    overflows would stay. One that is not makes the sum of its array none.
    """
    sums = [jnp.sum(jnp.square(array.astype(jnp.float32))) for array in jax.tree.leaves(found)]
    return jnp.all(jnp.isfinite(jnp.stack(sums)))


def one_grid(students: Mapping[str, StudentFunction]) -> int:
    """The side of the patch grid that all students have; ValueError where they differ."""
    grids = {name: student.spec.grid for name, student in students.items()}
    if len(set(grids.values())) != 1:
        raise ValueError(f"students that learn together need one grid of patches, found {grids}")
    return next(iter(grids.values()))


def _named(student: str, losses: dict[str, Losses]) -> Metrics:
    """Rows of metrics: the sum of all losses, then each teacher's own; the first's without its
    name.
    """
    named: Metrics = {}
    for number, (teacher, each) in enumerate(losses.items()):
        before = f"{teacher}_" if number else ""
        named |= {
            f"{student}/{before}{key}": value
            for key, value in each._asdict().items()
            if key != "loss"
        }
    return {f"{student}/loss": sum((each.loss for each in losses.values()), jnp.zeros(()))} | named


class _Found(NamedTuple):
    """What a part of a batch gives: by student (gradients, losses), by teacher moments."""

    students: dict[str, tuple[Params, dict[str, Losses]]]
    moments: dict[str, Moments]


class _Part(NamedTuple):
    """Images that go through the models together; every second one has a mask, where any has."""

    pixels: Float[Array, "b h w 3"]
    mask: Bool[Array, "m n"] | None
    key: jax.Array


def _mean_over_parts(function: Callable[[_Part], Any], whole: _Part, count: int) -> Any:
    """The mean of a function over `count` equal parts of a batch, taken one after the other.

    A part takes every `count`-th pair of a masked and an unmasked image, so that each device keeps
    its own share of the batch.
    """
    if count == 1:
        return function(whole)
    together = 1 if whole.mask is None else 2

    def divided(array: jax.Array, together: int) -> jax.Array:
        parts = array.reshape(-1, count, together, *array.shape[1:]).swapaxes(0, 1)
        return parts.reshape(count, -1, *array.shape[1:])

    parts = _Part(
        divided(whole.pixels, together),
        None if whole.mask is None else divided(whole.mask, 1),
        jax.random.split(whole.key, count),
    )
    nothing = jax.tree.map(
        lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(function, whole)
    )

    def add(total: Any, part: _Part) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = jax.lax.scan(add, nothing, parts)
    return jax.tree.map(lambda value: value / count, total)
