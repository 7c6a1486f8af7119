"""Estimates the memory of a device that trains: what is stored, and what a step works with."""

from typing import Any, NamedTuple

import jax

from proteus_jax.methods.teacher import Teacher
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import StudentFunction
from proteus_jax.runtime import sharding
from proteus_jax.training.builder import (
    Assembly,
)
from proteus_jax.training.config import TrainConfig


class Memory(NamedTuple):
    """Bytes a device, by what they hold."""

    student: float
    gradients: float
    optimizer: float
    average: float
    teacher: float
    activations: float
    teacher_activations: float
    images: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def _bytes(tree: Any, parts: int = 1) -> float:
    """Bytes of a tree on one device, where large arrays are split into `parts`."""
    return float(
        sum(
            array.size * array.dtype.itemsize / (parts if array.size >= sharding.SMALL else 1)
            for array in jax.tree.leaves(tree)
        )
    )


def estimate_memory(config: TrainConfig, assembly: Assembly, devices: int, batch: int) -> Memory:
    """The memory of a device that trains with a global batch on so many devices."""
    state, parts = assembly.state_shapes(), config.fsdp
    images = batch / devices / config.grad_accum_steps
    rows = images * (1.0 + assembly.method.masked_share)
    side = config.data.crop
    kept = [_kept(student, side, rows) for student in assembly.students.values()]
    teacher_memory = [_teaching(each, side, images, parts) for each in assembly.teachers.values()]
    largest = max([side, *(each.side or 0 for each in assembly.teachers.values())])
    params = _bytes(state.params, parts)
    return Memory(
        student=params,
        gradients=params * (2 if config.grad_accum_steps > 1 else 1),
        optimizer=_bytes(state.optimizer, parts),
        average=_bytes(state.ema, parts),
        teacher=sum(weights for weights, _ in teacher_memory),
        activations=max(kept),
        # They look one after the other.
        teacher_activations=max(working for _, working in teacher_memory),
        images=batch / devices * largest**2 * 3 * (1 + 4),
    )


def _teaching(teacher: Teacher, crop: int, images: float, parts: int) -> tuple[float, float]:
    """Bytes of a teacher's weights, and of what one of its blocks works with: scores and their
    exponentials, or the feed-forward layer.
    """
    spec, precision = teacher.backbone.spec, teacher.backbone.dtype
    tokens = _tokens(spec, teacher.side or crop)
    scores = images * spec.heads * tokens**2 * (4 + precision.itemsize)
    scores *= teacher.backbone.attention == "xla"
    wide = images * tokens * spec.hidden * 2 * (4 + precision.itemsize)
    return _bytes(teacher.backbone.shapes, parts) / 4 * precision.itemsize, max(scores, wide)


def _tokens(spec: ViTSpec, side: int) -> int:
    return spec.prefix + (side // spec.patch_size) ** 2


def _kept(student: StudentFunction, side: int, rows: float) -> float:
    """Bytes that a student's blocks leave for the backward pass, and what one works with."""
    spec, itemsize = student.spec, student.dtype.itemsize
    tokens, width = _tokens(spec, side), spec.width
    stream = rows * tokens * width * 4
    # Queries, keys, values, what they attend to, what that adds to the stream, the hidden layer.
    block = rows * tokens * (5 * width + spec.hidden) * itemsize
    scores = rows * spec.heads * tokens**2 * (2 * 4 + 2 * itemsize)
    working = 2 * stream + (scores if student.attention == "xla" else 0)
    each = stream if student.remat == "blocks" else stream + block
    return spec.depth * each + block + working
