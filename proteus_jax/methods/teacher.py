"""A frozen teacher, and its features of a batch that was made for its students."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from proteus_jax.methods.resample import renormalize, resize_images, resize_patch_grid
from proteus_jax.models.functional import BackboneFunction, Params, StudentFunction
from proteus_jax.models.normalization import Normalization
from proteus_jax.models.vit import Features


class Teacher(NamedTuple):
    """A frozen teacher: backbone, input normalization and resolution.

    `side` is None where it sees images of the students' size. With `standardize` its tokens are
    brought to mean 0 and deviation 1 before students learn them.
    """

    backbone: BackboneFunction
    normalization: Normalization
    side: int | None = None
    standardize: bool = False


def teacher_features(
    teacher: Teacher,
    params: Params,
    pixels: Float[Array, "b h w 3"],
    normalization: Normalization,
    crop: int,
    grid: int,
) -> Features:
    """A teacher's features, without gradient, of images that have a student's `normalization`:
    at the teacher's own size and statistics, its patches on the students' `grid`.
    """
    pixels = resize_images(pixels, teacher.side or crop)
    pixels = renormalize(pixels, normalization, teacher.normalization)
    return resize_patch_grid(jax.lax.stop_gradient(teacher.backbone(params, pixels)), grid)


def common_grid_size(students: Mapping[str, StudentFunction]) -> int:
    """The side of the patch grid that all students have; ValueError where they differ."""
    grids = {name: student.spec.grid for name, student in students.items()}
    if len(set(grids.values())) != 1:
        raise ValueError(f"students that learn together need one grid of patches, found {grids}")
    return next(iter(grids.values()))
