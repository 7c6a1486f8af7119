import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import safetensors.numpy
from conftest import TINY
from small import official

from proteus_jax.cli import convert
from proteus_jax.errors import InputError
from proteus_jax.feature_extractor import Model
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.models.normalization import CLIP, HALF
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert import name_maps
from proteus_jax.weights.convert.import_weights import import_weights
from proteus_jax.weights.convert.readers import read_weights
from proteus_jax.weights.model_dir import ModelCard, load_card, load_model, save_model

SPECS = {
    "mlp": TINY,
    "swiglu": ViTSpec(width=64, depth=2, heads=1, grid=3, feed_forward="swiglu"),
    "registers": ViTSpec(
        width=64,
        depth=1,
        heads=1,
        grid=3,
        registers=4,
        interpolate_offset=0.0,
        interpolate_antialias=True,
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_there_and_back_is_the_identity(name: str) -> None:
    arrays = official(SPECS[name])
    back = state_dict.from_params(state_dict.to_params(arrays, SPECS[name]), SPECS[name])
    assert back.keys() == arrays.keys()
    for key in arrays:
        np.testing.assert_array_equal(back[key], arrays[key])
    again = name_maps.HF_DINOV2.to_canonical(name_maps.HF_DINOV2.from_canonical(arrays))
    assert again.keys() == arrays.keys()
    for key in arrays:
        np.testing.assert_array_equal(again[key], arrays[key])


@pytest.mark.parametrize("name", SPECS)
def test_sizes_are_read_off_the_weights(name: str) -> None:
    assert state_dict.infer_spec(official(SPECS[name]), SPECS[name].heads) == SPECS[name]


def test_everything_that_does_not_fit_is_listed() -> None:
    arrays = official(TINY)
    del arrays["blocks.1.mlp.fc2.bias"]
    arrays["head.weight"] = np.zeros((3, 4), np.float32)
    arrays["norm.weight"] = np.zeros(31, np.float32)
    with pytest.raises(InputError) as caught:
        state_dict.to_params(arrays, TINY)
    assert sorted(caught.value.problems) == [
        "misshapen: norm.weight should be [32], found [31]",
        "missing: blocks.1.mlp.fc2.bias [32]",
        "unexpected: head.weight [3, 4]",
    ]


def test_the_mask_token_alone_may_be_absent(tmp_path: Path) -> None:
    arrays = official(TINY)
    del arrays["mask_token"]
    np.savez(tmp_path / "w.npz", **arrays)
    card = import_weights(tmp_path / "w.npz", tmp_path / "model", heads=2)
    assert card.absent == ("mask_token",)
    params, card = load_model(tmp_path / "model")
    assert card.absent == ("mask_token",)
    assert not params["mask_token"].any()
    del arrays["cls_token"]
    np.savez(tmp_path / "w2.npz", **arrays)
    with pytest.raises(InputError, match="it has no class token"):
        import_weights(tmp_path / "w2.npz", tmp_path / "other", heads=2)
    assert not (tmp_path / "other").exists()


def test_heads_must_be_known() -> None:
    with pytest.raises(InputError, match="a width of 32 does not tell the number of heads"):
        state_dict.infer_spec(official(TINY))
    with pytest.raises(InputError, match="width 32 is not divisible by 5 heads"):
        state_dict.infer_spec(official(TINY), 5)


def test_safetensors_and_npz_hold_the_same(tmp_path: Path) -> None:
    arrays = official(TINY)
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **arrays)
    for file in ("w.safetensors", "w.npz"):
        read = read_weights(tmp_path / file).arrays
        assert read.keys() == arrays.keys()
        for key in arrays:
            np.testing.assert_array_equal(read[key], arrays[key])


def test_half_precision_is_widened(tmp_path: Path) -> None:
    import ml_dtypes

    values = np.linspace(-1, 1, 7, dtype=np.float32)
    for kind in (np.float16, ml_dtypes.bfloat16):
        safetensors.numpy.save_file({"a": values.astype(kind)}, tmp_path / "w.safetensors")
        read = read_weights(tmp_path / "w.safetensors").arrays["a"]
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values.astype(kind).astype(np.float32))


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    bomb = np.empty(1, object)
    bomb[0] = Bomb(tmp_path / "exploded")
    np.savez(tmp_path / "w.npz", bomb=bomb)
    with pytest.raises(InputError, match=r"not a readable \.npz of plain arrays"):
        read_weights(tmp_path / "w.npz")
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": Bomb(tmp_path / "exploded")}))
    with pytest.raises(InputError, match=r"a pickle, but not one of torch\.save"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".onnx", ".pth"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_garbage_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError):
        import_weights(file, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"w{suffix}"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    if suffix == ".npz":
        np.savez(file, **official(TINY))
    else:
        safetensors.numpy.save_file(official(TINY), file)
    whole = file.read_bytes()
    for share in (0.01, 0.5, 0.99):
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match="not a readable"):
            read_weights(file)


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.array([1, np.nan]), b=np.array([np.inf]))
    with pytest.raises(InputError, match="not finite: a, b"):
        read_weights(tmp_path / "w.npz")
    # Finite as it is stored, and not as it is read.
    np.savez(tmp_path / "w.npz", a=np.array([1e300]))
    with np.errstate(over="ignore"), pytest.raises(InputError, match="not finite: a"):
        read_weights(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", a=np.array([1, 2]))
    with pytest.raises(InputError, match="a should hold floats, found int64"):
        read_weights(tmp_path / "w.npz")
    with pytest.raises(InputError, match="no such file"):
        read_weights(tmp_path / "absent.npz")
    (tmp_path / "w.txt").touch()
    with pytest.raises(InputError, match=r"expected a file ending in \.pth"):
        read_weights(tmp_path / "w.txt")


def onnx_like_the_wheels(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Named vectors, numbered and transposed matrices, a split table, and another module."""
    theirs = {
        f"backbone.{name}": value
        for name, value in name_maps.HF_DINOV2.from_canonical(arrays).items()
    }
    table = theirs.pop("backbone.embeddings.position_embeddings")
    del theirs["backbone.embeddings.mask_token"]
    items, nodes = [], []

    def anonymous(value: np.ndarray, kind: str, node: str) -> None:
        name = f"onnx::{kind}_{len(items)}"
        items.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        nodes.append(onnx.helper.make_node(kind, ["x", name], [f"y{len(items)}"], name=node))

    for name, value in theirs.items():
        if value.ndim == 2 and name.endswith(".weight"):
            # The path of a module has slashes, but a layer and its number stay together.
            module = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            anonymous(value.T, "MatMul", f"/{module}/MatMul")
        else:
            items.append(onnx.numpy_helper.from_array(value, name))
    anonymous(table[:, :1], "Concat", "/backbone/embeddings/Concat_6")
    anonymous(table[:, 1:], "Reshape", "/backbone/embeddings/Reshape_1")
    items.append(onnx.numpy_helper.from_array(np.zeros(3, np.float32), "decoder.bias"))
    graph = onnx.helper.make_graph(nodes, "g", [], [], items)
    onnx.save(onnx.helper.make_model(graph), path)


def test_onnx_names_are_found_again(tmp_path: Path) -> None:
    arrays = official(TINY)
    onnx_like_the_wheels(arrays, tmp_path / "w.onnx")
    import_weights(tmp_path / "w.onnx", tmp_path / "model", heads=2)
    params, card = load_model(tmp_path / "model")
    found = state_dict.from_params(params, card.spec)
    for name in arrays.keys() - {"mask_token"}:
        np.testing.assert_array_equal(found[name], arrays[name])


def test_onnx_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    items = [
        onnx.numpy_helper.from_array(np.full(3, value, np.float32), "backbone.norm.bias")
        for value in (1.0, 2.0)
    ]
    graph = onnx.helper.make_graph([], "g", [], [], items)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "w.onnx")
    with pytest.raises(InputError, match=r"two arrays for backbone\.norm\.bias"):
        read_weights(tmp_path / "w.onnx")


def test_statistics_that_are_asked_for_count(tmp_path: Path) -> None:
    """More than those of the family, and on the command line; a license too."""
    np.savez(tmp_path / "w.npz", **official(TINY))
    card = import_weights(tmp_path / "w.npz", tmp_path / "own", heads=2, normalization=HALF)
    assert card.normalization == load_card(tmp_path / "own").normalization == HALF
    command = ["import", str(tmp_path / "w.npz"), "--output", str(tmp_path / "m"), "--heads", "2"]
    assert convert.main([*command, "--normalisation", "clip", "--licence", "mine"]) == 0
    card = load_card(tmp_path / "m")
    assert (card.normalization, card.license) == (CLIP, "mine")


def test_a_directory_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = state_dict.to_params(official(TINY), TINY)
    card = ModelCard(spec=TINY)

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(OSError, match="no space left"):
            save_model(tmp_path / "model", params, card)
    assert list(tmp_path.iterdir()) == []
    save_model(tmp_path / "model", params, card)
    with pytest.raises(InputError, match="exists already"):
        save_model(tmp_path / "model", params, card)
    save_model(tmp_path / "model", params, card, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # What others may do with it is the user's choice, whatever temporary files are.
    mask = os.umask(0)
    os.umask(mask)
    for path in (tmp_path / "model", *(tmp_path / "model").iterdir()):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    save_model(tmp_path / "model", state_dict.to_params(official(TINY), TINY), ModelCard(spec=TINY))
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="changed since it was written"):
        load_model(tmp_path / "model")
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        load_model(tmp_path / "model")
    card = tmp_path / "model" / "config.json"
    for text in ("", "[]", "{}", card.read_text().replace('"width": 32', '"width": "wide"')):
        card.write_text(text)
        with pytest.raises(InputError, match="not a model's card"):
            load_card(tmp_path / "model")
    with pytest.raises(InputError, match="not a model directory"):
        load_card(tmp_path)


def test_a_loaded_model_takes_uint8_images(tiny_teacher: Path) -> None:
    model = Model(*load_model(tiny_teacher))
    features = model(np.zeros((2, 56, 28, 3), np.uint8))
    assert features.cls.shape == (2, 32)
    assert features.patches.shape == (2, 8, 32)
    for wrong, complaint in (
        (np.zeros((2, 56, 28, 3), np.float32), "uint8"),
        (np.zeros((56, 28, 3), np.uint8), "batch, height, width, 3"),
        (np.zeros((2, 56, 30, 3), np.uint8), "multiples of 14, found 56 x 30"),
        (np.zeros((2, 30, 56, 3), np.uint8), "multiples of 14, found 30 x 56"),
    ):
        with pytest.raises(InputError, match=complaint):
            model(wrong)


def test_a_loaded_model_is_copied_and_differentiated(tiny_teacher: Path) -> None:
    model = Model(*load_model(tiny_teacher))
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    found = model(images)
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy(images).cls, found.cls)
    floats = jnp.asarray(images, jnp.float32) / 255
    np.testing.assert_allclose(model.of_unit_range(floats).cls, found.cls, atol=1e-6)

    def of_class(floats: jax.Array) -> jax.Array:
        return jnp.sum(model.of_unit_range(floats).cls[:, 0])

    gradient = jax.grad(of_class)(floats)
    # Along the gradient the value grows by its squared norm.
    length = float(jnp.sum(gradient**2))
    step = 1e-3 / length**0.5
    grown = float(of_class(floats + step * gradient) - of_class(floats - step * gradient))
    assert grown == pytest.approx(2 * step * length, rel=0.02)
    with pytest.raises(InputError, match=r"from 0 to 1, found from 0.0 to 255.0"):
        model.of_unit_range(images.astype(np.float32))
    with pytest.raises(InputError, match=r"should be float32 from 0 to 1, found uint8"):
        model.of_unit_range(images)
    spoilt = np.array(floats)
    spoilt[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="from 0 to 1, found from nan to nan"):
        model.of_unit_range(spoilt)


def test_a_copy_computes_in_the_same_precision(tiny_teacher: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 3), np.uint8)
    whole, half = (Model(*load_model(tiny_teacher), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    copy = pickle.loads(pickle.dumps(half))
    np.testing.assert_array_equal(copy(images).cls, half(images).cls)
    assert (np.asarray(half(images).cls) != np.asarray(whole(images).cls)).any()


def test_a_loaded_model_promotes_whatever_else_is_refused(tiny_teacher: Path) -> None:
    images = np.zeros((1, 28, 28, 3), np.uint8)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        model = Model(*load_model(tiny_teacher))
        assert model(images).cls.shape == (1, 32)
        assert model.attention(images).shape == (1, 2, 4)


@pytest.mark.parametrize("name", SPECS)
def test_verify_compares_with_transformers(
    name: str, tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="needs requirements-parity.txt")
    spec = SPECS[name]
    # Weights as large as a trained model's: with tiny ones errors would drown in the stream.
    arrays: dict[str, Any] = state_dict.from_params(
        BackboneFunction(spec).init(jax.random.key(0)), spec
    )
    np.savez(tmp_path / "w.npz", **arrays)
    import_weights(tmp_path / "w.npz", tmp_path / "model", heads=spec.heads)
    command = ["verify", str(tmp_path / "model"), "--images", str(photographs), "--against"]
    assert convert.main([*command, str(tmp_path / "w.npz")]) == 0
    assert "equal" in capsys.readouterr().out
    changed = "blocks.0.mlp.w3.bias" if name == "swiglu" else "blocks.0.mlp.fc2.bias"
    arrays[changed] = arrays[changed] + 0.01
    np.savez(tmp_path / "other.npz", **arrays)
    assert convert.main([*command, str(tmp_path / "other.npz")]) == 1
    assert "FAIL block 0" in capsys.readouterr().out


def test_command_line_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "w.npz", **official(TINY))
    arguments = ["import", str(tmp_path / "w.npz"), "--output", str(tmp_path / "model")]
    assert convert.main(arguments) == 2
    assert "give --heads" in capsys.readouterr().err
    assert convert.main([*arguments, "--heads", "2"]) == 0
    assert "2 blocks, 32 wide, 2 heads" in capsys.readouterr().out
    assert convert.main([*arguments, "--heads", "2"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert.main(["import", str(tmp_path / "w.npz")]) == 2
    assert convert.main(["list"]) == 0
    assert "dinov2_vitg14_reg" in capsys.readouterr().out


def test_archives_that_are_not_whole(tmp_path: Path) -> None:
    """Whatever their readers raise on spoilt bytes, it is one refusal in words."""
    import zipfile

    np.savez(tmp_path / "w.npz", **official(TINY))
    whole = (tmp_path / "w.npz").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        spoilt = bytearray(whole)
        # The directory at the end is where archives are most easily broken.
        for at in rng.integers(len(whole) - 2000, len(whole), 3):
            spoilt[at] ^= int(rng.integers(1, 256))
        (tmp_path / "w.npz").write_bytes(spoilt)
        # Anything else that it raises would end this test.
        with contextlib.suppress(InputError):
            read_weights(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("../../outside.npy", b"")
    with pytest.raises(InputError, match=r"refused: its member .* points outside the archive"):
        read_weights(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(InputError, match="TorchScript archive, as OpenAI's own CLIP files"):
        read_weights(tmp_path / "x.pth")


def test_what_a_command_line_cannot_do_is_one_line(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong input, a place that cannot be written to, a path that is none: never a traceback."""
    (tmp_path / "file").touch()
    absent = ["import", str(tmp_path / "absent"), "--output", str(tmp_path / "out")]
    export = ["export", str(tiny_teacher), "--format=dinov2", "--no-check"]
    blocked = [*export, "--output", str(tmp_path / "file" / "x.pth")]
    for arguments, words in ((absent, str(tmp_path / "absent")), (blocked, str(tmp_path / "file"))):
        assert convert.main(arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert words in said.err
        assert len(said.err.splitlines()) == 1
    with pytest.raises(SystemExit) as ended:
        convert.main(["verify", "a\0b"])
    assert ended.value.code == 2
    assert "it holds a NUL" in capsys.readouterr().err
