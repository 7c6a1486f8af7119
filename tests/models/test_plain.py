"""Models, losses and whole updates against plain.py, which writes each formula out once more."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from conftest import shuffled
from flax import nnx
from small import SMALL, assert_equal

from proteus_jax.models.attention import attention
from proteus_jax.models.config import CLIP as CLIPS
from proteus_jax.models.config import SYNCLR, ViTSpec
from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.models.layers import Mlp, SwiGLU, Unscaled
from proteus_jax.models.pos_embed import resize_position_table

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
        raw = backbone.intermediates(params, images, (2, 0), normalize=False)
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
