"""Compares this package with arrays that the original PyTorch code computed.

    python tests/golden.py FILE.npz ... [--weights WEIGHTS]

Prints, for each output, the largest error relative to the output's standard deviation (or what else
its line says) and its tolerance. Exit code 1 if any is exceeded, or if a file holds an output that
this script does not know.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from proteus_jax.data.transforms import randaugment
from proteus_jax.errors import InputError
from proteus_jax.methods.losses import Losses, LossWeights
from proteus_jax.methods.proteus import student_losses
from proteus_jax.models.functional import BackboneFunction, Params, StudentFunction
from proteus_jax.models.normalization import Normalization
from proteus_jax.models.vit import Features
from proteus_jax.training.optimizer import adamw, decay_mask
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert.detection import Detected, detect_architecture
from proteus_jax.weights.convert.readers import read_weights

TOKEN_TOLERANCE = 2e-4
FIRST_LOSS_TOLERANCE, LATER_LOSS_TOLERANCE = 1e-5, 1e-4
GRADIENT_TOLERANCE = 1e-4
WITHIN_LEARNING_RATE, OUTSIDE_TOLERANCE = 0.02, 0.02
COLOR_TOLERANCE, GEOMETRY_TOLERANCE = 1.0, 2.0
GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
HEADS = {"token_head": "token", "fea_head": "feature", "patch_head": "patch"}
HEAD_ARRAYS = {
    "0.weight": ("norm", "scale"),
    "0.bias": ("norm", "bias"),
    "1.weight": ("linear", "kernel"),
    "1.bias": ("linear", "bias"),
}
Arrays = dict[str, np.ndarray]


class Check(NamedTuple):
    """One compared array; `error` is infinite where the array could not be compared."""

    name: str
    error: float
    tolerance: float
    measure: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def check_file(path: Path, weights: Path | None = None) -> list[Check]:
    """All comparisons of one file; InputError where its layout is not known or its weights are not
    given.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    with jax.default_matmul_precision("highest"):
        if "meta/student_heads" in arrays:
            return list(_check_distillation(arrays))
        if "fill_rgb" in arrays:
            return list(_check_operations(arrays))
        if "image_uint8" in arrays:
            if weights is None:
                raise InputError(
                    f"{path}: the model is not in this file: give its weights with --weights"
                )
            normalize = Normalization(tuple(arrays["mean"].tolist()), tuple(arrays["std"].tolist()))
            images = normalize(jnp.asarray(arrays["image_uint8"]))
            return list(_check_backbone(arrays, read_weights(weights).arrays, images, {}))
        if "meta/family" not in arrays:
            raise InputError(f"{path}: expected a file of golden outputs, found no meta/family")
        meta = _under(arrays, "meta/")
        return list(
            _check_backbone(arrays, _under(arrays, "w/"), jnp.asarray(arrays["image"]), meta)
        )


def _under(arrays: Arrays, prefix: str) -> Arrays:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def _model(weights: Arrays, meta: Arrays, heads: str = "heads") -> Detected:
    """What the original's names and the file's facts say of a model, under canonical names."""
    known = str(meta["family"]) if "family" in meta else None
    found = detect_architecture(
        weights, family=known, heads=int(meta[heads]) if heads in meta else None
    )
    spec = found.spec
    changes: dict[str, Any] = {}
    if "norm_eps" in meta:
        changes["norm_epsilon"] = float(meta["norm_eps"])
    if "interpolate_offset" in meta:
        changes["interpolate_offset"] = float(meta["interpolate_offset"])
        # DINOv2 has an offset or antialias, never both: a file that names one need not name the
        # other.
        if changes["interpolate_offset"]:
            changes["interpolate_antialias"] = False
    if "interpolate_antialias" in meta:
        changes["interpolate_antialias"] = bool(meta["interpolate_antialias"])
    return found._replace(spec=dataclasses.replace(spec, **changes))


def _relative_to_deviation(name: str, found: Any, expected: np.ndarray) -> Check:
    measure = "of its standard deviation"
    found = np.asarray(found)
    if found.shape != expected.shape:
        return Check(
            name, np.inf, TOKEN_TOLERANCE, f"shape {found.shape}, expected {expected.shape}"
        )
    if expected.size == 0:
        return Check(name, 0.0, TOKEN_TOLERANCE, measure)
    deviation = float(expected.std()) or 1.0
    error = float(np.abs(found - expected).max()) / deviation
    return Check(name, error if np.isfinite(error) else np.inf, TOKEN_TOLERANCE, measure)


def _unknown(name: str) -> Check:
    return Check(name, np.inf, 0.0, "not known to this script")


def _check_backbone(
    arrays: Arrays, weights: Arrays, images: jax.Array, meta: Arrays
) -> Iterator[Check]:
    model = _model(weights, meta)
    spec = model.spec
    params = state_dict.to_params(model.arrays, spec, optional=("mask_token",))
    for prefix, mask in (("out/", None), ("masked/", arrays.get("mask"))):
        expected = _under(arrays, prefix)
        if not expected:
            continue
        mask = None if mask is None else jnp.asarray(mask)
        outputs = _outputs(BackboneFunction(spec), params, images, mask, expected)
        for name, value in expected.items():
            if name in outputs:
                yield _relative_to_deviation(prefix + name, outputs[name], value)
            else:
                yield _unknown(prefix + name)


def _outputs(
    backbone: BackboneFunction, params: Params, images: jax.Array, mask: Any, wanted: Arrays
) -> dict[str, jax.Array]:
    """Every output that a file may ask for, under the names it has there."""
    depth = backbone.spec.depth
    named = {int(found[1]) for name in wanted if (found := re.match(r"block(\d+)_", name))}
    blocks = sorted(block for block in named if block < depth)

    @jax.jit
    def run(params: Params) -> tuple[Features, Features, tuple[Features, ...]]:
        (raw,) = backbone.intermediates(params, images, (depth - 1,), mask, normalize=False)
        return (
            backbone(params, images, mask),
            raw,
            backbone.intermediates(params, images, blocks, mask),
        )

    final, raw, between = run(params)

    def all_tokens(features: Features) -> jax.Array:
        return jnp.concatenate(
            [features.cls[:, None], features.registers, features.patches], axis=1
        )

    outputs = {"cls": final.cls, "patch": final.patches, "reg": final.registers}
    outputs |= {"all": all_tokens(final), "prenorm": all_tokens(raw)}
    for block, features in zip(blocks, between, strict=True):
        outputs |= {f"block{block}_cls": features.cls, f"block{block}_patch": features.patches}
        outputs[f"block{block}_reg"] = features.registers
    return outputs


def _student_params(arrays: Arrays, model: Detected) -> Params:
    heads: Params = {head: {"norm": {}, "linear": {}} for head in HEADS.values()}
    for name, head in HEADS.items():
        for array, (layer, leaf) in HEAD_ARRAYS.items():
            value = arrays[f"student/{name}/{array}"]
            heads[head][layer][leaf] = value.T if leaf == "kernel" else value
    backbone = state_dict.to_params(model.arrays, model.spec)
    return {"backbone": backbone, "heads": {"teacher": heads}}


def _original_names(params: Params, model: Detected) -> Arrays:
    """The inverse of `_student_params`, for gradients and updated weights."""
    backbone = state_dict.from_params(params["backbone"], model.spec)
    named = {
        f"backbone/{key}": value for key, value in model.layout.from_canonical(backbone).items()
    }
    for name, head in HEADS.items():
        for array, (layer, leaf) in HEAD_ARRAYS.items():
            value = np.asarray(params["heads"]["teacher"][head][layer][leaf])
            named[f"{name}/{array}"] = value.T if leaf == "kernel" else value
    return named


def _masked_rows(mask: np.ndarray) -> slice:
    """The first half where the masks lie there and the half is whole, the whole batch where not."""
    half = len(mask) // 2
    return slice(0, half) if len(mask) % 2 == 0 and not mask[half:].any() else slice(None)


def _check_distillation(arrays: Arrays) -> Iterator[Check]:
    meta = _under(arrays, "meta/")
    taught = _model(_under(arrays, "teacher/"), meta, "teacher_heads")
    learning = _model(_under(arrays, "student/backbone/"), meta, "student_heads")
    teacher_spec, student_spec = taught.spec, learning.spec
    teacher = BackboneFunction(teacher_spec)
    student = StudentFunction(student_spec, {"teacher": teacher_spec.width})
    frozen = state_dict.to_params(taught.arrays, teacher_spec, optional=("mask_token",))
    teacher_params = jax.tree.map(jnp.asarray, frozen)
    params = jax.tree.map(jnp.asarray, _student_params(arrays, learning))
    weights = LossWeights(*(float(value) for value in arrays["lambda_token_fea_patch"]))
    optimizer = adamw(float(arrays["lr"]), float(arrays["weight_decay"]))
    state = optimizer.init(params)
    yield from _check_groups(arrays, params, learning)

    def losses_and_gradients(
        params: Params, images: Any, mask: Any, rows: slice
    ) -> tuple[Params, Losses]:
        targets, factors = {"teacher": teacher(teacher_params, images)}, {"teacher": weights}

        def objective(params: Params) -> tuple[jax.Array, Losses]:
            found = student_losses(
                student, params, images, targets, mask, factors, masked_rows=rows
            )["teacher"]
            return found.loss, found

        return jax.grad(objective, has_aux=True)(params)

    steps = sorted({int(found[1]) for name in arrays if (found := re.match(r"step(\d+)/", name))})
    compiled: dict[tuple, Callable] = {}
    for step in steps:
        images, mask = arrays[f"step{step}/image"], arrays[f"step{step}/mask"]
        rows = _masked_rows(mask)
        key = (rows.start, rows.stop)
        if key not in compiled:
            compiled[key] = jax.jit(lambda p, i, m, rows=rows: losses_and_gradients(p, i, m, rows))
        gradients, losses = compiled[key](params, jnp.asarray(images), jnp.asarray(mask[rows]))
        yield from _check_losses(arrays, step, losses)
        if step == steps[0]:
            yield from _check_gradients(arrays, _original_names(gradients, learning))
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    yield from _check_weights(arrays, _original_names(params, learning))


def _check_groups(arrays: Arrays, params: Params, model: Detected) -> Iterator[Check]:
    if "decayed" not in arrays:
        return
    decayed = jax.tree.map(
        lambda flag, value: np.full(value.shape, flag), decay_mask(params), params
    )
    named = {
        name.replace("/", ".").replace("backbone.", "backbone."): bool(value.all())
        for name, value in _original_names(decayed, model).items()
    }
    for group, flag in (("decayed", True), ("not_decayed", False)):
        expected = {str(name).replace("/", ".") for name in arrays[group]}
        wrong = len(expected ^ {name for name, value in named.items() if value is flag})
        yield Check(group, float(wrong), 0.0, "parameters in the wrong group")


def _check_losses(arrays: Arrays, step: int, losses: Losses) -> Iterator[Check]:
    names = {
        "token_loss": losses.token_loss,
        "fea_loss": losses.feature_loss,
        "patch_loss": losses.patch_loss,
        "loss": losses.loss,
    }
    tolerance = FIRST_LOSS_TOLERANCE if step == 0 else LATER_LOSS_TOLERANCE
    for name, value in names.items():
        if f"step{step}/{name}" in arrays:
            expected = float(arrays[f"step{step}/{name}"])
            error = abs(float(value) - expected) / (abs(expected) or 1.0)
            yield Check(f"step{step}/{name}", error, tolerance, "relative")


def _check_gradients(arrays: Arrays, gradients: Arrays) -> Iterator[Check]:
    for name, expected in _under(arrays, "grad0/").items():
        if name not in gradients:
            yield _unknown(f"grad0/{name}")
            continue
        error = np.abs(gradients[name] - expected).max() / (np.abs(expected).max() or 1.0)
        yield Check(f"grad0/{name}", float(error), GRADIENT_TOLERANCE, "of its largest value")


def _check_weights(arrays: Arrays, weights: Arrays) -> Iterator[Check]:
    allowed = WITHIN_LEARNING_RATE * float(arrays["lr"])
    for name, expected in _under(arrays, "after/").items():
        if name not in weights:
            yield _unknown(f"after/{name}")
            continue
        found = weights[name]
        if name.endswith("attn.qkv.bias"):
            # A key bias moves every score of a query alike: its gradient is 0, and Adam turns noise
            # into steps.
            keep = np.r_[0 : len(found) // 3, 2 * len(found) // 3 : len(found)]
            found, expected = found[keep], expected[keep]
        outside = float(np.mean(~(np.abs(found - expected) <= allowed)))
        yield Check(
            f"after/{name}",
            outside,
            OUTSIDE_TOLERANCE,
            "of its elements beyond 2 % of the learning rate",
        )


def _check_operations(arrays: Arrays) -> Iterator[Check]:
    """RandAugment's operations: `out/<operation>_m<magnitude>_<pos or neg>` and its argument."""
    image = np.ascontiguousarray(arrays["image"])
    for key, expected in _under(arrays, "out/").items():
        found = re.fullmatch(r"(\w+)_m([\d.]+)_(pos|neg)", key)
        if not found or found[1] not in randaugment.OPERATIONS:
            yield _unknown(f"out/{key}")
            continue
        name, magnitude, sign = found.groups()
        operation = randaugment.OPERATIONS[name]
        argument = operation.argument(float(magnitude), 1 if sign == "pos" else -1)
        stated = np.ravel(arrays.get(f"args/{key}", np.zeros(0)))
        if stated.size:
            error = abs(float(stated[0]) - argument)
            yield Check(f"args/{key}", error, 1e-6, "argument")
        with mock.patch.object(randaugment, "FILL", tuple(arrays["fill_rgb"].tolist())):
            output = operation.apply(image, argument)
        error = np.inf
        if output.shape == expected.shape:
            error = float(np.abs(output.astype(int) - expected.astype(int)).mean())
        tolerance = GEOMETRY_TOLERANCE if name in GEOMETRY else COLOR_TOLERANCE
        yield Check(f"out/{key}", error, tolerance, "levels of 255, mean")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.npz")
    parser.add_argument("--weights", type=Path, help="weights of a file that has none of its own")
    options = parser.parse_args(arguments)
    failed = 0
    for path in options.files:
        print(path)
        try:
            checks = check_file(path, options.weights)
        except (InputError, OSError, ValueError, KeyError) as error:
            print(f"  cannot be compared: {error}")
            failed += 1
            continue
        for check in checks:
            verdict = "ok  " if check.passed else "FAIL"
            print(
                f"  {verdict} {check.name:46} {check.error:9.2e} (at most "
                f"{check.tolerance:.0e}) {check.measure}"
            )
        failed += sum(not check.passed for check in checks)
        if not checks:
            print("  nothing to compare")
            failed += 1
    print(f"{failed} failed" if failed else "all within tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
