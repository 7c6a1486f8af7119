"""Teacher and students as functions from a host batch to host arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from proteus_jax.evaluation.feature_extraction import FrozenBackbone
from proteus_jax.evaluation.teacher_agreement import StudentOutputs
from proteus_jax.methods.config import PRIMARY
from proteus_jax.methods.feature_standardization import RunningMoments, unstandardize
from proteus_jax.methods.resample import resize_images
from proteus_jax.methods.teacher import common_grid_size, teacher_features
from proteus_jax.models.functional import (
    Params,
)
from proteus_jax.models.vit import Features
from proteus_jax.runtime import sharding
from proteus_jax.training.builder import (
    Assembly,
)
from proteus_jax.training.config import TrainConfig
from proteus_jax.training.train_state import TrainState


def frozen_backbones(
    assembly: Assembly, teacher_params: dict[str, Params], mesh: Mesh
) -> dict[str, FrozenBackbone]:
    """Makes the backbones of the primary teacher and of each student for the protocols of
    evaluation; a student's has no weights yet.
    """
    statistics = assembly.normalization
    students = {
        name: FrozenBackbone(student.backbone, {}, statistics, mesh, remembers=True)
        for name, student in assembly.students.items()
    }
    backbone = assembly.teachers[PRIMARY].backbone
    teacher = FrozenBackbone(backbone, teacher_params[PRIMARY], statistics, mesh, remembers=True)
    return {PRIMARY: teacher, **students}


def evaluation_functions(
    config: TrainConfig, assembly: Assembly, teacher_params: dict[str, Params], mesh: Mesh
) -> tuple[Callable, Callable, Callable]:
    """First teacher and students as functions from a host batch to host arrays."""
    crop, grid = config.data.crop, common_grid_size(assembly.students)
    teacher, normalize = assembly.teachers[PRIMARY], assembly.normalization

    def compiled(function: Callable, **options: Any) -> Callable:
        whole = sharding.replicated(mesh)
        return jax.jit(sharding.traced_on(mesh, function), out_shardings=whole, **options)

    @compiled
    def teacher_pass(params: Params, images: jax.Array) -> Features:
        return teacher_features(teacher, params, normalize(images), normalize, crop, grid)

    def in_its_scale(features: Features, statistics: dict[str, RunningMoments]) -> Features:
        return unstandardize(features, statistics[PRIMARY]) if PRIMARY in statistics else features

    @functools.partial(compiled, static_argnums=0)
    def student_pass(
        name: str, params: Params, statistics: Any, images: jax.Array
    ) -> StudentOutputs:
        output = assembly.students[name](params, resize_images(normalize(images), crop))
        answered = output.by_teacher[PRIMARY]
        spoken = in_its_scale(
            Features(answered.token, answered.feature, output.features.registers), statistics
        )
        return StudentOutputs(output.features, spoken.cls, spoken.patches)

    @functools.partial(compiled, static_argnums=0)
    def masked_pass(
        name: str, params: Params, statistics: Any, images: jax.Array, mask: jax.Array
    ) -> jax.Array:
        pixels = resize_images(normalize(images), crop)
        answered = assembly.students[name](params, pixels, pixels, mask).by_teacher[PRIMARY]
        assert answered.patch is not None
        spoken = Features(answered.token, answered.patch, answered.patch[:, :0])
        return in_its_scale(spoken, statistics).patches

    def features(images: np.ndarray) -> Features:
        return jax.device_get(teacher_pass(teacher_params[PRIMARY], _on_mesh(images, mesh)))

    def outputs(name: str, state: TrainState, images: np.ndarray) -> StudentOutputs:
        known = state.params[name], state.statistics
        return jax.device_get(student_pass(name, *known, _on_mesh(images, mesh)))

    def hidden(name: str, state: TrainState, images: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shares = (_on_mesh(part, mesh) for part in (images, mask))
        return jax.device_get(masked_pass(name, state.params[name], state.statistics, *shares))

    return features, outputs, hidden


def _on_mesh(images: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch that every host has whole, spread over the devices."""
    share = len(images) // jax.process_count()
    first = share * jax.process_index()
    return sharding.place_batch(images[first : first + share], mesh)
