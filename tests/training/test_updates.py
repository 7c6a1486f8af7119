"""Whole updates against plain.py, which writes each formula out once more."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest
from conftest import shuffled
from small import DECAY, RATE, RATIO, SEED, SMALL, STUDENTS, TEACHERS, assert_equal, training

from proteus_jax.methods.masking import random_masks
from proteus_jax.models.config import SPECS, ViTSpec
from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.models.normalization import IMAGENET, Normalization
from proteus_jax.training.optimizer import adamw, decay_mask


def _normalized(images: np.ndarray, statistics: Normalization) -> jax.Array:
    return jnp.asarray((images / 255 - statistics.mean) / statistics.std, jnp.float32)


def test_three_updates_written_out() -> None:
    """Two students, two teachers with statistics of their own, one of them standardized; weights,
    masks, averages and moments, over three batches.
    """
    _, teachers, step, state = training()
    rng = np.random.default_rng(0)
    expected = {name: state.params[name] for name in STUDENTS}
    averages = {name: expected[name]["backbone"] for name in STUDENTS}
    seen: list[dict[str, jax.Array]] = []
    of_teacher = jax.jit(plain.vit, static_argnums=0)
    gradient_of = jax.jit(jax.value_and_grad(_objective, argnums=1, has_aux=True), static_argnums=0)
    for count in range(3):
        images = rng.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
        targets = {}
        for name, (spec, statistics, _, standard) in TEACHERS.items():
            cls, patches, _ = of_teacher(spec, teachers[name], _normalized(images, statistics))
            if standard:
                seen.append({"cls": cls, "patches": patches.reshape(-1, 12)})
                # The first batch's own, then those of all batches before.
                known = seen[:1] if count == 0 else seen[:count]
                moments = [
                    (jnp.mean(jnp.stack([jnp.mean(f(each[part]), 0) for each in known]), 0))
                    for part in ("cls", "patches")
                    for f in (lambda x: x, jnp.square)
                ]
                deviations = [jnp.sqrt(moments[i + 1] - moments[i] ** 2 + 1e-6) for i in (0, 2)]
                cls = (cls - moments[0]) / deviations[0]
                patches = (patches - moments[2]) / deviations[1]
            targets[name] = (cls, patches)
        key = jax.random.fold_in(jax.random.key(SEED), count)
        mask = random_masks(jax.random.split(key, 3)[0], 3, 9, RATIO)
        assert mask.sum() == 3 * 4
        pixels = _normalized(images, IMAGENET)
        state, metrics = step(state, teachers, images)
        assert float(metrics["learning_rate"]) == pytest.approx(RATE)
        for name, spec in STUDENTS.items():
            (total, parts), gradient = gradient_of(spec, expected[name], pixels, targets, mask)
            expected[name] = jax.tree.map(lambda p, g: p - RATE * g, expected[name], gradient)
            decay = min(DECAY, (1 + count) / (10 + count))
            averages[name] = jax.tree.map(
                lambda old, new, decay=decay: decay * old + (1 - decay) * new,
                averages[name],
                expected[name]["backbone"],
            )
            found = [
                metrics[f"{name}/{teacher}{loss}_loss"]
                for teacher in ("", "odd_")
                for loss in ("token", "feature", "patch")
            ]
            assert_equal(metrics[f"{name}/loss"], total)
            # Six class tokens have a small variance in some channels, which E[x^2] - E[x]^2 blurs.
            np.testing.assert_allclose(found, [*parts["wide"], *parts["odd"]], rtol=1e-4)
        assert_equal(state.params, expected, 3e-5)
        assert_equal(state.ema, averages, 3e-5)
    assert (int(state.step), int(state.skipped.total)) == (3, 0)


def _objective(spec: ViTSpec, params: Any, pixels: Any, targets: Any, mask: Any) -> Any:
    parts = plain.losses(spec, params, pixels, targets, mask)
    total = sum(
        factor * loss
        for name, (_, _, factors, _) in TEACHERS.items()
        for factor, loss in zip(factors, parts[name], strict=True)
    )
    return total, parts


@pytest.mark.parametrize("student", ["one", "two"])
def test_a_nan_of_any_student_stops_the_update_of_all(student: str) -> None:
    _, teachers, step, state = training()
    images = np.random.default_rng(1).integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    spoilt = jax.tree.map(jnp.asarray, jax.device_get(state.params))
    spoilt[student]["heads"]["odd"]["feature"]["linear"]["bias"] *= jnp.nan
    begun = state._replace(params=spoilt)
    after, metrics = step(begun, teachers, images)
    assert int(metrics["skipped"]) == 1
    for old, new in zip(begun[1:-1], after[1:-1], strict=True):
        jax.tree.map(np.testing.assert_array_equal, old, new)


def test_after_skipped_first_steps_the_next_is_the_first() -> None:
    """Targets are standardized by the batch's own moments, and an average is as young."""
    _, teachers, step, state = training()
    images = np.random.default_rng(2).integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    first, _ = step(state, teachers, images)
    late = state._replace(
        step=jnp.int32(3), skipped=state.skipped._replace(total=jnp.int32(3), in_a_row=jnp.int32(3))
    )
    after, metrics = step(late, teachers, images)
    assert_equal(after.statistics, first.statistics, 1e-6)
    for name in STUDENTS:
        # A tenth of the old, as after a first step.
        assert after.ema is not None
        assert state.ema is not None
        young = jax.tree.map(
            lambda old, new: 0.1 * old + 0.9 * new,
            state.ema[name],
            after.params[name]["backbone"],
        )
        assert_equal(after.ema[name], young, 1e-5)
    assert int(metrics["skipped"]) == 3
    assert int(metrics["skipped_in_a_row"]) == 0
    # Token losses know no mask, which does follow the step.
    _, row = step(state, teachers, images)
    for name in ("one/odd_token_loss", "two/token_loss"):
        assert float(metrics[name]) == pytest.approx(float(row[name]), rel=1e-6)
    assert float(metrics["one/patch_loss"]) != float(row["one/patch_loss"])


def test_adamw_over_three_updates_of_a_whole_student() -> None:
    """Each array by name: matrices, tokens and tables decay; vectors, biases and what is one per
    block do not.
    """
    spec = dataclasses.replace(SMALL, registers=1)
    params = StudentFunction(spec, {"t": 4}).init(jax.random.key(0))
    params = shuffled(params)
    rng = np.random.default_rng(5)
    gradients = [
        jax.tree.map(lambda array: rng.normal(size=array.shape).astype(np.float32), params)
        for _ in range(3)
    ]
    rates = [1e-2, 2e-2, 5e-3]
    optimizer = adamw(lambda count: jnp.asarray(rates)[count], weight_decay=0.3)
    state, now = optimizer.init(params), params
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, now)
        now = optax.apply_updates(now, updates)
    decayed = {"kernel", "cls_token", "pos_embed", "mask_token", "register_tokens"}
    names = set()

    def check(path: Any, start: Any, found: Any, *steps: Any) -> None:
        name = path[-1].key
        names.add(name)
        expected = plain.adamw(
            np.asarray(start), list(steps), rates, 0.3 if name in decayed else 0.0
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, params, now, *gradients)
    assert names == decayed | {"bias", "scale", "gamma"}


def test_a_clip_students_class_token_is_a_vector_that_does_not_decay() -> None:
    mask = decay_mask(BackboneFunction(SPECS["vit_small_clip"]).shapes)
    assert not mask["cls_token"]
    assert mask["pos_embed"]
