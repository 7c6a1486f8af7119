"""Every family of teachers: read from the directory its library writes, equal to that library's own
arithmetic, and written back bit for bit.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from small import PLAIN, TIMM, of_spec

from proteus_jax.errors import InputError
from proteus_jax.models.config import CLIP as CLIP_CHOICES
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.normalization import CLIP, HALF, IMAGENET, Normalization
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert import name_maps
from proteus_jax.weights.convert.detection import detect_architecture
from proteus_jax.weights.convert.families import FAMILIES
from proteus_jax.weights.convert.hf_directory import INDICES, read_directory
from proteus_jax.weights.convert.import_weights import import_weights, read_model
from proteus_jax.weights.convert.parity import compare, our_outputs
from proteus_jax.weights.convert.selection import find_prefix
from proteus_jax.weights.convert.torch_reference import run_transformers, transformers_outputs
from proteus_jax.weights.model_dir import load_model

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
    "intermediate_size": 128,
}
# transformers' class of each family, what is set there, the family found, and its statistics.
RELEASED = {
    "dinov2": ("Dinov2", {"use_swiglu_ffn": False}, "dinov2", IMAGENET),
    "dinov2 swiglu": ("Dinov2", {"use_swiglu_ffn": True}, "dinov2", IMAGENET),
    "dinov2 registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}, "dinov2", IMAGENET),
    "clip": ("CLIPVision", {"hidden_act": "quick_gelu"}, "clip", CLIP),
    "openclip": ("CLIPVision", {"hidden_act": "gelu"}, "openclip", CLIP),
    "siglip": ("SiglipVision", {"intermediate_size": 88}, "siglip", HALF),
    "dinov3": ("DINOv3ViT", {"num_register_tokens": 4}, "dinov3", IMAGENET),
    "plain": ("ViT", {}, "timm", IMAGENET),
}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (2, 32, 32, 3)).astype(np.float32)


def saved(kind: str, changes: dict[str, Any], folder: Path) -> Any:
    """A model of transformers with weights as large as trained ones, in its own directory."""
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", RELEASED)
def test_equal_to_transformers(name: str, tmp_path: Path, pixels: np.ndarray) -> None:
    kind, changes, family, normalization = RELEASED[name]
    model = saved(kind, changes, tmp_path / "theirs")
    card = import_weights(tmp_path / "theirs", tmp_path / "ours")
    assert card.family == family
    assert card.normalization == normalization
    params, card = load_model(tmp_path / "ours")
    found = list(
        compare(our_outputs(params, card.spec, pixels), run_transformers(model, card.spec, pixels))
    )
    assert [comparison.name for comparison in found] == [
        *("block 0", "block 1", "class token", "patches")
    ]
    for comparison in found:
        assert comparison.passed, comparison
        assert comparison.cosine > 1 - 1e-6
    # And so are the arrays that come of the canonical ones, bit for bit.
    again, _ = read_model(tmp_path / "theirs")
    theirs = read_directory(tmp_path / "theirs").weights.arrays
    back = again.layout.from_canonical(again.arrays, key_bias=card.spec.key_bias)
    expected = {n: a for n, a in theirs.items() if a.size and n not in again.ignored_keys}
    assert back.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(back[key], array, strict=True)
    # What verify compares with is the same model made anew from our arrays.
    for comparison in compare(
        our_outputs(params, card.spec, pixels),
        transformers_outputs(card.family, card.spec, again.arrays, pixels),
    ):
        assert comparison.passed, comparison


@pytest.mark.parametrize(
    ("kind", "family", "activation"),
    [("Siglip", "siglip", "gelu_tanh"), ("CLIP", "clip", "quick_gelu")],
)
def test_the_visual_tower_of_a_whole_model(
    kind: str, family: str, activation: str, tmp_path: Path
) -> None:
    """Its config.json says of the tower only what differs from the default, as on the hub."""
    pytest.importorskip("torch", reason="needs requirements-parity.txt")
    transformers = pytest.importorskip("transformers")
    text = {name: SIZES[name] for name in SIZES if name not in ("patch_size", "image_size")}
    text |= {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(vision_config=SIZES, text_config=text)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    settings = json.loads(file.read_text())
    settings["vision_config"] = {
        "model_type": settings["vision_config"]["model_type"],
        "num_attention_heads": 2,
    }
    file.write_text(json.dumps(settings))
    found, facts = read_model(tmp_path / "theirs")
    assert (found.family, found.spec.activation) == (family, activation)
    assert facts["prefix"] == "vision_model."


def test_average_pooling(tmp_path: Path, pixels: np.ndarray) -> None:
    """timm's: the mean of the patches, then the only norm. Compared with transformers' ViT, whose
    norm is applied to that mean.
    """
    pytest.importorskip("torch", reason="needs requirements-parity.txt")
    spec = dataclasses.replace(TIMM, pooling="mean", final_norm="class")
    arrays = of_spec(spec)
    del arrays["mask_token"]
    theirs = name_maps.TIMM_MEAN.from_canonical(arrays)
    assert "fc_norm.weight" in theirs
    theirs["head.weight"] = np.zeros((10, 32), np.float32)
    safetensors.numpy.save_file(theirs, tmp_path / "w.safetensors")
    card = import_weights(tmp_path / "w.safetensors", tmp_path / "model", heads=2)
    assert card.spec == spec
    assert card.source["left_out"] == ["head.weight"]
    params, _ = load_model(tmp_path / "model")
    expected = transformers_outputs("timm", spec, arrays, pixels)
    for comparison in compare(our_outputs(params, spec, pixels), expected):
        assert comparison.passed, comparison


def test_layer_scale_without_a_class_position(tmp_path: Path, pixels: np.ndarray) -> None:
    """DeiT III, as timm has it."""
    pytest.importorskip("torch", reason="needs requirements-parity.txt")
    spec = dataclasses.replace(TIMM, layer_scale=True, class_position=False)
    arrays = of_spec(spec)
    del arrays["mask_token"]
    np.savez(tmp_path / "w.npz", **arrays)
    card = import_weights(tmp_path / "w.npz", tmp_path / "model", heads=2)
    assert (card.family, card.spec) == ("timm", spec)
    params, _ = load_model(tmp_path / "model")
    expected = transformers_outputs("timm", spec, arrays, pixels)
    for comparison in compare(our_outputs(params, spec, pixels), expected):
        assert comparison.passed, comparison


def test_synclrs_prefix_tells_the_family(tmp_path: Path) -> None:
    arrays = of_spec(PLAIN)
    del arrays["mask_token"]
    theirs: dict[str, Any] = {f"module.visual.{n}": array for n, array in arrays.items()}
    theirs["module.text.token"] = np.zeros(3, np.float32)
    np.savez(tmp_path / "w.npz", **theirs)
    card = import_weights(tmp_path / "w.npz", tmp_path / "model", heads=2)
    assert (card.family, card.spec, card.normalization) == ("synclr", PLAIN, CLIP)
    assert card.source["prefix"] == "module.visual."
    # Without the prefix it could as well be timm's.
    np.savez(tmp_path / "plain.npz", **arrays)
    with pytest.raises(InputError, match=r"give --family synclr .*--family timm"):
        import_weights(tmp_path / "plain.npz", tmp_path / "other", heads=2)
    for family in ("synclr", "timm"):
        found, _ = read_model(tmp_path / "plain.npz", family=family, heads=2)
        assert found.family == family
    with pytest.raises(InputError, match="those of synclr or timm, not of the family clip"):
        read_model(tmp_path / "plain.npz", family="clip", heads=2)


def test_wrappers_of_training_code(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    arrays = {
        f"module.visual.{name}": torch.from_numpy(value) for name, value in of_spec(PLAIN).items()
    }
    for wrapper in ("state_dict", "model"):
        torch.save({wrapper: arrays, "epoch": 3}, tmp_path / "w.pth")
        found, _ = read_model(tmp_path / "w.pth", heads=2)
        assert found.spec == PLAIN


def test_openclips_file_asks_for_the_activation(tmp_path: Path) -> None:
    """A whole model in OpenAI's names: only the visual tower is read, its projection left out."""
    spec = ViTSpec(width=32, depth=1, heads=2, patch_size=8, grid=4, **CLIP_CHOICES)
    arrays = of_spec(spec)
    del arrays["mask_token"]
    theirs = {f"visual.{n}": a for n, a in name_maps.CLIP.from_canonical(arrays).items()}
    assert theirs["visual.class_embedding"].shape == (32,)
    assert theirs["visual.positional_embedding"].shape == (17, 32)
    theirs |= {"visual.proj": np.zeros((32, 8), np.float32), "logit_scale": np.ones(1, np.float32)}
    theirs["transformer.resblocks.0.ln_1.weight"] = np.ones(8, np.float32)
    safetensors.numpy.save_file(theirs, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"--family clip .*QuickGELU.*--family openclip"):
        read_model(tmp_path / "w.safetensors", heads=2)
    for family, activation in (("clip", "quick_gelu"), ("openclip", "gelu")):
        found, facts = read_model(tmp_path / "w.safetensors", family=family, heads=2)
        assert found.spec == dataclasses.replace(spec, activation=activation)
        assert found.ignored_keys == ("proj",)
        assert facts["prefix"] == "visual."


def test_dinov3_in_its_own_names() -> None:
    spec = ViTSpec(
        width=32, depth=2, heads=2, patch_size=16, grid=14, positions="rotary", registers=4,
        norm_epsilon=1e-5, key_bias=False, interpolate_offset=0.0, interpolate_antialias=True,
    )  # fmt: skip
    theirs = name_maps.DINOV3.from_canonical(of_spec(spec))
    theirs["rope_embed.periods"] = np.ones(4, np.float32)
    theirs["blocks.0.attn.qkv.bias_mask"] = np.ones(96, np.float32)
    found = detect_architecture(theirs, heads=2)
    assert found.family == "dinov3"
    assert found.spec == spec
    assert found.ignored_keys == ("rope_embed.periods", "blocks.0.attn.qkv.bias_mask")


def test_a_directory_of_several_files(tmp_path: Path) -> None:
    arrays = name_maps.HF_DINOV2.from_canonical(
        of_spec(ViTSpec(width=64, depth=1, heads=1, grid=3))
    )
    names = sorted(arrays)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        safetensors.numpy.save_file({name: arrays[name] for name in own}, tmp_path / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / next(iter(INDICES))).write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "num_attention_heads": 1}')
    found, facts = read_model(tmp_path)
    assert found.spec.width == 64
    assert sorted(facts["sha256"]) == ["a.safetensors", "b.safetensors"]
    (tmp_path / "b.safetensors").rename(tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=r"b\.safetensors: a part of the model, and missing"):
        read_model(tmp_path)
    for outside in ("../b.safetensors", "/etc/passwd"):
        text = json.dumps({"weight_map": {"x": outside}})
        (tmp_path / next(iter(INDICES))).write_text(text)
        with pytest.raises(InputError, match=r"refused: .* points outside the folder"):
            read_model(tmp_path)


def test_links_stay_in_their_folder(tmp_path: Path) -> None:
    """But for Hugging Face's cache, which keeps the files beside the snapshots."""
    arrays = name_maps.HF_DINOV2.from_canonical(
        of_spec(ViTSpec(width=64, depth=1, heads=1, grid=3))
    )
    snapshot = tmp_path / "models--me" / "snapshots" / "abc"
    (tmp_path / "models--me" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob = tmp_path / "models--me" / "blobs" / "0123"
    safetensors.numpy.save_file(arrays, blob)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(blob)
    assert read_model(snapshot)[0].spec.width == 64
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    (elsewhere / "model.safetensors").symlink_to(blob)
    with pytest.raises(InputError, match="refused: a link that points outside the folder"):
        read_model(elsewhere)


def test_models_of_more_than_ten_blocks(tmp_path: Path) -> None:
    """Block by block in its place, in every library's names, whichever order a file has."""
    spec = ViTSpec(width=8, depth=13, heads=2, patch_size=2, grid=2)
    arrays = of_spec(spec)
    assert state_dict.infer_spec(arrays, 2).depth == 13
    params = state_dict.to_params(arrays, spec)
    for number in range(13):
        expected = arrays[f"blocks.{number}.mlp.fc1.bias"]
        np.testing.assert_array_equal(params["blocks"]["mlp"]["fc1"]["bias"][number], expected)
    for layout in (name_maps.HF_DINOV2, name_maps.DINOV2, name_maps.TIMM):
        theirs = layout.from_canonical(arrays)
        turned = {name: theirs[name] for name in sorted(theirs, reverse=True)}
        again = layout.to_canonical(turned)
        assert again.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_what_a_timm_directory_says(tmp_path: Path) -> None:
    """Its statistics, and a pooling by the mean of normalized tokens."""
    arrays = of_spec(TIMM)
    del arrays["mask_token"]
    folder = tmp_path / "timm"
    folder.mkdir()
    safetensors.numpy.save_file(
        name_maps.SYNCLR.from_canonical(arrays), folder / "model.safetensors"
    )
    settings: dict[str, Any] = {"architecture": "vit_small_patch16_224", "global_pool": "avg"}
    settings["pretrained_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "config.json").write_text(json.dumps(settings))
    found, _ = read_model(folder, heads=2)
    assert (found.family, found.spec.pooling, found.spec.final_norm) == ("timm", "mean", "tokens")
    assert found.normalization == Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    # What a person says of the family counts for more than what the directory does.
    assert read_model(folder, family="synclr", heads=2)[0].family == "synclr"
    settings["global_pool"] = "token"
    (folder / "config.json").write_text(json.dumps(settings))
    assert read_model(folder, heads=2)[0].spec.pooling == "token"


@pytest.mark.parametrize(
    ("model", "family", "activation"),
    [
        ({}, "openclip", "gelu"),
        ({"quick_gelu": False}, "openclip", "gelu"),
        ({"quick_gelu": True}, "clip", "quick_gelu"),
    ],
)
def test_what_an_openclip_directory_says(
    model: dict[str, Any], family: str, activation: str, tmp_path: Path
) -> None:
    spec = ViTSpec(width=32, depth=1, heads=2, patch_size=8, grid=4, **CLIP_CHOICES)
    arrays = of_spec(spec)
    del arrays["mask_token"]
    theirs = {f"visual.{name}": a for name, a in name_maps.CLIP.from_canonical(arrays).items()}
    # As older files have them: integers below a prefix, and a number without axes.
    theirs |= {"visual.embeddings.position_ids": np.arange(5), "logit_scale": np.float32(1.5)}
    folder = tmp_path / "openclip"
    folder.mkdir()
    safetensors.numpy.save_file(
        {name: np.asarray(array) for name, array in theirs.items()},
        folder / "open_clip_model.safetensors",
    )
    settings = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    found, _ = read_model(folder, heads=2)
    assert (found.family, found.spec.activation) == (family, activation)
    assert found.normalization == Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_a_dinov3_of_another_base_is_refused(tmp_path: Path) -> None:
    spec = ViTSpec(
        width=32, depth=1, heads=2, patch_size=16, grid=14, positions="rotary", registers=4,
        norm_epsilon=1e-5, key_bias=False, interpolate_offset=0.0, interpolate_antialias=True,
    )  # fmt: skip
    theirs = name_maps.HF_DINOV3.from_canonical(of_spec(spec), key_bias=False)
    settings = {"model_type": "dinov3_vit", "image_size": 224, "patch_size": 16}
    settings |= {"num_attention_heads": 2}
    folder = tmp_path / "dinov3"
    folder.mkdir()
    safetensors.numpy.save_file(theirs, folder / "model.safetensors")
    for base, fits in ((100.0, True), (10000.0, False)):
        (folder / "config.json").write_text(json.dumps(settings | {"rope_theta": base}))
        if fits:
            assert read_model(folder)[0].spec == spec
            continue
        with pytest.raises(InputError, match=r"expected rope_theta to be 100, found 10000\.0"):
            read_model(folder)


def test_a_clip_that_leaves_its_activation_out() -> None:
    """transformers' files do not say what is its default, QuickGELU."""
    spec = ViTSpec(width=32, depth=1, heads=2, patch_size=8, grid=4, **CLIP_CHOICES)
    arrays = of_spec(spec)
    del arrays["mask_token"]
    theirs = name_maps.HF_CLIP.from_canonical(arrays)
    settings: dict[str, Any] = {"model_type": "clip_vision_model", "num_attention_heads": 2}
    for activation, family in ((None, "clip"), ("quick_gelu", "clip"), ("gelu", "openclip")):
        said = settings | ({} if activation is None else {"hidden_act": activation})
        found = detect_architecture(theirs, said)
        assert (found.family, found.spec.activation) == (family, activation or "quick_gelu")


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a model directory: it has no config\.json"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="expected an object, found list"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"expected one of model\.safetensors"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "proteus_jax model 1"}')
    with pytest.raises(InputError, match="a model directory already"):
        read_model(tmp_path)
    with pytest.raises(InputError, match="not a ViT: none of its 1 names"):
        find_prefix(["a"])
    with pytest.raises(InputError, match=r"--key student \(student\.backbone\.\), --key teacher"):
        find_prefix([f"{who}.backbone.patch_embed.proj.weight" for who in ("teacher", "student")])
    with pytest.raises(InputError, match=r"naflex"):
        detect_architecture({"embeddings.patch_embedding.weight": np.zeros((8, 12), np.float32)})
    assert set(FAMILIES) == {"dinov2", "dinov3", "synclr", "clip", "openclip", "siglip", "timm"}


def directory_of(tmp_path: Path, settings: dict[str, Any], **beside: Any) -> Path:
    arrays = name_maps.HF_DINOV2.from_canonical(
        of_spec(ViTSpec(width=64, depth=1, heads=1, grid=3))
    )
    folder = tmp_path / "hf"
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("settings", "beside", "complaint"),
    [
        ({"num_attention_heads": True}, {}, "expected num_attention_heads to be a whole number"),
        ({"num_attention_heads": "2"}, {}, "expected num_attention_heads to be a whole number"),
        ({"layer_norm_eps": None}, {}, "expected layer_norm_eps to be a number"),
        ({"layer_norm_eps": float("nan")}, {}, "expected layer_norm_eps to be a number"),
        ({"hidden_act": "relu"}, {}, "expected hidden_act to be one of"),
        (
            {},
            {"preprocessor_config": {"image_mean": ["a"] * 3, "image_std": [1, 1, 1]}},
            "three means and three deviations",
        ),
        (
            {},
            {"preprocessor_config": {"image_mean": [0, 0, 0], "image_std": [1, float("nan"), 1]}},
            "three means and three deviations",
        ),
    ],
)
def test_settings_that_make_no_sense(
    settings: dict, beside: dict, complaint: str, tmp_path: Path
) -> None:
    folder = directory_of(tmp_path, settings, **beside)
    with pytest.raises(InputError, match=complaint):
        import_weights(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_arrays_that_are_of_no_vit(tmp_path: Path) -> None:
    """What is absent never passes for another kind of model, nor what has another shape."""
    spec = ViTSpec(width=32, depth=2, heads=2, patch_size=8, grid=4)

    def said(**changes: Any) -> str:
        arrays = {name: a for name, a in (of_spec(spec) | changes).items() if a is not None}
        np.savez(tmp_path / "w.npz", **arrays)
        with pytest.raises(InputError) as caught:
            import_weights(tmp_path / "w.npz", tmp_path / "model", heads=2)
        assert not (tmp_path / "model").exists()
        assert len(caught.value.problems) <= 21
        return str(caught.value)

    nothing = np.zeros(0, np.float32)
    assert "it has no position table" in said(pos_embed=None)
    assert "pos_embed should be" in said(pos_embed=nothing)
    assert "it has no patch bias" in said(**{"patch_embed.proj.bias": None})
    assert "misshapen: patch_embed.proj.bias" in said(**{"patch_embed.proj.bias": nothing})
    turned = np.zeros((32, 8, 3, 8), np.float32)
    assert "misshapen: patch_embed.proj.weight" in said(**{"patch_embed.proj.weight": turned})
    far = {"blocks.9.norm1.weight": np.ones(32, np.float32)}
    assert "it has blocks.9 and no blocks.2" in said(**far)
    assert "unexpected: blocks.2000000.norm1.weight" in said(
        **{"blocks.2000000.norm1.weight": np.ones(32, np.float32)}
    )
    assert "register_tokens should be" in said(register_tokens=np.ones(4, np.float32))
