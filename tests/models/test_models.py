import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, shuffled
from flax import nnx

from proteus_jax.models.config import CLIP, SPECS, SYNCLR, ViTSpec
from proteus_jax.models.functional import (
    BackboneFunction,
    StudentFunction,
    in_precision,
    without_layer_scale,
)
from proteus_jax.models.normalization import CLIP as CLIP_STATISTICS
from proteus_jax.models.normalization import HALF, IMAGENET, Normalization
from proteus_jax.models.pos_embed import resize_matrix, resize_position_table
from proteus_jax.models.student import Head
from proteus_jax.models.vit import VisionTransformer

BACKBONE = BackboneFunction(TINY)


@pytest.fixture(scope="module")
def params() -> dict:
    return BACKBONE.init(jax.random.key(0))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 56, 56, 3))


def test_sizes_of_the_paper() -> None:
    """Parameters of the table in the paper's units; the giant student has the MLP."""
    millions = {"vit_tiny": 5.51, "vit_small": 21.63, "vit_base": 85.73, "vit_large": 303.23}
    for name, expected in millions.items():
        count = sum(array.size for array in jax.tree.leaves(BackboneFunction(SPECS[name]).shapes))
        assert round(count / 1e6, 2) == expected
    assert SPECS["vit_giant2"].feed_forward == "mlp"
    assert ViTSpec(width=1536, depth=1, heads=24, feed_forward="swiglu").hidden == 4096


def test_last_intermediate_is_the_output(params: dict, images: jax.Array) -> None:
    final = BACKBONE(params, images)
    first, last = BACKBONE.intermediates(params, images, (0, 1))
    np.testing.assert_array_equal(last.patches, final.patches)
    np.testing.assert_array_equal(last.cls, final.cls)
    assert float(jnp.abs(first.patches - last.patches).max()) > 1e-3


def test_order_and_repetition_of_intermediates_are_the_callers(
    params: dict, images: jax.Array
) -> None:
    last, first = BACKBONE.intermediates(params, images, (1, 0))
    np.testing.assert_array_equal(last.cls, BACKBONE.intermediates(params, images, (1,))[0].cls)
    np.testing.assert_array_equal(first.cls, BACKBONE.intermediates(params, images, (0,))[0].cls)
    twice = BACKBONE.intermediates(params, images, (1, 0, 1))
    for found, expected in zip(twice, (last, first, last), strict=True):
        np.testing.assert_array_equal(found.cls, expected.cls)
    with pytest.raises(ValueError, match=r"blocks 0 to 1, asked for \[2\]"):
        BACKBONE.intermediates(params, images, (2,))


def test_masked_patches_are_not_seen(params: dict, images: jax.Array) -> None:
    mask = jnp.zeros((2, 16), bool).at[:, 5].set(True)
    # Patch 5 of a 4 x 4 grid: rows 14 to 27, columns 14 to 27.
    other = images.at[:, 14:28, 14:28].set(7.0)
    np.testing.assert_array_equal(
        BACKBONE(params, images, mask).cls, BACKBONE(params, other, mask).cls
    )
    assert float(jnp.abs(BACKBONE(params, images).cls - BACKBONE(params, other).cls).max()) > 1e-4


@pytest.mark.parametrize("shape", [(28, 84), (70, 42), (56, 56)])
def test_any_multiple_of_the_patch(params: dict, shape: tuple[int, int]) -> None:
    features = BACKBONE(params, jnp.zeros((1, *shape, 3)))
    assert features.patches.shape == (1, shape[0] * shape[1] // 14**2, 32)
    assert features.registers.shape == (1, 0, 32)


def test_other_sides_are_refused(params: dict) -> None:
    with pytest.raises(ValueError, match="multiples of the patch size 14, found 56 x 57"):
        BACKBONE(params, jnp.zeros((1, 56, 57, 3)))


def test_a_table_resized_once_equals_one_resized_each_time(params: dict) -> None:
    images = jax.random.normal(jax.random.key(2), (1, 84, 84, 3))
    table = resize_position_table(params["pos_embed"], TINY, (6, 6))
    once = BackboneFunction(dataclasses.replace(TINY, grid=6))
    np.testing.assert_array_equal(
        once(params | {"pos_embed": table}, images).cls, BACKBONE(params, images).cls
    )


def test_initialization_is_the_references() -> None:
    """Normal of 0.02 without a cut, tiny tokens, PyTorch's uniform for patches and heads."""
    params = StudentFunction(SPECS["vit_tiny"], {"teacher": 384}).init(jax.random.key(0))
    backbone = params["backbone"]
    kernel = np.asarray(backbone["blocks"]["mlp"]["fc1"]["kernel"])
    assert kernel.std() == pytest.approx(0.02, rel=0.01)
    # A cut at two deviations would show here: 4.6 % of a normal lie outside.
    assert np.mean(np.abs(kernel) > 0.04) == pytest.approx(0.0455, abs=0.002)
    # Layers are drawn apart.
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.02
    assert float(np.std(backbone["cls_token"])) < 1e-5
    assert not np.any(backbone["mask_token"])
    assert not np.any(backbone["blocks"]["attn"]["qkv"]["bias"])
    assert np.all(backbone["blocks"]["ls1"]["gamma"] == 1)
    for layer, fan_in in (
        (backbone["patch_embed"]["proj"], 588),
        (params["heads"]["teacher"]["token"]["linear"], 192),
    ):
        for array in (layer["kernel"], layer["bias"]):
            limit = fan_in**-0.5
            assert float(np.abs(array).max()) <= limit
            assert float(np.std(array)) == pytest.approx(limit / 3**0.5, rel=0.1)


def test_drop_path_drops_a_branch_of_a_sample(images: jax.Array) -> None:
    student = StudentFunction(TINY, {"teacher": 16}, drop_path=0.5)
    params = student.init(jax.random.key(0))
    still = student(params, images).features.cls
    np.testing.assert_array_equal(still, student(params, images).features.cls)
    run = jax.jit(lambda key: student(params, images, key=key).features.cls)
    drawn = np.stack([run(jax.random.key(number)) for number in range(16)])
    # The last block's two branches are each kept or dropped: four outcomes for a sample.
    for sample in range(2):
        assert len(np.unique(drawn[:, sample].round(4), axis=0)) == 4
    none = StudentFunction(TINY, {"teacher": 16}, drop_path=0.0)
    np.testing.assert_array_equal(none(params, images, key=jax.random.key(0)).features.cls, still)


def test_drop_path_keeps_the_mean() -> None:
    """None of the first block's branches goes, of the last's the rate; the others weigh more."""
    spec = dataclasses.replace(TINY, depth=3)
    model = VisionTransformer(spec, rngs=nnx.Rngs(0))
    kept = model._keep(0.4, jax.random.key(0), 4000)
    assert kept is not None
    assert kept.shape == (3, 2, 4000, 1, 1)
    assert (kept[0] == 1).all()
    for block, rate in ((1, 0.2), (2, 0.4)):
        for branch in np.asarray(kept[block, :, :, 0, 0]):
            assert set(np.unique(branch.round(4))) == {0, np.float32(1 / (1 - rate)).round(4)}
            assert np.mean(branch == 0) == pytest.approx(rate, abs=0.04)
            assert branch.mean() == pytest.approx(1, abs=0.06)
    # The two branches of a sample fall apart from each other.
    assert (kept[2, 0] != kept[2, 1]).any()
    assert model._keep(0.0, None, 3) is None
    with pytest.raises(ValueError, match="drop_path needs a key"):
        model._keep(0.1, None, 3)


def test_each_family_starts_as_its_authors_do() -> None:
    """A mask token of deviation 0.02 in SynCLR, Xavier's uniform for CLIP's qkv, else 0.02."""
    sizes: dict[str, Any] = {"width": 192, "depth": 2, "heads": 3, "grid": 4}
    starts = {
        name: BackboneFunction(ViTSpec(**sizes, **choices)).init(jax.random.key(0))
        for name, choices in (("dinov2", {}), ("synclr", SYNCLR), ("clip", CLIP))
    }
    for name, expected in (("dinov2", 0.0), ("synclr", 0.02), ("clip", 0.0)):
        assert np.std(starts[name]["mask_token"]) == pytest.approx(expected, rel=0.15)
    for name, params in starts.items():
        kernel = np.asarray(params["blocks"]["attn"]["qkv"]["kernel"])
        if name == "clip":
            limit = (6 / (192 + 3 * 192)) ** 0.5
            assert limit * 0.99 < np.abs(kernel).max() <= limit
            assert kernel.std() == pytest.approx(limit / 3**0.5, rel=0.02)
        else:
            assert kernel.std() == pytest.approx(0.02, rel=0.02)
            assert np.abs(kernel).max() > 0.06
        assert np.std(params["blocks"]["attn"]["proj"]["kernel"]) == pytest.approx(0.02, rel=0.02)
        assert np.std(params["pos_embed"]) == pytest.approx(0.02, rel=0.05)
        assert 0 < np.std(params["cls_token"]) < 2e-6
    assert starts["clip"]["cls_token"].shape == (192,)
    assert starts["dinov2"]["cls_token"].shape == (1, 1, 192)
    assert "bias" not in starts["clip"]["patch_embed"]["proj"]


def test_layer_scale_is_multiplied_into_the_weights(images: jax.Array) -> None:
    """Of both kinds of feed-forward layer, into kernels and biases: the same tokens come out."""
    for choices in ({}, {"feed_forward": "swiglu", "inner": 24}):
        spec = dataclasses.replace(TINY, **choices)
        params = BackboneFunction(spec).init(jax.random.key(0))
        params = shuffled(params)
        plain = without_layer_scale(params)
        assert {"ls1", "ls2"}.isdisjoint(plain["blocks"])
        without = BackboneFunction(dataclasses.replace(spec, layer_scale=False))
        expected = BackboneFunction(spec)(params, images)
        for found, wanted in zip(without(plain, images)[:2], expected[:2], strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_published_statistics_of_images() -> None:
    """Of torchvision and OpenAI, typed in once more."""
    assert (CLIP_STATISTICS.mean[0], CLIP_STATISTICS.std[0]) == (0.48145466, 0.26862954)
    assert (CLIP_STATISTICS.mean[1], CLIP_STATISTICS.std[1]) == (0.4578275, 0.26130258)
    assert (CLIP_STATISTICS.mean[2], CLIP_STATISTICS.std[2]) == (0.40821073, 0.27577711)
    assert (IMAGENET.mean[0], IMAGENET.std[0]) == (0.485, 0.229)
    assert (IMAGENET.mean[1], IMAGENET.std[1]) == (0.456, 0.224)
    assert (IMAGENET.mean[2], IMAGENET.std[2]) == (0.406, 0.225)
    assert (HALF.mean, HALF.std) == ((0.5,) * 3, (0.5,) * 3)
    pixels = np.array([[[[0, 128, 255]]]], np.uint8)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(IMAGENET(jnp.asarray(pixels))[0, 0, 0], expected, rtol=1e-6)
    for std in ([0.2, 0.0, 0.2], [0.2, 0.2], [0.2, 0.2, True], [0.2, 0.2, float("nan")]):
        with pytest.raises(ValueError, match="three means and three deviations above 0"):
            Normalization.checked([0.5, 0.5, 0.5], std)


def test_a_smaller_grid_is_antialiased() -> None:
    """Keys' kernel of a = -0.5 stretched by the scale, its weights made to sum to one; and where
    nothing is shrunk a = -0.75.
    """

    def keys(distance: float, a: float) -> float:
        x = abs(distance)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    found = resize_matrix(8, 3, 0.0, True)
    for row in range(3):
        center = (row + 0.5) * 8 / 3 - 0.5
        weights = np.array([keys((column - center) * 3 / 8, -0.5) for column in range(8)])
        np.testing.assert_allclose(found[row], weights / weights.sum(), atol=1e-6)
    found = resize_matrix(8, 3, 0.0, False)
    for row in range(3):
        center = (row + 0.5) * 8 / 3 - 0.5
        weights = np.zeros(8)
        for tap in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            weights[min(max(tap, 0), 7)] += keys(tap - center, -0.75)
        np.testing.assert_allclose(found[row], weights, atol=1e-6)
    # DINOv2's offset moves an axis whose length stays, unless it is antialiased.
    assert np.abs(resize_matrix(8, 8, 0.1, False) - np.eye(8)).max() > 1e-3
    np.testing.assert_array_equal(resize_matrix(8, 8, 0.1, True), np.eye(8))


def test_families_have_their_authors_choices() -> None:
    """Students of SynCLR's and CLIP's kind, and DINOv2's, as the authors' code makes them."""
    clip, synclr, own = (SPECS[f"vit_small{kind}"] for kind in ("_clip", "_synclr", ""))
    assert (clip.norm_epsilon, synclr.norm_epsilon, own.norm_epsilon) == (1e-5, 1e-6, 1e-6)
    assert (clip.activation, synclr.activation) == ("quick_gelu", "gelu")
    assert (clip.layer_scale, synclr.layer_scale, own.layer_scale) == (False, False, True)
    assert (clip.pre_norm, clip.patch_bias, clip.final_norm) == (True, False, "class")
    assert (clip.interpolate_offset, own.interpolate_offset) == (0.0, 0.1)
    for name, (width, depth, heads) in {
        "vit_tiny": (192, 12, 3),
        "vit_small": (384, 12, 6),
        "vit_base": (768, 12, 12),
        "vit_large": (1024, 24, 16),
        "vit_giant2": (1536, 40, 24),
    }.items():
        spec = SPECS[name]
        assert (spec.width, spec.depth, spec.heads, spec.patch_size) == (width, depth, heads, 14)


def test_heads_have_an_epsilon_of_their_own() -> None:
    """PyTorch's 1e-5, which tokens of a small variance show."""
    head = Head(6, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens = 1e-3 * np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    centered = tokens - tokens.mean(axis=1, keepdims=True)
    normal = centered / np.sqrt(np.mean(centered**2, axis=1, keepdims=True) + 1e-5)
    linear = head.linear
    assert linear.bias is not None
    expected = normal @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(head(jnp.asarray(tokens)), expected, rtol=1e-4, atol=1e-6)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those inside its loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")
        ):
            if hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)
            elif hasattr(inner, "eqns"):
                yield from equations(inner)


def test_precision_table() -> None:
    """Matmuls in bfloat16; LayerNorm, softmax and a float32 student's stream in float32."""
    student = StudentFunction(TINY, {"teacher": 16}, dtype=jnp.bfloat16)
    params = student.init(jax.random.key(0))
    pixels = jnp.zeros((2, 56, 56, 3))
    inputs: dict[str, set[str]] = {}
    for equation in equations(jax.make_jaxpr(student)(params, pixels).jaxpr):
        kinds = {str(variable.aval.dtype) for variable in equation.invars}
        inputs.setdefault(equation.primitive.name, set()).update(kinds)
    assert inputs["dot_general"] == {"bfloat16"}
    assert inputs["exp"] == inputs["rsqrt"] == {"float32"}
    assert student(params, pixels).features.cls.dtype == jnp.float32

    teacher = BackboneFunction(TINY, jnp.bfloat16)
    half = in_precision(params["backbone"], jnp.bfloat16)
    assert half["blocks"]["attn"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert half["blocks"]["attn"]["qkv"]["bias"].dtype == half["pos_embed"].dtype == jnp.float32
    (stream,) = teacher.intermediates(half, pixels, (1,), normalize=False)
    assert stream.cls.dtype == jnp.float32


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(
    ("source", "target", "offset"),
    [(37, 16, 0.1), (37, 7, 0.1), (16, 37, 0.1), (5, 9, 0.0), (37, 11, 0.0), (37, 37, 0.1)],
)
def test_resize_equals_pytorch(
    source: int, target: int, offset: float, antialias: bool, rng: np.random.Generator
) -> None:
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    table = rng.normal(size=(1, 8, source, source)).astype(np.float32)
    size = (
        {"scale_factor": ((target + offset) / source,) * 2} if offset else {"size": (target,) * 2}
    )
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(table), mode="bicubic", antialias=antialias, **size
    )
    matrix = resize_matrix(source, target, offset, antialias)
    found = np.einsum("hH,wW,bcHW->bchw", matrix, matrix, table)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


def test_specs_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="width 10 is not divisible by 3 heads"):
        ViTSpec(width=10, depth=1, heads=3)
    with pytest.raises(ValueError, match="feed_forward must be one of"):
        ViTSpec(width=12, depth=1, heads=3, feed_forward="gated")
    with pytest.raises(ValueError, match="depth must be from 1 to 1000, found 0"):
        ViTSpec(width=12, depth=0, heads=3)
    fields = TINY.to_json()
    assert ViTSpec.from_json(fields) == TINY
    # As some programs write numbers that happen to be whole.
    assert ViTSpec.from_json(fields | {"interpolate_offset": 0, "norm_epsilon": 0}) == (
        dataclasses.replace(TINY, interpolate_offset=0.0, norm_epsilon=0.0)
    )
    with pytest.raises(
        ValueError, match=r"unknown field 'color'.*missing field 'width'.*depth should be int"
    ):
        ViTSpec.from_json({"color": 1, "depth": "two", "heads": 2})
