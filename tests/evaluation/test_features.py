"""Evaluation's data and its one pass over them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES, photograph, write_classes
from PIL import Image

from proteus_jax.data.datasets.labeled import open_labeled, open_pair
from proteus_jax.data.eval_loader import NOTHING, evaluation_batches
from proteus_jax.data.sources.base import MemorySource
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.errors import InputError
from proteus_jax.evaluation.feature_extraction import (
    FrozenBackbone,
    LoaderConfig,
    class_token,
    freeze,
)
from proteus_jax.feature_extractor import Model
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.models.normalization import CLIP
from proteus_jax.runtime import sharding
from proteus_jax.weights.model_dir import load_model

VIEW = CenterCrop(32, 28)


def test_the_view_is_torchvisions(rng: np.random.Generator) -> None:
    """Resize(32), CenterCrop(28) written out."""
    for height, width in ((60, 80), (81, 50), (32, 47), (20, 20)):
        pixels = photograph(rng, height, width)
        short = min(height, width)
        size = (int(32 * width / short), int(32 * height / short))
        resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        top = round((resized.shape[0] - 28) / 2.0)
        left = round((resized.shape[1] - 28) / 2.0)
        (made,) = evaluation_batches(MemorySource([pixels], ["x"]), VIEW, batch=1)
        np.testing.assert_array_equal(made.images[0], resized[top : top + 28, left : left + 28])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_every_readable_image_once(
    tmp_path: Path, rng: np.random.Generator, workers: int
) -> None:
    for number in range(5):
        Image.fromarray(photograph(rng)).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[:100])
    from proteus_jax.data.dataset import open_source

    source, _ = open_source(str(tmp_path))
    found = [
        batch.numbers.tolist()
        for host in range(2)
        for batch in evaluation_batches(source, VIEW, batch=4, host=host, hosts=2, workers=workers)
    ]
    assert found == [[0, 1], [4, NOTHING], [2, NOTHING], [NOTHING, NOTHING]]


@pytest.mark.parametrize("hosts", [1, 2])
def test_large_batches_hold_every_image_once(hosts: int) -> None:
    """More than a piece of 64 images a host, the last batch incomplete; each with its number."""
    pictures = [np.full((32, 32, 3), number % 256, np.uint8) for number in range(450)]
    source = MemorySource(pictures, [str(number) for number in range(450)])
    parts = [
        list(evaluation_batches(source, VIEW, batch=200, host=host, hosts=hosts))
        for host in range(hosts)
    ]
    numbers = np.concatenate([batch.numbers for part in parts for batch in part])
    pixels = np.concatenate([batch.images[:, 0, 0, 0] for part in parts for batch in part])
    assert sorted(numbers[numbers != NOTHING].tolist()) == list(range(450))
    np.testing.assert_array_equal(pixels, np.where(numbers == NOTHING, 0, numbers % 256))
    assert len(numbers) == 600


def test_an_image_too_thin_to_resize_is_left_out() -> None:
    thin = np.zeros((1, 2**20, 3), np.uint8)
    (made,) = evaluation_batches(MemorySource([thin], ["x"]), VIEW, batch=1, threads=0)
    assert made.numbers.tolist() == [NOTHING]


def test_a_pass_equals_the_model_image_by_image(
    tiny_teacher: Path, rng: np.random.Generator
) -> None:
    model = Model(*load_model(tiny_teacher))
    pictures = [photograph(rng, 32, 32) for _ in range(11)]
    source = MemorySource(pictures, [str(number) for number in range(11)])
    frozen = freeze(model, sharding.make_mesh(2))
    for batch in (8, 64):
        table = frozen.table(class_token, source, VIEW, LoaderConfig(batch))
        assert table.numbers.tolist() == list(range(11))
        assert table.unreadable == 0
        views = np.stack([picture[2:30, 2:30] for picture in pictures])
        np.testing.assert_allclose(table.values, model(views).cls, atol=2e-5)
    some = frozen.table(class_token, source, VIEW, LoaderConfig(8), chosen=[7, 2])
    np.testing.assert_array_equal(some.values, table.values[[7, 2]])
    assert some.numbers.tolist() == [7, 2]
    assert some.unreadable == 0
    # By other statistics than the model's own, where a protocol says so.
    clip = freeze(model, sharding.make_mesh(), normalization=CLIP)
    assert model.card.normalization != CLIP
    params = jax.tree.map(jnp.asarray, model.params)
    expected = BackboneFunction(model.spec)(params, CLIP(jnp.asarray(views))).cls
    for way in (clip, freeze(model, sharding.make_mesh()).with_statistics(CLIP)):
        found = way.table(class_token, source, VIEW, LoaderConfig(64)).values
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_what_is_remembered_is_of_the_same_weights(
    tiny_teacher: Path, rng: np.random.Generator
) -> None:
    """And of the same images: a second protocol that asks for them costs no second pass."""
    model = Model(*load_model(tiny_teacher))
    sources = [MemorySource([photograph(rng, 32, 32)], [str(number)]) for number in range(2)]
    made = freeze(model, sharding.make_mesh())
    frozen = FrozenBackbone(
        made.backbone, made.params, made.normalization, made.mesh, remembers=True
    )
    first = frozen.table(class_token, sources[0], VIEW, LoaderConfig(8))
    assert frozen.table(class_token, sources[0], VIEW, LoaderConfig(8)) is first
    other = frozen.table(class_token, sources[1], VIEW, LoaderConfig(8))
    assert not np.allclose(other.values, first.values)
    changed = jax.tree.map(lambda array: array + 0.1, made.params)
    later = frozen.with_params(changed).table(class_token, sources[0], VIEW, LoaderConfig(8))
    assert not np.allclose(later.values, first.values)


def test_weights_are_kept_in_the_dtype_of_the_matmuls(tiny_teacher: Path) -> None:
    model = Model(*load_model(tiny_teacher))
    frozen = freeze(model, sharding.make_mesh(), jnp.bfloat16)
    linear = frozen.params["blocks"]["attn"]["qkv"]
    assert linear["kernel"].dtype == jnp.bfloat16
    assert linear["bias"].dtype == jnp.float32


def test_pairs_of_folders(labeled_folder: Path) -> None:
    pair = open_pair(str(labeled_folder))
    assert pair.train.classes == pair.test.classes == CLASSES
    assert np.bincount(pair.train.labels).tolist() == [14, 14, 14]
    assert np.bincount(pair.test.labels).tolist() == [5, 5, 5]
    assert pair.test_name == "test"
    whole = open_pair(str(labeled_folder / "train"))
    assert np.bincount(whole.test.labels).tolist() == [2, 2, 2]
    assert np.bincount(whole.train.labels).tolist() == [12, 12, 12]
    names = {whole.train.source.name(n) for n in range(36)}
    assert names.isdisjoint(whole.test.source.name(n) for n in range(6))


def test_labels_follow_names_not_places(tmp_path: Path, rng: np.random.Generator) -> None:
    """A test set that lacks a class must not shift the others."""
    write_classes(tmp_path / "train", rng, 2, ("a", "b", "c"))
    write_classes(tmp_path / "val", rng, 1, ("b", "c"))
    pair = open_pair(str(tmp_path))
    assert pair.test.labels.tolist() == [1, 2]


def test_addresses_and_lists_and_a_test_set_without_classes(
    labeled_folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    remote = open_pair(f"file://{labeled_folder}")
    assert remote.train.classes == CLASSES
    assert len(remote.test.labels) == 15
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, sorted(labeled_folder.glob("train/*/*.png")))))
    assert open_labeled(str(listed)).classes == CLASSES
    for split in ("train", "val"):
        write_classes(tmp_path / "flat" / split, rng, 2, ("a", "b"))
    (tmp_path / "flat" / "test").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "flat" / "test" / "x.png")
    assert open_pair(str(tmp_path / "flat")).test_name == "val"


def test_what_has_no_classes_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    write_classes(tmp_path / "one", rng, 2, ("a",))
    write_classes(tmp_path / "two" / "train", rng, 2, ("a", "b"))
    write_classes(tmp_path / "other" / "train", rng, 2, ("a", "b"))
    write_classes(tmp_path / "other" / "test", rng, 2, ("a", "z"))
    write_classes(tmp_path / "single", rng, 1, ("a", "b"))
    write_classes(tmp_path / "loose", rng, 1, ("a", "b"))
    Image.new("RGB", (9, 9)).save(tmp_path / "loose" / "x.png")
    write_classes(tmp_path / "spelt" / "Train", rng, 2, ("a", "b"))
    write_classes(tmp_path / "spelt" / "Val", rng, 2, ("a", "b"))
    for name, words in (
        ("spelt", "expected train/ and test/, or classes, found Train, Val"),
        ("one", "expected two classes or more, found only a"),
        ("two", "has train/, but neither of test, val, validation"),
        ("other", "1 classes to test on are none to learn from, as z"),
        ("single", "a: expected two images or more of a class"),
        ("loose", "found images outside of them, as x.png"),
        ("nowhere", "no such folder"),
    ):
        with pytest.raises(InputError, match=words):
            open_pair(str(tmp_path / name))
    with pytest.raises(InputError, match="expected images with classes"):
        open_labeled(write_tar(tmp_path))


def write_tar(folder: Path) -> str:
    import tarfile

    with tarfile.open(folder / "x.tar", "w") as tar:
        tar.add(folder / "one" / "a" / "0.png", "0.png")
    return str(folder / "x.tar")


def test_tiles_are_apart_and_whole(rng: np.random.Generator) -> None:
    from proteus_jax.data.datasets.labeled import tiles

    pictures = [photograph(rng, 50, 95), photograph(rng, 12, 200), photograph(rng, 9, 9)]
    found, labels = tiles(MemorySource(pictures, list("abc")), 20, 5)
    assert labels == [0] * 5 + [1] * 5 + [2]
    assert [tile.shape for tile in found] == [(20, 20, 3)] * 5 + [(12, 12, 3)] * 5 + [(9, 9, 3)]
    np.testing.assert_array_equal(found[0], pictures[0][:20, :20])
    # Where they fit exactly the last row and the last column are there.
    whole, labels = tiles(MemorySource([photograph(rng, 40, 60)], ["x"]), 20, 99)
    assert len(whole) == len(labels) == 6
    np.testing.assert_array_equal(found[4], pictures[0][20:40, 60:80])
