import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import photograph
from PIL import Image

from proteus_jax.data import images, pipeline
from proteus_jax.data.augment import crop_box, random_view
from proteus_jax.data.pipeline import Batch, held_out_views, sample_index, training_batches
from proteus_jax.data.sources import HeldOut, MemorySource, open_folder
from proteus_jax.errors import InputError

NONE = HeldOut(0.0, 1, 1)


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def names_of(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def test_a_folder_is_searched_to_its_bottom(tmp_path: Path, rng: np.random.Generator) -> None:
    for name in ("b.PNG", "a b/ü.jpeg", "a b/c/d.webp", "e.bmp", "f.jpg"):
        suffix = Path(name).suffix.lower().replace(".jpeg", ".jpg")
        kind = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}[suffix]
        save(tmp_path / name, photograph(rng), format=kind)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "gone.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "a b" / "loop").symlink_to(tmp_path)
    split = open_folder(tmp_path, NONE)
    assert names_of(split.training) == ["a b/c/d.webp", "a b/ü.jpeg", "b.PNG", "e.bmp", "f.jpg"]
    assert split.held_out is None
    assert split.skipped == ("empty.jpg", "gone.png", "text.png")


def test_what_is_no_folder_of_images(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_folder(tmp_path / "absent", NONE)
    with pytest.raises(InputError, match="no image"):
        open_folder(tmp_path, NONE)
    save(tmp_path / "a.png", photograph(rng))
    with pytest.raises(
        InputError, match="found 1 images of which 16 would be held out: at least 17"
    ):
        open_folder(tmp_path, HeldOut(0.02, 16, 1024))


def test_a_folder_is_split_by_content(photographs: Path, tmp_path: Path) -> None:
    split = open_folder(photographs, HeldOut(0.02, 16, 1024))
    assert split.held_out is not None
    assert len(split.held_out) == 16
    assert len(split.training) == 24
    apart = set(names_of(split.held_out))
    assert not apart & set(names_of(split.training))
    # Under other names the same pictures are held out, and a copy follows its original.
    for number, path in enumerate(sorted(photographs.rglob("*.*"))):
        content = path.read_bytes()
        (tmp_path / f"{number:03}{path.suffix}").write_bytes(content)
        if path.relative_to(photographs).as_posix() in apart:
            (tmp_path / f"copy{number}{path.suffix}").write_bytes(content)
    again = open_folder(tmp_path, HeldOut(0.02, 32, 1024))
    assert again.held_out is not None
    originals = {(photographs / name).read_bytes() for name in apart}
    assert {(tmp_path / name).read_bytes() for name in names_of(again.held_out)} == originals
    assert len(again.held_out) == 32


@pytest.mark.parametrize(
    ("total", "expected"), [(100, 16), (10_000, 200), (1_281_167, 1024), (17, 16)]
)
def test_how_many_are_held_out(total: int, expected: int) -> None:
    assert HeldOut(0.02, 16, 1024).count(total) == expected


def test_fingerprint_changes_with_the_images(tmp_path: Path, rng: np.random.Generator) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / name, photograph(rng))
    before = open_folder(tmp_path, NONE).training.fingerprint
    assert open_folder(tmp_path, NONE).training.fingerprint == before
    save(tmp_path / "b.png", photograph(rng))
    assert open_folder(tmp_path, NONE).training.fingerprint != before


def test_every_kind_of_image_becomes_rgb(tmp_path: Path, rng: np.random.Generator) -> None:
    picture = Image.fromarray(photograph(rng))
    expected = np.asarray(picture)
    grey = np.asarray(picture.convert("L"))
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(images.read(tmp_path / "alpha.png"), expected)
    picture.convert("L").save(tmp_path / "grey.png")
    np.testing.assert_array_equal(images.read(tmp_path / "grey.png"), np.dstack([grey] * 3))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(images.read(tmp_path / "deep.png"), np.dstack([grey] * 3))
    picture.quantize(256).save(tmp_path / "palette.png")
    assert np.abs(images.read(tmp_path / "palette.png").astype(int) - expected).mean() < 12
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(images.read(tmp_path / "cmyk.jpg").astype(int) - expected).mean() < 12
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(images.read(tmp_path / "turned.png"), np.rot90(expected, -1))


def test_broken_images_are_unreadable(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "a.jpg", photograph(rng))
    whole = (tmp_path / "a.jpg").read_bytes()
    for broken in (b"", whole[:100], whole[:-40], whole[:20] + b"\0" * 200):
        with pytest.raises(images.Unreadable):
            images.decode(broken)
    with pytest.raises(images.Unreadable, match="No such file"):
        images.read(tmp_path / "absent.jpg")
    header = b"BM" + b"\0" * 12 + (40).to_bytes(4, "little")
    bomb = header + (60_000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + b"\0" * 24
    with pytest.raises(images.Unreadable, match="60000 x 60000 pixels are more than"):
        images.decode(bomb)


def test_crops_are_distributed_as_stated() -> None:
    """Area uniform from 0.08 to 1, ratio log-uniform from 3/4 to 4/3, where nothing is cut off."""
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(rng, 4000, 4000) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / 4000**2, np.log(width / height)
    assert boxes.min() >= 0
    assert boxes.max() <= 4000
    assert np.abs(ratio).max() <= np.log(4 / 3) + 1e-3
    small = area < 0.7  # a larger area does not fit with every ratio, and is drawn again
    edges = np.linspace(0.08, 0.7, 6)
    counts, _ = np.histogram(area[small], edges)
    assert np.abs(counts / small.sum() - 0.2).max() < 0.03
    counts, _ = np.histogram(ratio[small], np.linspace(-np.log(4 / 3), np.log(4 / 3), 6))
    assert np.abs(counts / small.sum() - 0.2).max() < 0.03


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 3), (7, 9)])
def test_any_shape_can_be_cropped(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    picture = np.zeros((height, width, 3), np.uint8)
    for _ in range(50):
        left, top, right, bottom = crop_box(rng, height, width)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert random_view(picture, rng, 28).shape == (28, 28, 3)


def test_half_of_the_views_are_flipped() -> None:
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (100, 100, 3))
    rng = np.random.default_rng(0)
    views = [random_view(ramp, rng, 28) for _ in range(400)]
    flipped = np.mean([view[0, 0, 0] > view[0, -1, 0] for view in views])
    assert flipped == pytest.approx(0.5, abs=0.1)


@pytest.fixture
def source(rng: np.random.Generator) -> MemorySource:
    return MemorySource([photograph(rng) for _ in range(10)], [str(i) for i in range(10)])


def batches(source, steps: range, **changes) -> list[Batch]:
    settings = {"size": 28, "batch": 8, "seed": 5, "threads": 0} | changes
    return list(training_batches(source, steps=steps, **settings))


def test_order_depends_on_neither_threads_nor_hosts_nor_resumes(source: MemorySource) -> None:
    whole = batches(source, range(6))
    assert [batch.images.shape for batch in whole] == [(8, 28, 28, 3)] * 6
    for hosts, threads, start in ((1, 3, 0), (2, 0, 0), (4, 2, 3), (1, 1, 5)):
        shares = [
            batches(source, range(start, 6), host=host, hosts=hosts, threads=threads)
            for host in range(hosts)
        ]
        for step, parts in enumerate(zip(*shares, strict=True), start):
            np.testing.assert_array_equal(
                np.concatenate([part.images for part in parts]), whole[step].images
            )
    other = batches(source, range(1), seed=6)
    assert np.any(other[0].images != whole[0].images)


def test_an_epoch_sees_each_image_once_in_an_order_of_its_own() -> None:
    epochs = np.array([sample_index(3, draw, 10) for draw in range(40)]).reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_an_unreadable_image_is_replaced_by_the_same_other(
    photographs: Path, tmp_path: Path
) -> None:
    for number, path in enumerate(sorted(photographs.rglob("*.jpg"))):
        (tmp_path / f"{number}.jpg").write_bytes(path.read_bytes())
    broken = tmp_path / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    split = open_folder(tmp_path, NONE)
    assert split.skipped == ()
    index = names_of(split.training).index("3.jpg")
    first, again = (batches(split.training, range(4), threads=threads) for threads in (0, 2))
    seen = np.concatenate([batch.unreadable for batch in first])
    assert set(seen) == {-1, index}
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="32 images in a row cannot be read"):
        batches(open_folder(tmp_path, NONE).training, range(1))


def test_held_out_views_are_fixed(source: MemorySource) -> None:
    views, unreadable = held_out_views(source, count=25, size=28)
    assert views.shape == (25, 28, 28, 3)
    assert unreadable == []
    np.testing.assert_array_equal(held_out_views(source, count=25, size=28)[0], views)
    assert len(held_out_views(source, count=4, size=28)[0]) == 10


def test_held_out_images_that_cannot_be_read(source: MemorySource) -> None:
    class Broken:
        fingerprint = ""

        def __len__(self) -> int:
            return 3

        def name(self, index: int) -> str:
            return str(index)

        def image(self, index: int) -> np.ndarray:
            if index == 1:
                raise images.Unreadable("broken")
            return source.image(index)

    views, unreadable = held_out_views(Broken(), count=9, size=28)
    assert len(views) == 6
    assert unreadable == [1]


def test_raw_bits_do_not_change_with_numpy() -> None:
    """The order of a run that is taken up in a year must be the one it began with."""
    assert pipeline._permutation(7, 2, 8).tolist() == [1, 3, 0, 6, 4, 7, 5, 2]


def test_paths_that_are_no_unicode(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "a.png", photograph(rng))
    (tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    assert len(open_folder(tmp_path, NONE).training) == 1
