"""Models, losses and whole updates against plain.py, which writes each formula out once more."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest
from conftest import shuffled
from flax import nnx

from proteus_jax.methods.feature_standardization import (
    RunningMoments,
    batch_moments,
    ema_update,
    standardize,
)
from proteus_jax.methods.losses import LossWeights, token_loss
from proteus_jax.methods.masking import random_masks
from proteus_jax.methods.proteus import Proteus
from proteus_jax.methods.teacher import Teacher
from proteus_jax.models.attention import attention
from proteus_jax.models.config import CLIP as CLIPS
from proteus_jax.models.config import SPECS, SYNCLR, ViTSpec
from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.models.layers import LayerNorm, Mlp, SwiGLU, Unscaled
from proteus_jax.models.normalization import CLIP, IMAGENET, Normalization
from proteus_jax.models.pos_embed import resize_position_table
from proteus_jax.models.vit import Features
from proteus_jax.training.optimizer import adamw, decay_mask
from proteus_jax.training.train_state import init_state
from proteus_jax.training.train_step import TrainStep

SMALL = ViTSpec(width=16, depth=2, heads=2, grid=3, patch_size=4)
# Every choice that a family makes, in as few models as hold them.
CHOICES: dict[str, dict[str, Any]] = {
    "dinov2": {},
    "registers": {"registers": 3, "interpolate_antialias": True, "interpolate_offset": 0.0},
    "giant": {"feed_forward": "swiglu", "inner": 24},
    "clip": {name: value for name, value in CLIPS.items() if name != "xavier_qkv"},
    "synclr": SYNCLR,
    "dinov3": {"positions": "rotary", "registers": 2, "key_bias": False, "norm_epsilon": 1e-5},
    "siglip": {"class_token": False, "pooling": "attention", "activation": "gelu_tanh"},
    "mean": {"pooling": "mean", "final_norm": "class", "class_position": False},
}


def images_of(spec: ViTSpec, count: int = 2, seed: int = 3) -> jax.Array:
    side = spec.grid * spec.patch_size
    return jax.random.normal(jax.random.key(seed), (count, side, side, 3))


def assert_equal(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Each array within a share of its own largest value."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape
        if one.size:
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("name", CHOICES)
def test_a_model_and_its_gradient(name: str) -> None:
    spec = dataclasses.replace(SMALL, **CHOICES[name])
    backbone = BackboneFunction(spec)
    params, images = shuffled(backbone.init(jax.random.key(1))), images_of(spec)
    mask = jnp.zeros((2, 9), bool).at[0, 2].set(True).at[1, 4:7].set(True)
    mix = [jax.random.normal(jax.random.key(9), shape) for shape in ((2, 16), (2, 9, 16))]

    def mixed(function: Any, params: Any) -> tuple[jax.Array, Any]:
        features = tuple(function(params, images, mask))
        weighted = (jnp.sum(part * own) for part, own in zip(mix, features, strict=False))
        return sum(weighted, jnp.zeros(())), features

    ((_, found), gradient), ((_, expected), wanted) = (
        jax.jit(jax.value_and_grad(functools.partial(mixed, function), has_aux=True))(params)
        for function in (backbone, functools.partial(plain.vit, spec))
    )
    assert_equal(found, expected)
    # The keys' own bias moves no softmax: its gradient is rounding, on both sides.
    third = slice(spec.width, 2 * spec.width)
    for tree in (gradient, wanted):
        qkv = tree["blocks"]["attn"]["qkv"]
        qkv["bias"] = np.delete(np.asarray(qkv["bias"]), np.r_[third], axis=1)
    jax.tree.map(lambda one, other: assert_equal(one, other, 1e-4), gradient, wanted)


@pytest.mark.parametrize("name", ["dinov2", "registers", "dinov3", "siglip", "mean"])
def test_where_the_class_token_looks(name: str) -> None:
    """Of the last of two blocks, from queries and keys by hand; registers are left out."""
    spec = dataclasses.replace(SMALL, **CHOICES[name])
    backbone = BackboneFunction(spec)
    params, images = shuffled(backbone.init(jax.random.key(1))), images_of(spec)
    if spec.pooling == "attention":
        _, patches, _ = plain.vit(spec, params, images)
        query = plain.linear(params["pool"]["probe"], params["pool"]["qkv"])[:, 0, :16]
        keys = plain.linear(patches, params["pool"]["qkv"])[..., 16:32]
        expected = jnp.stack([_weights(query[:, at], keys[..., at]) for at in _halves()], axis=1)
    elif not spec.class_token:
        expected = jnp.full((2, 2, 9), 1 / 9)
    else:
        one, two = (
            jax.tree.map(lambda stacked, n=n: stacked[n], params["blocks"]) for n in range(2)
        )
        tokens = plain.block(spec, plain.embed(spec, params, images), one, (3, 3))
        qkv = plain.projected(spec, tokens, two, (3, 3)).reshape(2, -1, 48)
        query, keys = qkv[:, 0, :16], qkv[..., 16:32]
        heads = [_weights(query[:, at], keys[..., at]) for at in _halves()]
        expected = jnp.stack(heads, axis=1)[..., spec.prefix :]
    assert_equal(backbone.class_attention(params, images), expected)


def _halves() -> tuple[slice, slice]:
    return slice(0, 8), slice(8, 16)


def _weights(query: jax.Array, keys: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.einsum("bd,bnd->bn", query, keys) / np.sqrt(8), axis=-1)


def test_what_blocks_give_before_and_after_the_last_norm() -> None:
    """Two of three blocks, of CLIP's, whose norm is for the class token alone, and of DINOv2's."""
    for name in ("clip", "dinov2"):
        spec = dataclasses.replace(SMALL, depth=3, **CHOICES[name])
        backbone = BackboneFunction(spec)
        params, images = shuffled(backbone.init(jax.random.key(1))), images_of(spec)
        tokens = plain.embed(spec, params, images)
        after = []
        for number in range(3):
            one = jax.tree.map(lambda stacked, n=number: stacked[n], params["blocks"])
            tokens = plain.block(spec, tokens, one, (3, 3))
            after.append(tokens)
        raw = backbone.intermediates(params, images, (2, 0), normalise=False)
        normed = backbone.intermediates(params, images, (2, 0))
        for found, whole, tokens in zip(raw, normed, (after[2], after[0]), strict=True):
            assert_equal(found[:2], (tokens[:, 0], tokens[:, 1:]))
            normal = plain.layer_norm(tokens, params["norm"], spec.norm_epsilon)
            patches = tokens if spec.final_norm == "class" else normal
            assert_equal(whole[:2], (normal[:, 0], patches[:, 1:]))
        every = backbone.block_tokens(params, images, (0, 1, 2))
        assert_equal(every, jnp.stack(after))


def test_gradients_of_attention_with_large_scores() -> None:
    """Scores around a thousand overflow where the largest is not subtracted first."""
    qkv = jax.random.normal(jax.random.key(0), (2, 5, 3, 2, 4)).at[:, :, :2].multiply(40.0)
    weight = jax.random.normal(jax.random.key(1), (2, 5, 2, 4))
    for implementation in ("xla", "pallas"):
        found, expected = (
            jax.value_and_grad(lambda qkv, f=f: jnp.sum(f(qkv) * weight))(qkv)
            for f in (
                functools.partial(attention, implementation=implementation),
                plain.softmax_attention,
            )
        )
        assert np.isfinite(found[0])
        assert_equal(found, expected, 1e-4)


@pytest.mark.parametrize("grid", [(2, 3), (5, 1)])
def test_rotary_positions_of_images_that_are_not_square(grid: tuple[int, int]) -> None:
    spec = dataclasses.replace(SMALL, **CHOICES["dinov3"])
    backbone = BackboneFunction(spec)
    params = shuffled(backbone.init(jax.random.key(1)))
    images = jax.random.normal(jax.random.key(3), (1, 4 * grid[0], 4 * grid[1], 3))
    assert_equal(tuple(backbone(params, images)), plain.vit(spec, params, images))


def test_a_resized_table_keeps_rows_and_columns_apart() -> None:
    """What changes along one axis alone does so afterwards; the class entry stays."""
    table = np.zeros((1, 1 + 9, 2), np.float32)
    table[0, 0] = 7.0
    table[0, 1:, 0] = np.repeat([0.0, 1.0, 3.0], 3)
    table[0, 1:, 1] = np.tile([5.0, 2.0, 1.0], 3)
    spec = dataclasses.replace(SMALL, width=2, heads=1)
    found = np.asarray(resize_position_table(jnp.asarray(table), spec, (4, 6)))
    assert found.shape == (1, 1 + 24, 2)
    assert (found[0, 0] == 7.0).all()
    rows, columns = np.moveaxis(found[0, 1:].reshape(4, 6, 2), 2, 0)
    assert np.ptp(rows, axis=1).max() < 1e-5
    assert np.ptp(columns, axis=0).max() < 1e-5
    assert (np.diff(rows[:, 0]) > 0).all()
    assert (np.diff(columns[0]) < 0).all()
    # In 16 bits it is rounded once, at the end.
    half = resize_position_table(jnp.asarray(table / 3, jnp.bfloat16), spec, (4, 6))
    whole = resize_position_table(
        jnp.asarray(table / 3, jnp.bfloat16).astype(jnp.float32), spec, (4, 6)
    )
    np.testing.assert_array_equal(half, whole.astype(jnp.bfloat16))


def test_sums_and_means_are_float32_whatever_comes_in() -> None:
    """LayerNorm of large means, losses, and moments of teachers' tokens in 16 bits."""
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(64, 256)) + 300, jnp.float32)
    norm = LayerNorm(256, 1e-6, rngs=nnx.Rngs(0))
    wide = np.asarray(rows, np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(norm(rows), expected, atol=3e-4)
    half = jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16)
    assert norm(half).dtype == jnp.float32
    wide = np.asarray(half, np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(norm(half), expected, atol=1e-5)

    other = jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16)
    difference = np.asarray(half, np.float64) - np.asarray(other, np.float64)
    found = token_loss(half, other)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(np.mean(difference**2), rel=1e-6)

    patches = jnp.asarray(rng.normal(size=(64, 5, 256)) + 3, jnp.bfloat16)
    moments = batch_moments(Features(half, patches, jnp.zeros((64, 0, 256))))
    wide, deep = np.asarray(half, np.float64), np.asarray(patches, np.float64)
    for one, other in zip(
        moments,
        (wide.mean(0), (wide**2).mean(0), deep.mean((0, 1)), (deep**2).mean((0, 1))),
        strict=True,
    ):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_constant_channel_of_a_teacher_is_no_nan() -> None:
    """E[x^2] - E[x]^2 may come out a little below 0."""
    for value in (1.1, 100.3, 3e3):
        mean = jnp.full(4, value, jnp.float32)
        square = jnp.square(mean) * (1 - 3e-7)
        features = Features(jnp.ones((2, 4)) * value, jnp.ones((2, 3, 4)), jnp.zeros((2, 0, 4)))
        found = standardize(features, RunningMoments(mean, square, mean, square))
        assert np.isfinite(found.cls).all()
        assert np.abs(found.cls).max() < 1


@pytest.mark.parametrize("name", ["giant", "clip", "siglip"])
def test_activations_are_float32_between_matmuls_of_16_bits(name: str) -> None:
    """A feed-forward layer from bfloat16 matmuls alone, each rounded to 16 bits and no more."""
    spec = dataclasses.replace(SMALL, depth=1, **CHOICES[name])
    params = shuffled(BackboneFunction(spec).init(jax.random.key(1)))["blocks"]["mlp"]
    params = jax.tree.map(lambda stacked: jnp.asarray(stacked[0], jnp.float32), params)
    kind = SwiGLU if spec.feed_forward == "swiglu" else Mlp
    module = kind(spec, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    for layer, arrays in params.items():
        for array, value in arrays.items():
            getattr(getattr(module, layer), array)[...] = value
    tokens = jax.random.normal(jax.random.key(2), (1, 64, 16), jnp.float32)

    def rounded(values: jax.Array) -> jax.Array:
        return values.astype(jnp.bfloat16).astype(jnp.float32)

    def product(values: jax.Array, layer: Any) -> jax.Array:
        return rounded(rounded(rounded(values) @ rounded(layer["kernel"])) + rounded(layer["bias"]))

    first, last = ("w12", "w3") if kind is SwiGLU else ("fc1", "fc2")
    inside = product(tokens, params[first])
    if kind is SwiGLU:
        gate, value = jnp.split(inside, 2, axis=-1)
        inside = gate / (1 + jnp.exp(-gate)) * value
    else:
        inside = plain.activation(spec.activation, inside)
    expected = product(inside, params[last])
    found = module(tokens, Unscaled()).astype(jnp.float32)
    # One rounding of what is between them would change far more of the outputs.
    assert np.mean(np.asarray(found) == np.asarray(expected)) > 0.97


def test_heads_speak_float32_of_a_student_in_16_bits() -> None:
    """Its class token leaves in float32, though matmuls were bfloat16."""
    student = StudentFunction(SMALL, {"t": 8}, jnp.bfloat16)
    features = student(student.init(jax.random.key(0)), images_of(SMALL)).features
    for part in features:
        assert part.dtype == jnp.float32
    values = np.asarray(features.cls)
    assert (values != np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32)).any()


TEACHERS = {
    "wide": (dataclasses.replace(SMALL, width=24, depth=1), IMAGENET, (1.0, 0.5, 2.0), False),
    "odd": (
        dataclasses.replace(SMALL, width=12, depth=1, registers=2),
        CLIP,
        (0.5, 1.0, 0.25),
        True,
    ),
}
STUDENTS = {
    "one": dataclasses.replace(SMALL, depth=1),
    "two": dataclasses.replace(SMALL, width=8, depth=1),
}
RATE, DECAY, SEED, RATIO = 0.05, 0.9, 5, 0.45


@functools.cache
def training() -> tuple[Any, Any, Any, Any]:
    """Students, teachers' params, step and state of two students who follow two teachers."""
    widths = {name: spec.width for name, (spec, *_) in TEACHERS.items()}
    students = {name: StudentFunction(spec, widths) for name, spec in STUDENTS.items()}
    backbones = {name: BackboneFunction(spec) for name, (spec, *_) in TEACHERS.items()}
    params = {
        name: shuffled(backbone.init(jax.random.key(7)), seed=11)
        for name, backbone in backbones.items()
    }
    teachers = {
        name: Teacher(backbones[name], statistics, standardise=standard)
        for name, (_, statistics, _, standard) in TEACHERS.items()
    }
    weights = {name: LossWeights(*factors) for name, (_, _, factors, _) in TEACHERS.items()}
    optimizer = optax.sgd(RATE)
    step = TrainStep(
        method=Proteus(loss_weights=weights, mask_ratio=RATIO),
        teachers=teachers,
        students=students,
        optimizer=optimizer,
        schedule=lambda count: RATE + 0.0 * count,
        normalisation=IMAGENET,
        ema_decay=DECAY,
        seed=SEED,
    )
    state = init_state(students, optimizer, ema=True, seed=1, standardise={"odd": 12})
    state = state._replace(params=shuffled(state.params, seed=13))
    state = state._replace(ema={name: values["backbone"] for name, values in state.params.items()})
    return students, params, jax.jit(step), state


def _normalized(images: np.ndarray, statistics: Normalization) -> jax.Array:
    return jnp.asarray((images / 255 - statistics.mean) / statistics.std, jnp.float32)


def test_three_updates_written_out() -> None:
    """Two students, two teachers with statistics of their own, one of them standardised; weights,
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
    """Targets are standardised by the batch's own moments, and an average is as young."""
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


def test_moments_over_many_batches() -> None:
    """A plain mean of the first thousand, and never a smaller share than a thousandth."""
    rows = np.random.default_rng(0).normal(size=(4, 4, 2)).astype(np.float32)
    batches = [RunningMoments(*jnp.asarray(each)) for each in rows]
    running = RunningMoments(*(jnp.full(2, 3.0) for _ in range(4)))
    for count, batch in enumerate(batches):
        running = ema_update(jnp.int32(count), running, batch)
    assert_equal(running, RunningMoments(*rows.mean(axis=0)), 1e-5)
    zero, one = (RunningMoments(*(jnp.full(2, value) for _ in range(4))) for value in (0.0, 1.0))
    for updates, share in ((9, 0.1), (998, 1 / 999), (999, 1e-3), (5000, 1e-3)):
        assert_equal(ema_update(jnp.int32(updates), zero, one).cls, jnp.full(2, share), 1e-5)


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
