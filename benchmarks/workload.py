"""What the benchmarks time: the paper's recipe for given models, on images of noise."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.models.normalisation import IMAGENET
from proteus_jax.optim import adamw, warmup_cosine
from proteus_jax.step import Teacher, TrainState, init_state, make_train_step


def recipe(
    teacher: BackboneFunction, students: dict[str, StudentFunction], *, erasing: float = 0.0
) -> tuple[Callable[[], TrainState], Callable[..., tuple[TrainState, Any]]]:
    """A function that makes the train state, and the step that main.py trains with; not compiled
    yet. Its teacher is called "teacher".
    """
    schedule = warmup_cosine(1e-3, 5, 1000)
    optimizer = adamw(schedule)
    step = make_train_step(
        teachers={"teacher": Teacher(teacher, IMAGENET)},
        students=students,
        optimizer=optimizer,
        schedule=schedule,
        normalisation=IMAGENET,
        mask_ratio=0.5,
        ema_decay=0.0,
        seed=0,
        erasing=erasing,
    )
    return lambda: init_state(students, optimizer, ema=False, seed=0), step


def noise(batch: int, image: int) -> jax.Array:
    """uint8 [batch, image, image, 3] on the device."""
    rng = np.random.default_rng(0)
    return jax.device_put(rng.integers(0, 256, (batch, image, image, 3), dtype=np.uint8))
