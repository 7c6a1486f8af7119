"""`proteus features`, and what `load()` gives beside a call."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Heard, photograph
from PIL import Image

import proteus_jax
from proteus_jax.cli import features
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.data.transforms.native_size import NativeSize
from proteus_jax.errors import InputError
from proteus_jax.evaluation import feature_files
from proteus_jax.evaluation.feature_files import PartFolder, Rows, read_features


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTEUS_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images of two classes, one of which is broken."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for number in range(9):
        place = folder / ("cat", "dog")[number % 2] / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        height, width = ((40, 60), (60, 40))[number % 2]
        Image.fromarray(photograph(rng, height, width)).save(place)
    broken = folder / "cat" / "4.png"
    broken.write_bytes(broken.read_bytes()[:200])
    return folder


def by_hand(model: Path, pictures: Path, layers: int = 0) -> dict[str, Any]:
    """The features of each image by its name, one by one."""
    loaded, found = proteus_jax.load(model), {}
    view = CenterCrop(32, 28)
    for path in sorted(pictures.rglob("*.png")):
        name = str(path.relative_to(pictures))
        if name != "cat/4.png":
            crop = model_pixels(path, view)
            found[name] = loaded.layers(layers)(crop) if layers else loaded(crop)
    return found


def model_pixels(path: Path, view: CenterCrop) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    shorter = min(pixels.shape[:2])
    height, width = (view.resize * side // shorter for side in pixels.shape[:2])
    resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - view.crop) / 2), round((width - view.crop) / 2)
    return resized[None, top : top + view.crop, left : left + view.crop]


HEARD = Heard()


def run(model: Path, images: Path, output: Path, *more: str) -> int:
    """Runs the command; what it says is in HEARD."""
    HEARD.lines.clear()
    crops = ["--crop", "28", "--resize", "32"] if "--crop" not in more else []
    arguments = [str(model), str(images), "--output", str(output), "--batch", "4", *crops, *more]
    return features.main(arguments, HEARD)


def test_features_are_those_of_a_loaded_model(
    tmp_path: Path, tiny_teacher: Path, pictures: Path
) -> None:
    output = tmp_path / "f.npz"
    assert run(tiny_teacher, pictures, output, "--tokens", "cls,patches,mean") == 0
    (found,) = read_features(output)
    expected = by_hand(tiny_teacher, pictures)
    assert found["names"].tolist() == list(expected)
    for row, each in enumerate(expected.values()):
        np.testing.assert_allclose(found["cls"][row], each.cls[0], atol=2e-5)
        np.testing.assert_allclose(found["patches"][row], each.patches[0], atol=2e-5)
        np.testing.assert_allclose(found["mean"][row], each.patches[0].mean(axis=0), atol=2e-5)
    facts = json.loads(str(found["facts"]))
    assert facts["classes"] == ["cat", "dog"]
    assert [facts["classes"][label] for label in found["labels"]] == [n[:3] for n in expected]
    assert [name[-9:] for name in facts["unreadable"]] == ["cat/4.png"]
    assert output.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_layers_dtypes_and_files(tmp_path: Path, tiny_teacher: Path, pictures: Path) -> None:
    expected = by_hand(tiny_teacher, pictures, layers=2)
    options = ("--layers", "2", "--dtype", "float16")
    assert run(tiny_teacher, pictures, tmp_path / "f.npy", *options) == 0
    array = np.load(tmp_path / "f.npy")
    width = array.shape[-1]
    assert (array.shape, array.dtype) == ((8, 2, width), np.float16)
    for row, each in enumerate(expected.values()):
        for layer in range(2):
            np.testing.assert_allclose(array[row, layer], each[layer].cls[0], atol=5e-3)
    beside = json.loads((tmp_path / "f.json").read_text())
    assert beside["names"] == list(expected)
    assert run(tiny_teacher, pictures, tmp_path / "f.parquet", *options) == 0
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column("names").to_pylist() == list(expected)
    flat = np.array(table.column("cls").to_pylist(), np.float16)
    assert np.array_equal(flat.reshape(8, 2, width), array)


def test_a_folder_of_parts_is_gone_on_with(
    tmp_path: Path,
    tiny_teacher: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after its first part, it ends with the features of a run that was not."""
    monkeypatch.setattr(feature_files, "PART_BYTES", 1)
    tokens = ("--tokens", "cls,patches")
    assert run(tiny_teacher, pictures, tmp_path / "whole", *tokens) == 0
    write = PartFolder._write

    def stopped(self: PartFolder, until: int) -> None:
        if self._parts:
            raise KeyboardInterrupt
        write(self, until)

    with monkeypatch.context() as patched:
        patched.setattr(PartFolder, "_write", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_teacher, pictures, tmp_path / "parts", *tokens)
    index = json.loads((tmp_path / "parts" / "index.json").read_text())
    assert (len(index["parts"]), index["complete"]) == (1, False)
    assert run(tiny_teacher, pictures, tmp_path / "parts", *tokens) == 0
    assert "goes on after 8 of 9 images" in HEARD.lines
    index = json.loads((tmp_path / "parts" / "index.json").read_text())
    assert index["complete"]
    assert [name[-9:] for name in index["unreadable"]] == ["cat/4.png"]
    whole, parts = (list(read_features(tmp_path / name)) for name in ("whole", "parts"))
    for kind in ("cls", "patches", "names", "labels", "numbers"):
        one, other = (np.concatenate([part[kind] for part in every]) for every in (whole, parts))
        assert np.array_equal(one, other), kind
    assert run(tiny_teacher, pictures, tmp_path / "parts", "--tokens", "cls") == 2
    assert "holds other features (of another tokens)" in "\n".join(HEARD.lines)
    (tmp_path / "parts" / "part-00001.npz").unlink()
    assert run(tiny_teacher, pictures, tmp_path / "parts", *tokens) == 2
    assert "its part part-00001.npz is missing" in "\n".join(HEARD.lines)


def test_native_sizes(tmp_path: Path, tiny_teacher: Path, pictures: Path) -> None:
    """Each side is rounded to patches of 14: 40 x 60 become 42 x 56."""
    output = tmp_path / "f.npz"
    assert run(tiny_teacher, pictures, output, "--crop", "native", "--tokens", "cls,patches") == 0
    (found,) = read_features(output)
    assert found["grid"].tolist() == [[3, 4]] * 4 + [[4, 3]] * 4
    model = proteus_jax.load(tiny_teacher)
    ends = np.cumsum(found["grid"].prod(axis=1))
    for row, name in enumerate(found["names"].tolist()):
        each = model(model.preprocess(pictures / name, size="native"))
        np.testing.assert_allclose(found["cls"][row], each.cls[0], atol=2e-5)
        patches = found["patches"][ends[row] - 12 : ends[row]]
        np.testing.assert_allclose(patches, each.patches[0], atol=2e-5)
    assert NativeSize(14, most=6).sides(400, 600) == (28, 42)


def test_what_is_refused(
    tmp_path: Path,
    tiny_teacher: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "there.npz").touch()
    (tmp_path / "there.json").touch()
    for output, more, words in (
        ("f.npz", ["--crop", "30"], "--crop: expected a multiple of the patch size 14, found 30"),
        ("f.npz", ["--layers", "99"], "--layers: expected at most the model's"),
        ("f.npz", ["--tokens", "cls,words"], "--tokens: expected some of cls, patches, mean"),
        ("f.npy", ["--tokens", "cls,mean"], "a .npy holds one kind of tokens"),
        ("f.csv", [], "expected .npz, .parquet, .npy, or a folder without a suffix, found .csv"),
        ("there.npz", [], "is there already"),
        ("f.npz", ["--range", "9,1"], "--range, --alpha: expected values"),
        ("f.npz", ["--workers", "-1"], "--workers: expected from 0 to"),
        ("there.npy", [], "there.json is there already"),
    ):
        assert run(tiny_teacher, pictures, tmp_path / output, *more) == 2
        assert words in "\n".join(HEARD.lines)
    monkeypatch.setattr(features, "MOST_IN_A_FILE", 100)
    assert run(tiny_teacher, pictures, tmp_path / "f.npz") == 2
    assert "too many for a file; give a folder" in "\n".join(HEARD.lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.json", "there.npz"]


def test_labels_that_are_none_are_said(tmp_path: Path, tiny_teacher: Path, pictures: Path) -> None:
    """The features are there without classes."""
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(pictures / "cat" / "0.png", "0.png")
        member = tarfile.TarInfo("0.cls")
        member.size = 2
        shard.addfile(member, io.BytesIO(b"-1"))
    assert run(tiny_teacher, tmp_path / "a.tar", tmp_path / "f.npz") == 0
    assert any("without classes: " in line and "found -1" in line for line in HEARD.lines)
    (found,) = read_features(tmp_path / "f.npz")
    assert "labels" not in found
    assert len(found["cls"]) == 1


def test_preprocess(tiny_teacher: Path, pictures: Path) -> None:
    """As evaluation does, of whatever holds an image."""
    model = proteus_jax.load(tiny_teacher)
    path = pictures / "dog" / "1.png"
    expected = model_pixels(path, CenterCrop(32, 28))
    array = np.asarray(Image.open(path).convert("RGB"))
    for given in (path, str(path), path.read_bytes(), Image.open(path), array, [path], (array,)):
        assert np.array_equal(model.preprocess(given, size=28), expected)
    both = model.preprocess([path, pictures / "cat" / "0.png"], size=28)
    assert both.shape == (2, 28, 28, 3)
    assert model.preprocess(path, size="native").shape == (1, 56, 42, 3)
    for images, size, words in (
        ([path, pictures / "cat" / "4.png"], 28, "4.png: "),
        ([path, pictures / "cat" / "0.png"], "native", "images that come to one shape, found"),
        ([], 28, "expected an image or more"),
        (path, 30, "multiple of the patch size 14, found 30"),
        (np.zeros((4, 4)), 28, "image 0: expected uint8"),
        (pictures / "absent.png", 28, "absent.png: No such file"),
    ):
        with pytest.raises(InputError, match=words):
            model.preprocess(images, size=size)
    with pytest.raises(InputError, match="layers: expected from 1 to"):
        model.layers(0)


def test_files_of_parts_name_what_they_are_not(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(InputError, match="expected a new folder, found no features"):
        PartFolder(tmp_path / "other", {})
    rows = Rows({"cls": np.ones((2, 3))}, np.arange(2), ["a", "b"], None)
    folder = PartFolder(tmp_path / "new", {"crop": 1})
    folder.add(rows, 3, ["c"])
    folder.finish({"images": 3, "unreadable": folder.unreadable()})
    assert feature_files.PartFolder(tmp_path / "new", {"crop": 1}).unreadable() == ["c"]
