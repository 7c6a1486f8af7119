"""Attention of the class token, and the picture of several models."""

from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, photograph
from PIL import Image

from proteus_jax.cli.visualize import main
from proteus_jax.evaluation.reporting import figures
from proteus_jax.evaluation.reporting.figures import GAP, HEADING, foreground_colors
from proteus_jax.evaluation.reporting.visualize import HEIGHT, columns
from proteus_jax.feature_extractor import Model
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.weights.model_dir import load_model


@pytest.mark.parametrize(
    "spec", [TINY, ViTSpec(width=32, depth=1, heads=4, grid=4, registers=2)], ids=["plain", "reg"]
)
def test_attention_written_out(spec: ViTSpec, rng: np.random.Generator) -> None:
    backbone = BackboneFunction(spec)
    params = jax.device_get(jax.jit(backbone.init)(jax.random.key(0)))
    pixels = rng.normal(size=(2, 42, 28, 3)).astype(np.float32)
    found = np.asarray(jax.jit(backbone.class_attention)(params, pixels))
    assert found.shape == (2, spec.heads, 6)
    if spec.depth > 1:
        (before,) = jax.jit(
            lambda params, pixels: backbone.intermediates(
                params, pixels, (spec.depth - 2,), normalize=False
            )
        )(params, pixels)
        tokens = np.concatenate(
            [np.asarray(before.cls)[:, None], before.registers, before.patches], axis=1
        )
        block = jax.tree.map(lambda layers: layers[-1], params["blocks"])
        mean, variance = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
        normal = (tokens - mean) / np.sqrt(variance + spec.norm_epsilon)
        normal = normal * block["norm1"]["scale"] + block["norm1"]["bias"]
        qkv = normal @ block["attn"]["qkv"]["kernel"] + block["attn"]["qkv"]["bias"]
        query, key, _ = np.split(qkv, 3, axis=-1)
        width = spec.width // spec.heads
        for head in range(spec.heads):
            part = slice(head * width, (head + 1) * width)
            scores = np.einsum("bd,btd->bt", query[:, 0, part], key[..., part]) / width**0.5
            weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(found[:, head], weights[:, 1:], rtol=1e-4)
    assert (found.sum(axis=2) < 1).all()


def test_what_is_in_front_has_colors(rng: np.random.Generator) -> None:
    """Two kinds of patches: the ones in the middle are the foreground."""
    inside = np.zeros((6, 6), bool)
    inside[2:4, 1:5] = True
    edge = np.ones((6, 6), bool)
    edge[1:-1, 1:-1] = False
    for sign in (1, -1):
        tokens = [rng.normal(size=(36, 8)) + sign * 20 * inside.reshape(-1, 1) for _ in range(2)]
        for colors in foreground_colors(tokens, [edge.ravel()] * 2):
            assert (colors[~inside.ravel()] == 0).all()
            assert (colors[inside.ravel()].max(axis=1) > 0).all()


def test_the_attention_shown_is_the_mean_of_all_heads(
    tiny_teacher: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, drawn = Model(*load_model(tiny_teacher)), []
    pixels = photograph(rng, 56, 56)
    monkeypatch.setattr(
        figures, "heat_tile", lambda view, weights, grid: drawn.append((weights, grid))
    )
    columns(model, "x", [pixels], 56)
    ((weights, grid),) = drawn
    expected = np.asarray(model.attention(pixels[None]))[0]
    assert grid == [4, 4]
    assert np.abs(expected[0] - expected[1]).max() > 0
    np.testing.assert_allclose(weights, expected.mean(axis=0), rtol=1e-5)


def test_the_command(
    tiny_teacher: Path,
    tmp_path: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [tmp_path / "a b.png", tmp_path / "c.jpg"]
    for path, size in zip(paths, ((40, 80), (60, 50)), strict=True):
        Image.fromarray(photograph(rng, *size)).save(path)
    output = tmp_path / "out.png"
    arguments = [str(tiny_teacher), *map(str, paths), f"--output={output}", "--size=56"]
    assert main([*arguments, f"--beside={tiny_teacher}"]) == 0
    with Image.open(output) as sheet:
        assert sheet.height == HEADING + 2 * (HEIGHT + GAP) - GAP
        assert sheet.width >= 5 * 2 * HEIGHT
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    output.unlink()
    wrong = [str(tiny_teacher), str(tmp_path / "broken.png"), "none.png", f"--output={output}"]
    assert main([*wrong, "--beside=/no/model"]) == 2
    said = capsys.readouterr().err
    assert "broken.png" in said
    assert "none.png: No such file" in said
    assert "/no/model" in said
    assert not output.exists()
    assert main([*arguments[:-1], "--size=3"]) == 2
    elsewhere = [argument for argument in arguments if not argument.startswith("--output")]
    assert main([*elsewhere, f"--output={tmp_path}"]) == 2
    assert main([*elsewhere, f"--output={paths[0]}/x.png"]) == 2
    assert "is a directory" in capsys.readouterr().err
    assert Model(*load_model(tiny_teacher)).spec == TINY
