"""Work that the benchmarks time: the paper's recipe for given models, on images of noise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proteus_jax.methods.losses import LossWeights
from proteus_jax.methods.masking import random_masks
from proteus_jax.methods.proteus import Proteus, student_losses
from proteus_jax.methods.teacher import Teacher
from proteus_jax.models.functional import BackboneFunction, Params, StudentFunction
from proteus_jax.models.normalization import IMAGENET
from proteus_jax.training.optimizer import adamw, warmup_cosine
from proteus_jax.training.train_state import TrainState, init_state
from proteus_jax.training.train_step import TrainStep


def recipe(
    teacher: BackboneFunction, students: dict[str, StudentFunction], *, erasing: float = 0.0
) -> tuple[Callable[[], TrainState], Callable[..., tuple[TrainState, Any]]]:
    """A function that makes the train state, and the step that main.py trains with; not compiled
    yet. Its teacher is called "teacher".
    """
    schedule = warmup_cosine(1e-3, 5, 1000)
    optimizer = adamw(schedule)
    step = TrainStep(
        method=Proteus(loss_weights={"teacher": LossWeights()}, mask_ratio=0.5),
        teachers={"teacher": Teacher(teacher, IMAGENET)},
        students=students,
        optimizer=optimizer,
        schedule=schedule,
        normalization=IMAGENET,
        ema_decay=0.0,
        seed=0,
        erasing=erasing,
    )
    return lambda: init_state(students, optimizer, ema=False, seed=0), step


def gradients(
    teacher: BackboneFunction,
    student: StudentFunction,
    params: Params,
    images: jax.Array,
    *,
    whole: bool,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function for the student's losses and gradients, and its arguments: the masked pass over
    half of the batch or, as the reference has it, over the whole.
    """
    pixels = IMAGENET(images)
    batch, side = pixels.shape[:2]
    patches = (side // student.spec.patch_size) ** 2
    mask, rows = random_masks(jax.random.key(0), batch // 2, patches, 0.5), slice(None, None, 2)
    if whole:
        mask, rows = jnp.zeros((batch, patches), bool).at[::2].set(mask), slice(None)
    target = jax.jit(teacher)(params, pixels)

    def loss(values: Any, pixels: jax.Array, target: Any, mask: jax.Array) -> jax.Array:
        targets, weights = {"teacher": target}, {"teacher": LossWeights()}
        losses = student_losses(student, values, pixels, targets, mask, weights, masked_rows=rows)
        return losses["teacher"].loss

    return jax.grad(loss), (jax.jit(student.init)(jax.random.key(0)), pixels, target, mask)


def noise(batch: int, image: int) -> jax.Array:
    """uint8 [batch, image, image, 3] on the device."""
    rng = np.random.default_rng(0)
    return jax.device_put(rng.integers(0, 256, (batch, image, image, 3), dtype=np.uint8))
