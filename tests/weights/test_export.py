"""Every format, written, loaded back with its own library, and equal; and read in again bit for
bit.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import safetensors.numpy
from small import TIMM, of_spec, reference

from proteus_jax.cli import convert
from proteus_jax.data import decode
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.errors import InputError
from proteus_jax.models.config import CLIP, SYNCLR, ViTSpec
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert import export_formats, export_weights
from proteus_jax.weights.convert.export_formats import FORMATS, Settings
from proteus_jax.weights.convert.export_weights import export
from proteus_jax.weights.convert.import_weights import import_weights
from proteus_jax.weights.convert.parity import compare
from proteus_jax.weights.model_dir import ModelCard, load_card, load_model, save_model

SMALL: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "grid": 4}
_WITHOUT: dict[str, Any] = {"interpolate_offset": 0.0, "interpolate_antialias": False}
MODELS: dict[str, tuple[str, ViTSpec]] = {
    "dinov2": ("dinov2", ViTSpec(**SMALL)),
    "swiglu": ("dinov2", ViTSpec(**SMALL, feed_forward="swiglu")),
    "registers": (
        "dinov2",
        ViTSpec(**SMALL, registers=3, interpolate_offset=0.0, interpolate_antialias=True),
    ),
    "clip": ("clip", ViTSpec(**SMALL, **CLIP)),
    "synclr": ("synclr", ViTSpec(**SMALL, **SYNCLR)),
    "plain": ("timm", TIMM),
    "mean": ("timm", dataclasses.replace(TIMM, pooling="mean", final_norm="class")),
    "siglip": (
        "siglip",
        ViTSpec(
            **SMALL, **_WITHOUT, inner=88, activation="gelu_tanh", layer_scale=False,
            class_token=False, pooling="attention",
        ),
    ),
    "dinov3": (
        "dinov3",
        ViTSpec(
            **SMALL, registers=4, positions="rotary", norm_epsilon=1e-5, key_bias=False,
            interpolate_offset=0.0, interpolate_antialias=True,
        ),
    ),
}  # fmt: skip
# Which formats have a place for which models.
PLACES = {
    "safetensors": set(MODELS),
    "onnx": set(MODELS),
    "stablehlo": set(MODELS),
    "huggingface": set(MODELS) - {"mean"},
    "dinov2": {"dinov2", "swiglu", "registers"},
    "timm": {"dinov2", "swiglu", "registers", "plain", "mean", "synclr"},
    "clip": {"clip"},
    "synclr": {"synclr", "plain"},
}
NEEDS = {"onnx": "onnxruntime", "dinov2": "torch", "huggingface": "torch"}
NEEDS |= {"clip": "torch", "synclr": "torch"}
PAIRS = [(format, name) for format, names in PLACES.items() for name in sorted(names)]


def photographs(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, (family, spec) in MODELS.items():
        arrays = of_spec(spec)
        if not spec.key_bias:
            for key in arrays:
                if key.endswith("attn.qkv.bias"):
                    arrays[key][spec.width : 2 * spec.width] = 0
        absent = () if family in ("dinov2", "dinov3", "synclr") else ("mask_token",)
        if absent:
            arrays["mask_token"] = np.zeros_like(arrays["mask_token"])
        params = state_dict.to_params(arrays, spec)
        card = ModelCard(spec=spec, family=family, absent=absent, license="mine")
        save_model(folder / name, params, card)
    return folder


def output_of(format: str, folder: Path) -> Path:
    return folder / f"out{(FORMATS[format].suffixes or ('',))[0]}"


@pytest.mark.parametrize(("format", "name"), PAIRS)
def test_loaded_back_and_equal(format: str, name: str, models: Path, tmp_path: Path) -> None:
    if format in NEEDS:
        pytest.importorskip(NEEDS[format], reason="needs requirements-parity.txt")
    output = output_of(format, tmp_path)
    found = export(models / name, format, output, photographs)
    assert {"class token", "patches"} <= {one.name for one in found}
    assert all(one.largest <= export_weights.TOLERANCE for one in found)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    if format in export_formats.PROGRAMS:
        return
    # Import and export of the same file is the identity.
    family, spec = MODELS[name]
    card = import_weights(output, tmp_path / "again", family=None if format == "safetensors" else
                          {"plain": "timm"}.get(name, family), heads=spec.heads)  # fmt: skip
    if format == "safetensors":
        assert (card.spec, card.family, card.license) == (spec, family, "mine")
    again = output.with_name(f"again-{output.name}")
    if format == "synclr" and name == "plain":
        return
    export(tmp_path / "again", format, again, photographs)
    for one, other in zip(_arrays(output), _arrays(again), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def _arrays(path: Path) -> list[np.ndarray]:
    from proteus_jax.weights.convert.readers import read_weights

    file = path / "model.safetensors" if path.is_dir() else path
    return [array for _, array in sorted(read_weights(file).arrays.items())]


def test_timms_names_and_shapes(models: Path, tmp_path: Path) -> None:
    """Those of vit_*_patch14_reg4_dinov2 and of vit_giant_patch14_dinov2, as timm 1.0 has them: the
    table has no class entry where there are registers, a gated layer is one fc1.
    """

    def block(hidden: int, out: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "attn.qkv.weight": (96, 32), "attn.qkv.bias": (96,), "attn.proj.weight": (32, 32),
            "attn.proj.bias": (32,), "mlp.fc1.weight": (hidden, 32), "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (32, out), "mlp.fc2.bias": (32,),
        }  # fmt: skip
        names = (
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
            "ls1.gamma",
            "ls2.gamma",
        )
        return shapes | dict.fromkeys(names, (32,))

    common: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 32), "patch_embed.proj.weight": (32, 3, 8, 8),
        "patch_embed.proj.bias": (32,), "norm.weight": (32,), "norm.bias": (32,),
    }  # fmt: skip
    for name, own, hidden, out in (
        ("registers", {"pos_embed": (1, 16, 32), "reg_token": (1, 3, 32)}, 128, 128),
        ("swiglu", {"pos_embed": (1, 17, 32)}, 176, 88),
    ):
        export(models / name, "timm", tmp_path / f"{name}.safetensors", photographs)
        found = safetensors.numpy.load_file(tmp_path / f"{name}.safetensors")
        expected = common | own
        for layer in range(2):
            inside = block(hidden, out).items()
            expected |= {f"blocks.{layer}.{key}": shape for key, shape in inside}
        assert {key: array.shape for key, array in found.items()} == expected
    arrays = state_dict.from_params(load_model(models / "registers")[0], MODELS["registers"][1])
    found = safetensors.numpy.load_file(tmp_path / "registers.safetensors")
    # The class token's position has nowhere else to be.
    cls = arrays["cls_token"] + arrays["pos_embed"][:, :1]
    np.testing.assert_allclose(found["cls_token"], cls, rtol=1e-6)
    np.testing.assert_array_equal(found["pos_embed"], arrays["pos_embed"][:, 1:])


@pytest.mark.parametrize("format", ["dinov2", "timm", "clip", "synclr", "huggingface"])
def test_what_a_format_cannot_hold(format: str, models: Path, tmp_path: Path) -> None:
    for name in set(MODELS) - PLACES[format]:
        output = output_of(format, tmp_path)
        with pytest.raises(InputError):
            export(models / name, format, output, photographs)
        assert list(tmp_path.iterdir()) == []


def test_an_export_that_differs_is_not_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_weights, "TOLERANCE", -1.0)
    with pytest.raises(InputError, match=r"not written: loaded back, its .* is .* deviations off"):
        export(models / "dinov2", "stablehlo", tmp_path / "m.stablehlo", photographs)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(InputError, match="exists already"):
        export(models / "dinov2", "safetensors", tmp_path / "m.safetensors", photographs)
    with pytest.raises(InputError, match=r"expected a name that ends in \.onnx"):
        export(models / "dinov2", "onnx", tmp_path / "m.pth", photographs)


def test_an_export_whose_outputs_are_no_numbers_is_not_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single NaN among what is loaded back, in the class token or in one patch."""
    own = FORMATS["safetensors"]

    def spoilt(name: str):
        def outputs(*arguments: Any) -> dict[str, np.ndarray]:
            found = {key: np.array(each) for key, each in own.outputs(*arguments).items()}
            found[name].flat[-1] = np.nan
            return found

        return outputs

    for name in ("class token", "patches"):
        changed = own._replace(outputs=spoilt(name))
        monkeypatch.setitem(FORMATS, "safetensors", changed)
        with pytest.raises(InputError, match=f"not written: loaded back, its {name} is nan"):
            export(models / "dinov2", "safetensors", tmp_path / "m.safetensors", photographs)
        assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_a_little_off_is_not_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a thousandth of a deviation, in one direction or the other."""
    own = FORMATS["safetensors"]
    for shift in (1e-3, -1e-3):

        def moved(*arguments: Any, shift: float = shift) -> dict[str, np.ndarray]:
            found = own.outputs(*arguments)
            return {key: np.asarray(each) + shift * np.std(each) for key, each in found.items()}

        monkeypatch.setitem(FORMATS, "safetensors", own._replace(outputs=moved))
        with pytest.raises(
            InputError, match=r"1\.0e-03 standard deviations off, more than 0\.0001"
        ):
            export(models / "dinov2", "safetensors", tmp_path / "m.safetensors", photographs)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_no_numbers_verify_nothing() -> None:
    """Nor such as are too small everywhere."""
    right = {"class token": np.linspace(-1.0, 1.0, 8).reshape(2, 4)}
    assert all(one.passed for one in compare(right, right))
    for wrong in (np.full((2, 4), np.nan), right["class token"] - 0.1, right["class token"] + 0.1):
        for one, other in (({"class token": wrong}, right), (right, {"class token": wrong})):
            assert not any(each.passed for each in compare(one, other))


def test_what_transformers_is_told_of_images(models: Path, tmp_path: Path) -> None:
    export(models / "dinov2", "huggingface", tmp_path / "hf", photographs, check=False)
    found = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert found["image_mean"] == [0.485, 0.456, 0.406]
    assert found["image_std"] == [0.229, 0.224, 0.225]
    assert (found["crop_size"], found["size"]) == (
        {"height": 32, "width": 32},
        {"shortest_edge": 37},
    )
    assert found["rescale_factor"] == pytest.approx(1 / 255)


def test_registers_come_out_of_an_exported_graph(models: Path, tmp_path: Path) -> None:
    """Equal to the model's own, by the graph's reference implementation."""
    from onnx.reference import ReferenceEvaluator

    export(models / "registers", "onnx", tmp_path / "m.onnx", photographs, check=False)
    params, card = load_model(models / "registers")
    params = jax.tree.map(jnp.asarray, params)
    pixels = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    expected = BackboneFunction(card.spec)(params, jnp.asarray(pixels))
    graph = ReferenceEvaluator(str(tmp_path / "m.onnx"))
    names = ["class_token", "patch_tokens", "registers"]
    found = graph.run(names, {"pixel_values": pixels.transpose(0, 3, 1, 2)})
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), other, atol=2e-4)


@pytest.mark.parametrize("name", ["registers", "dinov2", "dinov3"])
@pytest.mark.parametrize("format", ["onnx", "stablehlo"])
def test_programs_of_images_that_are_no_squares(
    format: str, name: str, models: Path, tmp_path: Path
) -> None:
    """Two rows of patches and five columns, with a table resized to them, or rotated so."""
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="needs requirements-parity.txt")
    patch = MODELS[name][1].patch_size
    output = output_of(format, tmp_path)
    settings = Settings(sides=(2 * patch, 5 * patch))
    found = export(models / name, format, output, photographs, settings)
    assert all(one.largest <= export_weights.TOLERANCE for one in found)


def test_a_size_is_baked_into_what_transformers_reads(models: Path, tmp_path: Path) -> None:
    """transformers resizes a table in another way: that of the size it is written for is exact."""
    pytest.importorskip("torch", reason="needs requirements-parity.txt")
    patch = MODELS["dinov2"][1].patch_size
    output, side = tmp_path / "hf", 7 * patch
    found = export(
        models / "dinov2", "huggingface", output, photographs, Settings(sides=(side, side))
    )
    assert all(one.largest <= export_weights.TOLERANCE for one in found)
    assert json.loads((output / "config.json").read_text())["image_size"] == side
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"Images are {side} x {side} px" in card
    assert "AutoModel.from_pretrained" in card
    with pytest.raises(InputError, match="transformers' tables are squares"):
        export(
            models / "dinov2", "huggingface", tmp_path / "x", photographs,
            Settings(sides=(patch, side)),
        )  # fmt: skip


def test_programs_of_several_sizes_and_batches(models: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs requirements-parity.txt")
    folder = tmp_path / "photographs"
    folder.mkdir()
    from PIL import Image

    Image.fromarray(photographs(60, 60)[0]).save(folder / "a.png")
    command = ["export", str(models / "registers"), "--images", str(folder), "--format"]
    onnx_file = str(tmp_path / "m.onnx")
    sizes = ["--size", "32", "56"]
    assert convert.main([*command, "onnx", "--output", onnx_file, *sizes]) == 0
    for side in (32, 56):
        file = tmp_path / f"m-{side}.onnx"
        for batch in (1, 3):
            session = runtime.InferenceSession(file)
            pixels = np.zeros((batch, 3, side, side), np.float32)
            tokens = session.run(["registers"], {"pixel_values": pixels})[0]
            assert tokens.shape == (batch, 3, 32)
        facts = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
        assert json.loads(facts["normalisation"])["mean"][0] == pytest.approx(0.485)
        assert facts["licence"] == "mine"
    program = str(tmp_path / "m.stablehlo")
    fixed = ["--batch", "4", "--output", program]
    assert convert.main([*command, "stablehlo", *fixed]) == 0
    exported = jax.export.deserialize(bytearray(Path(program).read_bytes()))
    assert exported.in_avals[0].shape == (4, 32, 32, 3)
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    for wrong in (["--size", "33"], ["--batch", "0"]):
        output = ["--output", str(tmp_path / "n.onnx")]
        assert convert.main([*command, "onnx", *output, *wrong]) == 2
    assert not (tmp_path / "n.onnx").exists()
    output = ["--output", str(tmp_path / "n.safetensors"), "--size", "32"]
    assert convert.main([*command, "safetensors", *output]) == 2


@pytest.mark.parametrize(
    ("format", "name"), {format: (format, name) for format, name in PAIRS}.values()
)
def test_without_a_check_no_other_library_is_needed(
    format: str,
    name: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for library in ("torch", "transformers", "onnxruntime", "timm"):
        monkeypatch.setitem(sys.modules, library, None)
    output = output_of(format, tmp_path)
    command = ["export", str(models / name), "--format", format, "--output", str(output)]
    assert convert.main([*command, "--no-check"]) == 0
    assert "not loaded back" in capsys.readouterr().out
    if format in export_formats.PROGRAMS:
        assert output.stat().st_size > 10_000
        return
    family, spec = MODELS[name]
    family = None if format == "safetensors" else {"plain": "timm"}.get(name, family)
    import_weights(output, tmp_path / "again", family=family, heads=spec.heads)
    before, after = (load_model(folder)[0] for folder in (models / name, tmp_path / "again"))
    after["mask_token"] = before["mask_token"]
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_verify_is_kept_in_the_card(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With outputs that other code stored; a difference is only kept where that is forced."""
    params, card = load_model(models / "synclr")
    save_model(tmp_path / "m", params, card)
    from proteus_jax.weights.convert.parity import _golden_outputs

    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    outputs: dict[str, Any] = _golden_outputs(params, card.spec, pixels)
    np.savez(tmp_path / "g.npz", image=pixels, **outputs)
    command = ["verify", str(tmp_path / "m"), "--golden", str(tmp_path / "g.npz")]
    assert convert.main(command) == 0
    assert load_card(tmp_path / "m").verified["passed"] is True
    outputs["out/cls"] = outputs["out/cls"] + 0.01
    np.savez(tmp_path / "g.npz", image=pixels, **outputs)
    assert convert.main(command) == 1
    assert load_card(tmp_path / "m").verified["passed"] is True
    assert convert.main([*command, "--force"]) == 0
    verified = load_card(tmp_path / "m").verified
    assert verified["passed"] is False
    # Of all outputs, the one that is furthest off.
    assert verified["largest"] > 1e-3
    assert "FAIL out/cls" in capsys.readouterr().out
    assert convert.main(command[:2]) == 2
    (tmp_path / "g.npz").write_bytes(b"x")
    assert convert.main(command) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "format", ["safetensors", "dinov2", "timm", "huggingface", "onnx", "stablehlo"]
)
def test_trained_weights(format: str, tmp_path: Path) -> None:
    """The ViT-S with trained weights, on a photograph of its own size."""
    pytest.importorskip("torch", reason="needs requirements-parity.txt")
    weights = reference("teachers", "dinov2_vits14.pth")
    photograph = reference("images", "chelsea.jpg")
    import_weights(weights, tmp_path / "model")

    def photographs(height: int, width: int) -> np.ndarray:
        return CenterCrop(height, width)(decode.open_image(photograph.read_bytes()))[None]

    output = output_of(format, tmp_path)
    found = export(tmp_path / "model", format, output, photographs)
    assert max(one.largest for one in found) <= export_weights.TOLERANCE
    if format == "dinov2":
        import torch

        theirs, ours = (torch.load(path, weights_only=True) for path in (weights, output))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
