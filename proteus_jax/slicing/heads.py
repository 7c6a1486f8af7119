"""Heads by least squares: what turns a student's tokens into its teachers' before any training."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from proteus_jax.methods.feature_standardization import RunningMoments, standardizing_map
from proteus_jax.methods.resample import resize_images
from proteus_jax.methods.teacher import Teacher, teacher_features
from proteus_jax.models.functional import Params, StudentFunction
from proteus_jax.models.normalization import Normalization
from proteus_jax.models.student import HEAD_NORM_EPSILON
from proteus_jax.models.vit import Features
from proteus_jax.runtime import sharding
from proteus_jax.slicing.least_squares import (
    Linear,
    Sums,
    add_rows,
    no_sums,
    solve_validated,
    standardized,
)

# Every so manieth group of images is held out, to choose a penalty by.
HELD_OUT = 4


class FittedHeads(NamedTuple):
    """Heads by teacher and by name, and moments by teacher; host arrays."""

    params: dict[str, dict[str, Params]]
    moments: dict[str, RunningMoments]


def fit_heads(
    student: StudentFunction,
    backbone: Params,
    teachers: Mapping[str, Teacher],
    teacher_params: Mapping[str, Params],
    images: UInt8[Array, "n b h w 3"],
    normalization: Normalization,
    draw: Callable[[int], Array | None],
    heads: frozenset[str],
    mesh: Mesh,
) -> FittedHeads:
    """Fits a student's `heads` to its teachers: params by the teacher's name and the head's, and
    the moments of the teachers that are standardized, by which their targets are.

    `draw` makes the masks bool [b / 2, patches] of a group of images by its number, for every
    second image; they count only for the head "patch".
    """
    crop = student.spec.grid * student.spec.patch_size
    widths = {name: each.backbone.spec.width for name, each in teachers.items()}

    def group_sums(
        total: dict[str, dict[str, Sums]], backbone: Params, theirs: Any, group: Array, mask: Any
    ) -> dict[str, dict[str, Sums]]:
        pixels = normalization(group)
        own = resize_images(pixels, crop)
        seen = {"whole": student.backbone(backbone, own)}
        if mask is not None:
            seen["masked"] = student.backbone(backbone, own[::2], mask)
        result = {}
        for name, teacher in teachers.items():
            target = teacher_features(
                teacher, theirs[name], pixels, normalization, crop, student.spec.grid
            )
            result[name] = _added(total[name], seen, target, mask)
        return result

    step = jax.jit(sharding.traced_on(mesh, group_sums), out_shardings=sharding.replicated(mesh))
    zero = {
        name: {head: no_sums(student.spec.width, width) for head in sorted(heads)}
        for name, width in widths.items()
    }
    parts = {True: zero, False: zero}
    for number in range(len(images)):
        held = number % HELD_OUT == HELD_OUT - 1
        mask = draw(number) if "patch" in heads else None
        parts[held] = step(parts[held], backbone, dict(teacher_params), images[number], mask)
    fitted, held_out = jax.device_get(parts[False]), jax.device_get(parts[True])
    moments = {
        name: _moments(fitted[name]) for name, teacher in teachers.items() if teacher.standardize
    }
    return FittedHeads(
        {name: _solved(fitted[name], held_out[name], moments.get(name)) for name in teachers},
        moments,
    )


def _added(
    total: dict[str, Sums], seen: dict[str, Features], target: Features, mask: Array | None
) -> dict[str, Sums]:
    """The sums of each head with those of a group of images."""

    def normal(tokens: Array) -> Array:
        return standardized(tokens, HEAD_NORM_EPSILON)

    added = dict(total)
    whole = seen["whole"]
    if "token" in total:
        added["token"] = add_rows(total["token"], normal(whole.cls), target.cls)
    if "feature" in total:
        added["feature"] = add_rows(total["feature"], normal(whole.patches), target.patches)
    if "patch" in total and mask is not None:
        hidden = normal(seen["masked"].patches)
        added["patch"] = add_rows(total["patch"], hidden, target.patches[::2], mask)
    return added


def _solved(
    fitted: dict[str, Sums], held_out: dict[str, Sums], moments: RunningMoments | None
) -> dict[str, Params]:
    heads = {}
    for head, sums in fitted.items():
        linear = solve_validated(sums, held_out[head])
        if moments is not None:
            mean, deviation = standardizing_map(moments, head == "token")
            linear = Linear(linear.kernel / deviation, (linear.bias - mean) / deviation)
        width = len(linear.kernel)
        norm = {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}
        heads[head] = {"norm": norm, "linear": linear._asdict()}
    return heads


def _moments(sums: dict[str, Sums]) -> RunningMoments:
    """Moments of class tokens and patches; of a head that there is not, those of the other."""
    token = sums.get("token") or next(iter(sums.values()))
    patches = sums.get("feature") or sums.get("patch") or token
    return RunningMoments(
        *(
            jnp.asarray(part / each.n, jnp.float32)
            for each in (token, patches)
            for part in (each.y, each.yy)
        )
    )
