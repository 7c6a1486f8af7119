"""Implementations of attention against each other, and which of them is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from proteus_jax.models import attention_pallas, attention_xla
from proteus_jax.models.attention import Choice, attention, choose
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import StudentFunction
from proteus_jax.runtime import sharding

# Heads of whole rows of registers two and four at a time, an odd number, and channels that do not
# divide a row; more tokens than are taken together.
SHAPES = [(2, 257, 6, 64), (1, 257, 3, 64), (1, 50, 4, 32), (2, 37, 5, 24), (1, 600, 2, 64)]


def traced_both_ways(implementation: str, qkv: jax.Array, gradient: jax.Array) -> tuple:
    mixed, backward = jax.vjp(lambda qkv: attention(qkv, implementation), qkv)
    return mixed, backward(gradient)[0]


both_ways = jax.jit(traced_both_ways, static_argnums=0)


@jax.jit
def written_out(qkv: jax.Array, gradient: jax.Array) -> tuple:
    """The definition, in the precision of what comes in."""

    def mix(qkv: jax.Array) -> jax.Array:
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)

    mixed, backward = jax.vjp(mix, qkv)
    return mixed, backward(gradient)[0]


def drawn(shape: tuple[int, int, int, int], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """qkv and a gradient."""
    batch, tokens, heads, dim = shape
    qkv = jax.random.normal(jax.random.key(0), (batch, tokens, 3, heads, dim))
    return qkv.astype(dtype), jax.random.normal(jax.random.key(1), shape).astype(dtype)


def difference(found: tuple, expected: tuple) -> float:
    """The largest, beside the largest value."""
    pairs = [
        (np.asarray(one, np.float64), np.asarray(other, np.float64))
        for one, other in zip(found, expected, strict=True)
    ]
    return max(np.abs(one - other).max() / np.abs(other).max() for one, other in pairs)


def exact(arrays: tuple[jax.Array, jax.Array]) -> tuple:
    """The definition in float64."""
    with jax.enable_x64(True):
        return written_out(*(jnp.asarray(np.asarray(each), jnp.float64) for each in arrays))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("shape", SHAPES)
def test_32_bits_cost_their_rounding_alone(
    shape: tuple[int, int, int, int], implementation: str
) -> None:
    """The error of a sum of n terms grows as the root of n, by a factor that is the processor's; a
    mistake costs far more.
    """
    arrays = drawn(shape, jnp.float32)
    rounding = 4 * shape[1] ** 0.5 * 2**-24
    assert difference(both_ways(implementation, *arrays), exact(arrays)) < rounding


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_16_bits_cost_their_rounding_alone(
    shape: tuple[int, int, int, int], implementation: str
) -> None:
    """Against the definition in float64: an output near the largest one has 8 bits."""
    arrays = drawn(shape, jnp.bfloat16)
    assert difference(both_ways(implementation, *arrays), exact(arrays)) < 2**-7


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_what_cancels_in_a_gradient_cancels_in_16_bits(implementation: str) -> None:
    """Where all tokens have one value no score matters: two sums over channels are equal."""
    qkv, gradient = drawn((1, 17, 2, 64), jnp.bfloat16)
    qkv = qkv.at[:, :, 2].set(qkv[:, :1, 2])
    (_, of_qkv) = both_ways(implementation, qkv, gradient)
    of_query, of_key, of_value = np.moveaxis(np.asarray(of_qkv, np.float64), 2, 0)
    assert np.abs(of_value).max() > 1
    assert max(np.abs(of_query).max(), np.abs(of_key).max()) < 2e-4 * 64**0.5


def test_the_kernel_equals_einsums_in_16_bits() -> None:
    arrays = drawn(SHAPES[0], jnp.bfloat16)
    assert difference(both_ways("pallas", *arrays), both_ways("xla", *arrays)) < 2e-3


@pytest.mark.parametrize("batch", [8, 3])
def test_the_kernel_on_a_mesh(batch: int) -> None:
    """Each device has its share, or all of what does not divide."""
    mesh = sharding.make_mesh(2)
    arrays = drawn((batch, 17, 2, 16), jnp.float32)
    place = sharding.over_batch(mesh) if batch == 8 else sharding.replicated(mesh)
    placed = [jax.device_put(each, place) for each in arrays]
    compute = jax.jit(sharding.traced_on(mesh, functools.partial(both_ways, "pallas")))
    found = compute(*placed)
    assert difference(found, both_ways("xla", *arrays)) < 1e-6
    assert found[0].sharding.is_equivalent_to(place, 4)


def test_what_does_not_fit_is_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass alone, which holds more, and both."""
    qkv, gradient = drawn((1, 37, 2, 64), jnp.float32)
    expected = both_ways("xla", qkv, gradient)
    asked = []
    for name in ("forward", "backward"):
        way = getattr(attention_xla, name)
        monkeypatch.setattr(
            attention_xla, name, lambda *a, name=name, way=way: asked.append(name) or way(*a)
        )
    for limit, names in ((1_000_000, []), (400_000, ["backward"]), (0, ["forward", "backward"])):
        asked.clear()
        monkeypatch.setattr(attention_pallas, "VMEM", limit)
        found = traced_both_ways("pallas", qkv, gradient)
        assert asked == names
        assert difference(found, expected) < 1e-6


def test_choice() -> None:
    assert choose("auto", "cpu", jnp.float32, 64) == Choice("xla")
    assert choose("auto", "tpu", jnp.float32, 64) == Choice("pallas")
    assert choose("auto", "gpu", jnp.bfloat16, 64) == Choice("cudnn")
    assert choose("xla", "gpu", jnp.bfloat16, 64) == Choice("xla")
    assert choose("auto", "gpu", jnp.float32, 64) == Choice("xla")
    with pytest.raises(ValueError, match="expected auto or xla on a cpu in float32, found pallas"):
        choose("pallas", "cpu", jnp.float32, 64)
    with pytest.raises(ValueError, match="expected auto or xla on a gpu in float32, found cudnn"):
        choose("cudnn", "gpu", jnp.float32, 64)


def test_a_refusal_of_cudnn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is no cuDNN, which is one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # Another number of channels than elsewhere: the answer is kept.
    found = choose("auto", "gpu", jnp.float16, 40)
    assert found.implementation == "xla"
    assert "cuDNN's kernel cannot be had (cuDNN is not detected" in found.remark
    with pytest.raises(ValueError, match="found cudnn: cuDNN's kernel cannot be had"):
        choose("cudnn", "gpu", jnp.float16, 40)


@pytest.mark.parametrize(("remat", "forward"), [("off", 1), ("blocks", 2)])
def test_cudnn_is_lowered_and_its_residuals_are_saved(
    remat: str, forward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For CUDA, on a machine without: how often each of its kernels stands in the program."""
    for name in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_: 91400)
    spec = ViTSpec(width=128, depth=2, heads=2, grid=4)
    student = StudentFunction(spec, {"t": 8}, jnp.bfloat16, remat=remat, attention="cudnn")

    def loss(params: dict, images: jax.Array) -> jax.Array:
        return jnp.sum(student(params, images).features.patches)

    images = jax.ShapeDtypeStruct((2, 56, 56, 3), jnp.float32)
    traced = jax.jit(jax.grad(loss)).trace(student.shapes, images)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert (
        text.count('custom_call @"__cudnn$fmhaSoftmax"')
        + text.count("custom_call @__cudnn$fmhaSoftmax(")
        == forward
    )
    assert text.count("fmhaSoftmaxBackward") == 1


@pytest.mark.parametrize("tokens", [5, 6])
def test_the_token_that_is_added_is_masked(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For cuDNN an odd number of tokens is made even: here with JAX's own arithmetic behind it."""
    whole = jax.nn.dot_product_attention
    sizes = []

    def as_cudnn(query: jax.Array, *arrays: jax.Array, implementation: str, **named: object):
        assert implementation == "cudnn"
        sizes.append(query.shape[1])
        return whole(query, *arrays, implementation="xla", **named)

    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    qkv, gradient = drawn((2, tokens, 2, 8), jnp.float32)
    found = traced_both_ways("cudnn", qkv + 1.0, gradient)
    assert set(sizes) == {6}
    assert difference(found, written_out(qkv + 1.0, gradient)) < 1e-5


@pytest.mark.parametrize("positions", ["table", "rotary"])
@pytest.mark.parametrize("remat", ["off", "blocks"])
def test_a_student_learns_the_same(positions: str, remat: str) -> None:
    """Through the scan over blocks, and what it saves and computes again."""
    spec = ViTSpec(width=64, depth=2, heads=2, grid=4, positions=positions)
    images = jax.random.normal(jax.random.key(2), (2, 56, 56, 3))
    gradients = []
    for implementation in ("xla", "pallas"):
        student = StudentFunction(spec, {"t": 8}, remat=remat, attention=implementation)
        params = student.init(jax.random.key(3))

        def loss(params: dict, student: StudentFunction = student) -> jax.Array:
            return jnp.mean(jnp.square(student(params, images).by_teacher["t"].feature))

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(params)))
    for found, expected in zip(*gradients, strict=True):
        scale = np.abs(expected).max() + 1e-12
        # Sums over all tokens of the batch, in another order.
        np.testing.assert_allclose(found / scale, expected / scale, atol=5e-6)
