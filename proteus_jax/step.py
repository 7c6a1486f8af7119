"""One training step: what Proteus is. A frozen teacher and a student see the same images; the
student follows.

Source: arXiv 2407.10366, section 3, and the authors' pretrain/models_proteus_dinov2.py.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, UInt8

from proteus_jax.erasing import erase
from proteus_jax.losses import Losses, LossWeights, distillation_losses
from proteus_jax.models.functional import BackboneFunction, Params, StudentFunction
from proteus_jax.models.normalisation import Normalisation
from proteus_jax.models.vit import Features

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a checkpoint keeps. The teacher is not in it; `ema` is None where it is off.

    Params and the rest are dicts by student name, one entry a student.
    """

    step: jax.Array
    params: dict[str, Params]
    optimizer: dict[str, Any]
    ema: dict[str, Params] | None


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
    target: Features,
    mask: Bool[Array, "m n"] | None,
    weights: LossWeights,
    *,
    masked_rows: slice = slice(None, None, 2),
    key: jax.Array | None = None,
) -> Losses:
    """The objectives of one student on one batch; `masked_rows` are the half of the batch that
    `mask` covers.

    The masked pass runs those rows only. The reference runs the whole batch through it and uses
    half: without stochastic depth the losses and gradients are the same, at three quarters of the
    cost. Every second row rather than the first half, so that on many devices each has its share
    and nothing moves.
    """
    masked_images = None if mask is None else images[masked_rows]
    predictions = student(params, images, masked_images, mask, key)
    masked_target = None if mask is None else target.patches[masked_rows]
    return distillation_losses(predictions, target, masked_target, mask, weights)


def make_train_step(
    *,
    teacher: BackboneFunction,
    students: Mapping[str, StudentFunction],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    normalisation: Normalisation,
    weights: LossWeights,
    mask_ratio: float,
    ema_decay: float,
    seed: int,
    erasing: float = 0.0,
    accumulate: int = 1,
) -> Callable[[TrainState, Params, UInt8[Array, "b h w 3"]], tuple[TrainState, Metrics]]:
    """train_step(state, teacher_params, images) -> (state, metrics), to be compiled with the state
    donated.

    `erasing` is the share of the images that get a box of noise. The batch goes through in
    `accumulate` parts, one after the other, for one update. Randomness is a function of
    (seed, state.step) alone. Metrics are float32 scalars: `<student>/loss`,
    `<student>/token_loss`, `<student>/feature_loss`, `<student>/patch_loss` and `learning_rate`.
    """

    def gradients_of(
        params: dict[str, Params], teacher_params: Params, part: _Part
    ) -> dict[str, tuple[Params, Losses]]:
        """Gradients and losses of every student, from one pass of the teacher."""
        target = jax.lax.stop_gradient(teacher(teacher_params, part.pixels))

        def objective(values: Params, student: StudentFunction) -> tuple[jax.Array, Losses]:
            losses = student_losses(
                student,
                values,
                part.pixels,
                target,
                part.mask,
                weights,
                key=part.key if student.drop_path else None,
            )
            return losses.loss, losses

        gradients = jax.grad(objective, has_aux=True)
        return {name: gradients(params[name], student) for name, student in students.items()}

    def train_step(
        state: TrainState, teacher_params: Params, images: jax.Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mask_key, drop_key, erasing_key = jax.random.split(key, 3)
        pixels = normalisation(images)
        if erasing:
            pixels = erase(erasing_key, pixels, erasing)
        mask = None
        if weights.patch:
            patches = (images.shape[1] // teacher.spec.patch_size) ** 2
            mask = random_masks(mask_key, len(images) // 2, patches, mask_ratio)
        found = _mean_over_parts(
            lambda part: gradients_of(state.params, teacher_params, part),
            _Part(pixels, mask, drop_key),
            accumulate,
        )

        params, optimizer_state, ema = {}, {}, {}
        metrics: Metrics = {"learning_rate": jnp.asarray(schedule(state.step))}
        for name, (gradients, losses) in found.items():
            updates, optimizer_state[name] = optimizer.update(
                gradients, state.optimizer[name], state.params[name]
            )
            params[name] = optax.apply_updates(state.params[name], updates)
            metrics |= {f"{name}/{key}": value for key, value in losses._asdict().items()}
            if state.ema is not None:
                ema[name] = optax.incremental_update(
                    params[name]["backbone"], state.ema[name], 1.0 - ema_decay
                )
        return TrainState(
            state.step + 1, params, optimizer_state, ema if state.ema is not None else None
        ), metrics

    return train_step


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


def init_state(
    students: Mapping[str, StudentFunction],
    optimizer: optax.GradientTransformation,
    *,
    ema: bool,
    seed: int,
) -> TrainState:
    """Step 0: every student from the same seed, so that one among several equals one alone."""
    key = jax.random.key(seed)
    params = {name: student.init(key) for name, student in students.items()}
    averages = {name: jax.tree.map(jnp.copy, values["backbone"]) for name, values in params.items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer={name: optimizer.init(values) for name, values in params.items()},
        ema=averages if ema else None,
    )
