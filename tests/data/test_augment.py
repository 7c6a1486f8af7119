"""Decoding, resizing, RandAugment, erasing: against Pillow, and as distributions."""

import io
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import photograph
from PIL import Image, ImageEnhance, ImageOps

from proteus_jax.data import decode
from proteus_jax.data.transforms import randaugment
from proteus_jax.data.transforms.randaugment import OPERATIONS, RandAugment
from proteus_jax.data.transforms.random_resized_crop import (
    Box,
    TrainTransform,
    crop_box,
    resized_crop,
)
from proteus_jax.data.transforms.resize import resized
from proteus_jax.errors import Unreadable
from proteus_jax.training.random_erasing import random_erasing


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Rougher than a photograph: edges, and noise between neighbors."""
    smooth = photograph(rng, height, width).astype(float)
    return (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def jpeg(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", **({"quality": 95} | options))
    return buffer.getvalue()


def by_pillow(array: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC))


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


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
    free = boxes[small, 0] / (4000 - width[small])
    counts, _ = np.histogram(free, 5, (0, 1))
    assert np.abs(counts / small.sum() - 0.2).max() < 0.03


def test_crops_reach_every_place() -> None:
    """All four edges of a small image, whole sides, and each offset that a side leaves."""
    rng = np.random.default_rng(0)
    boxes = [crop_box(rng, 6, 6) for _ in range(4000)]
    for first, last in (("left", "right"), ("top", "bottom")):
        found = Counter((getattr(box, first), getattr(box, last)) for box in boxes)
        # From two pixels on, the shortest that an area of 0.08 of 36 comes to.
        whole = {(at, at + side) for side in range(2, 7) for at in range(6 - side + 1)}
        assert found.keys() - {(at, at + 1) for at in range(6)} == whole
        for side in (2, 3, 4):
            counts = [found[at, at + side] for at in range(6 - side + 1)]
            assert min(counts) > 0.7 * max(counts), "places of a side come as often"


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        # As wide as allowed, or as high, and in the middle: nothing else fits into such strips.
        (500, 3, Box(0, 248, 3, 252)),
        (3, 500, Box(248, 0, 252, 3)),
        (1, 100, Box(49, 0, 50, 1)),
    ],
)
def test_where_no_crop_fits_the_middle_is_taken(height: int, width: int, box: Box) -> None:
    rng = np.random.default_rng(0)
    assert {crop_box(rng, height, width) for _ in range(20)} == {box}


class Asked:
    """A picture that tells at which fraction of its size it was asked for."""

    reductions = decode.REDUCTIONS

    def __init__(self, side: int):
        self.height = self.width = side
        self.fractions: list[int] = []

    def pixels(self, reduction: int = 1, bottom: int | None = None) -> np.ndarray:
        self.fractions.append(reduction)
        side = -(-self.height // reduction)
        return np.zeros((side, side, 3), np.uint8)


def test_a_jpeg_is_reduced_only_where_enough_is_left_to_resize() -> None:
    """One and a half times the crop's side remains, by the shorter side of the box."""
    picture = Asked(2400)
    widths = (59, 60, 119, 120, 239, 240, 400)
    for width in widths:
        resized_crop(picture, Box(0, 0, width, 2400), 20)
        resized_crop(picture, Box(0, 0, 2400, width), 20)
    assert picture.fractions[::2] == picture.fractions[1::2] == [1, 2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 3), (7, 9)])
def test_any_shape_can_be_cropped(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    picture = decode.open_image(np.zeros((height, width, 3), np.uint8))
    for _ in range(50):
        left, top, right, bottom = crop_box(rng, height, width)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert TrainTransform(28, RandAugment())(picture, rng).shape == (28, 28, 3)


def test_half_of_the_views_are_flipped() -> None:
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (100, 100, 3))
    rng = np.random.default_rng(0)
    views = [TrainTransform(28)(decode.open_image(ramp), rng) for _ in range(400)]
    flipped = np.mean([view[0, 0, 0] > view[0, -1, 0] for view in views])
    assert flipped == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("scale", [0.3, 0.9, 1.0, 1.3, 1.8, 2.6, 3.9, 5.5])
def test_resized_as_by_pillow(rng: np.random.Generator, scale: float) -> None:
    """Half a level on a photograph, and within two where neighbors differ by noise."""
    side = round(112 * scale)
    assert (
        mean_difference(
            resized(photograph(rng, side, side), 112),
            by_pillow(photograph(np.random.default_rng(0), side, side), 112),
        )
        < 0.5
    )
    rough = texture(rng, side, round(side * 1.2))
    assert mean_difference(resized(rough, 112), by_pillow(rough, 112)) < 1.5


@pytest.mark.parametrize(("height", "width"), [(120, 360), (340, 115), (112, 224)])
def test_long_images_are_resized_as_by_pillow(
    rng: np.random.Generator, height: int, width: int
) -> None:
    """Each axis by its own filter."""
    rough = texture(rng, height, width)
    assert mean_difference(resized(rough, 112), by_pillow(rough, 112)) < 1.5


def test_a_view_of_one_pixel_each_is_the_image(rng: np.random.Generator) -> None:
    picture = texture(rng, 56, 56)
    np.testing.assert_array_equal(resized(picture, 56), picture)
    constant = np.full((91, 33, 3), (0, 200, 255), np.uint8)
    np.testing.assert_array_equal(resized(constant, 28), constant[:28, :28][:, [0] * 28])


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_large_jpegs_are_decoded_smaller(rng: np.random.Generator, reduction: int) -> None:
    whole = photograph(rng, 60 * reduction + 5, 72 * reduction + 3)
    picture = decode.open_image(jpeg(whole))
    box = Box(8, 0, 8 + 56 * reduction, 56 * reduction)
    crop = resized_crop(picture, box, 28 if reduction < 8 else 24)
    left, top, right, bottom = box
    exact = decode.decode(jpeg(whole))[top:bottom, left:right]
    assert mean_difference(crop, by_pillow(exact, len(crop))) < 1
    for fraction in (1, reduction):
        shape = picture.pixels(fraction).shape
        assert shape == (-(-picture.height // fraction), -(-picture.width // fraction), 3)


def test_randaugment_draws_as_stated() -> None:
    rng = np.random.default_rng(0)
    drawn = [RandAugment().draw(rng) for _ in range(4000)]
    assert Counter(map(len, drawn)) == {
        0: pytest.approx(1000, abs=120),
        1: pytest.approx(2000, abs=150),
        2: pytest.approx(1000, abs=120),
    }
    names, magnitudes, signs = zip(*(entry for entries in drawn for entry in entries), strict=True)
    share = len(names) / len(OPERATIONS)
    assert Counter(names) == {name: pytest.approx(share, rel=0.25) for name in OPERATIONS}
    # With replacement: two of a kind come together about as often as any two.
    assert sum(len(e) == 2 and e[0][0] == e[1][0] for e in drawn) == pytest.approx(67, abs=35)
    # Each operation of an image has a magnitude of its own.
    both = np.array([[entry[1] for entry in entries] for entries in drawn if len(entries) == 2])
    assert abs(np.corrcoef(both.T)[0, 1]) < 0.15
    assert np.mean(magnitudes) == pytest.approx(8.98, abs=0.05)
    assert np.std(magnitudes) == pytest.approx(0.48, abs=0.05)
    assert max(magnitudes) == 10.0  # clipped
    assert np.mean(signs) == pytest.approx(0, abs=0.05)
    assert RandAugment(operations=0).draw(rng) == []


def test_every_operation_gives_an_image(rng: np.random.Generator) -> None:
    for shape in ((14, 14), (40, 40)):
        picture = texture(rng, *shape)
        for name, operation in OPERATIONS.items():
            for magnitude, sign in ((0.0, 1), (9.3, -1), (10.0, 1)):
                before = picture.copy()
                result = operation.apply(picture, operation.argument(magnitude, sign))
                assert result.shape == picture.shape, name
                assert result.dtype == np.uint8
                np.testing.assert_array_equal(picture, before, err_msg=name)


# What timm 0.9.16's "increasing" set makes of a magnitude and a sign, by hand.
ARGUMENTS = {
    "AutoContrast": [(9.0, 1, 0.0)],
    "Equalize": [(9.0, -1, 0.0)],
    "Invert": [(9.0, 1, 0.0)],
    "Rotate": [(9.0, 1, 27.0), (5.0, -1, -15.0)],
    "PosterizeIncreasing": [(0.0, 1, 4), (9.0, 1, 1), (7.4, -1, 2), (10.0, 1, 0)],
    "SolarizeIncreasing": [(0.0, 1, 256), (9.0, -1, 26), (10.0, 1, 0)],
    "SolarizeAdd": [(0.0, 1, 0), (9.0, -1, 99), (10.0, 1, 110)],
    "ColorIncreasing": [(9.0, 1, 1.81), (9.0, -1, 0.19), (10.0, -1, 0.1), (0.0, -1, 1.0)],
    "ContrastIncreasing": [(9.0, 1, 1.81), (5.0, -1, 0.55)],
    "BrightnessIncreasing": [(9.0, 1, 1.81), (5.0, -1, 0.55)],
    "SharpnessIncreasing": [(9.0, 1, 1.81), (5.0, -1, 0.55)],
    "ShearX": [(9.0, 1, 0.27), (10.0, -1, -0.3)],
    "ShearY": [(9.0, 1, 0.27), (10.0, -1, -0.3)],
    "TranslateXRel": [(9.0, 1, 0.405), (10.0, -1, -0.45)],
    "TranslateYRel": [(9.0, 1, 0.405), (10.0, -1, -0.45)],
}


def test_arguments_of_operations_are_timms() -> None:
    assert list(ARGUMENTS) == list(OPERATIONS)
    for name, rows in ARGUMENTS.items():
        for magnitude, sign, expected in rows:
            found = OPERATIONS[name].argument(magnitude, sign)
            assert found == pytest.approx(expected), (name, magnitude, sign)


def test_colors_as_by_pillow(rng: np.random.Generator) -> None:
    """Each of the ten operations on colors, on an image that uses few levels of each channel:
    at most one level apart.
    """
    levels = texture(rng, 48, 48).astype(int)
    picture = (levels * (0.6, 0.5, 0.8) + (30, 90, 5)).astype(np.uint8)
    pillow = Image.fromarray(picture)
    added = [min(255, level + 99) if level < 128 else level for level in range(256)]
    expected = {
        ("AutoContrast", 0.0): ImageOps.autocontrast(pillow),
        ("Equalize", 0.0): ImageOps.equalize(pillow),
        ("Invert", 0.0): ImageOps.invert(pillow),
        ("PosterizeIncreasing", 1): ImageOps.posterize(pillow, 1),
        ("PosterizeIncreasing", 4): ImageOps.posterize(pillow, 4),
        ("SolarizeIncreasing", 100): ImageOps.solarize(pillow, 100),
        ("SolarizeIncreasing", 256): pillow,
        ("SolarizeAdd", 99): pillow.point(added * 3),
    }
    for name, kind in (
        ("ColorIncreasing", ImageEnhance.Color),
        ("ContrastIncreasing", ImageEnhance.Contrast),
        ("BrightnessIncreasing", ImageEnhance.Brightness),
        ("SharpnessIncreasing", ImageEnhance.Sharpness),
    ):
        expected |= {(name, factor): kind(pillow).enhance(factor) for factor in (0.19, 1.81)}
    for (name, argument), image in expected.items():
        found = OPERATIONS[name].apply(picture, argument).astype(int)
        assert np.abs(found - np.asarray(image)).max() <= 1, (name, argument)
        assert (found == np.asarray(image)).mean() > 0.5, (name, argument)


def test_augmentations_follow_each_other_in_the_order_drawn(rng: np.random.Generator) -> None:
    """Both of two operations, the second on what the first made."""
    picture = texture(rng, 20, 20)
    seen = 0
    for seed in range(400):
        drawn = RandAugment().draw(np.random.default_rng(seed))
        if len(drawn) == 2:
            expected = picture
            for name, magnitude, sign in drawn:
                operation = OPERATIONS[name]
                expected = operation.apply(expected, operation.argument(magnitude, sign))
            found = RandAugment()(picture, np.random.default_rng(seed))
            np.testing.assert_array_equal(found, expected)
            seen += 1
    assert seen > 60


def test_what_comes_in_from_outside_is_imagenets_mean() -> None:
    assert tuple(round(255 * mean) for mean in (0.485, 0.456, 0.406)) == randaugment.FILL


def test_geometry_as_by_pillow(rng: np.random.Generator) -> None:
    picture = texture(rng, 64, 64)
    pillow = Image.fromarray(picture)
    fill = randaugment.FILL
    turned = pillow.rotate(20, resample=Image.Resampling.BICUBIC, fillcolor=fill)
    assert mean_difference(OPERATIONS["Rotate"].apply(picture, 20), np.asarray(turned)) < 2
    for name, argument, matrix in (
        ("ShearX", 0.2, (1, 0.2, 0, 0, 1, 0)),
        ("ShearY", -0.3, (1, 0, 0, -0.3, 1, 0)),
        ("TranslateXRel", 0.33, (1, 0, 0.33 * 64, 0, 1, 0)),
        ("TranslateYRel", -0.41, (1, 0, 0, 0, 1, -0.41 * 64)),
    ):
        moved = pillow.transform(
            (64, 64),
            Image.Transform.AFFINE,
            matrix,
            resample=Image.Resampling.BICUBIC,
            fillcolor=fill,
        )
        found = OPERATIONS[name].apply(picture, argument)
        assert mean_difference(found, np.asarray(moved)) < 2, name
    # Not square: a share of the side that the axis runs along.
    wide = texture(rng, 32, 64)
    for name, matrix in (
        ("TranslateXRel", (1, 0, 0.25 * 64, 0, 1, 0)),
        ("TranslateYRel", (1, 0, 0, 0, 1, 0.25 * 32)),
        ("ShearX", (1, 0.25, 0, 0, 1, 0)),
    ):
        moved = Image.fromarray(wide).transform(
            (64, 32),
            Image.Transform.AFFINE,
            matrix,
            resample=Image.Resampling.BICUBIC,
            fillcolor=fill,
        )
        found = OPERATIONS[name].apply(wide, 0.25)
        assert mean_difference(found, np.asarray(moved)) < 2, name
    far = OPERATIONS["TranslateXRel"].apply(picture, 1.5)
    assert (far == fill).all()
    assert not OPERATIONS["PosterizeIncreasing"].apply(picture, 0).any()


def test_whole_levels_stay() -> None:
    """What an operation leaves as it is comes out to the last bit."""
    levels = np.dstack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3)
    for name in ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing"):
        np.testing.assert_array_equal(OPERATIONS[name].apply(levels, 1.0), levels, err_msg=name)
    flat = np.full((20, 20, 3), (7, 8, 201), np.uint8)
    for name in ("AutoContrast", "Equalize"):
        np.testing.assert_array_equal(OPERATIONS[name].apply(flat, 0.0), flat, err_msg=name)


def test_erasing_is_distributed_as_stated() -> None:
    """A quarter of the images, area from 0.02 to 1/3, ratio log-uniform from 0.3 to 1 / 0.3."""
    side, count = 64, 2000
    blank = jnp.zeros((count, side, side, 3))
    erased = np.asarray(jax.jit(random_erasing, static_argnums=2)(jax.random.key(0), blank, 0.25))
    hit = erased.any(axis=(1, 2, 3))
    assert hit.mean() == pytest.approx(0.25, abs=0.03)
    boxes = np.asarray(erased[hit].any(axis=-1))
    assert (erased[hit][boxes] != 0).all(), "every channel of a box is noise"
    noise = erased[hit][boxes]
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)
    tall, wide = (np.any(boxes, axis=axis).sum(axis=1) for axis in (2, 1))
    np.testing.assert_array_equal(boxes.sum(axis=(1, 2)), tall * wide)  # whole boxes
    area, ratio = tall * wide / side**2, np.log(tall / wide)
    assert area.min() > 0.015
    assert area.max() < 0.35
    counts, _ = np.histogram(area, 4, (0.02, 1 / 3))
    assert np.abs(counts / len(area) - 0.25).max() < 0.07
    assert np.abs(ratio).max() < np.log(1 / 0.3) + 0.2
    assert np.median(ratio) == pytest.approx(0, abs=0.15)
    everything = np.asarray(random_erasing(jax.random.key(1), blank[:64], 1.0))
    assert everything.any(axis=(1, 2, 3)).all()


def erased_boxes(seed: int, blank: jax.Array) -> np.ndarray:
    """Where images of zeros are erased, bool [b, h, w]."""
    erased = jax.jit(random_erasing, static_argnums=2)(jax.random.key(seed), blank, 1.0)
    return np.asarray(np.asarray(erased).any(axis=-1))


def test_erased_boxes_reach_their_bounds() -> None:
    """Up to the last row and column, never a whole side, as long and as thin as allowed."""
    blank = jnp.zeros((6000, 10, 10, 3))
    boxes = erased_boxes(0, blank)
    for axis in (1, 2):
        lines = np.asarray(boxes.any(axis=axis))
        assert lines.sum(axis=1).max() == 9
        # Places are as likely from the first on to the last.
        long = lines[lines.sum(axis=1) == 5]
        starts = np.bincount(long.argmax(axis=1), minlength=6)
        assert len(starts) == 6
        assert starts.min() > 0.6 * starts.max()
    # Rows and columns know nothing of each other, nor does a channel of the next.
    rows, columns = (np.asarray(boxes.any(axis=axis)).argmax(axis=1) for axis in (2, 1))
    small = (boxes.any(axis=2).sum(axis=1) < 5) & (boxes.any(axis=1).sum(axis=1) < 5)
    assert abs(np.corrcoef(rows[small], columns[small])[0, 1]) < 0.06
    some = np.asarray(random_erasing(jax.random.key(3), blank[:200], 1.0))
    noise = some[some.any(axis=-1)]
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.06
    blank = jnp.zeros((3000, 80, 80, 3))
    boxes = erased_boxes(1, blank)
    tall, wide = (boxes.any(axis=axis).sum(axis=1) for axis in (2, 1))
    large = (tall > 20) & (wide > 20)
    for ratio in (tall[large] / wide[large], wide[large] / tall[large]):
        assert 3.15 < ratio.max() < 3.45
    area = tall * wide / 80**2
    assert area.min() == pytest.approx(0.02, abs=0.002)
    assert area.max() == pytest.approx(1 / 3, abs=0.008)


def test_every_kind_of_image_becomes_rgb(rng: np.random.Generator) -> None:
    picture = Image.fromarray(photograph(rng))
    expected = np.asarray(picture)
    gray = np.asarray(picture.convert("L"))

    def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    decoded = decode.decode(saved(picture.convert("RGBA")))
    np.testing.assert_array_equal(decoded, expected)
    decoded = decode.decode(saved(picture.convert("L")))
    np.testing.assert_array_equal(decoded, np.dstack([gray] * 3))
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode.decode(saved(deep)), np.dstack([gray] * 3))
    assert mean_difference(decode.decode(saved(picture.quantize(256))), expected) < 12
    cmyk = saved(picture.convert("CMYK"), "JPEG", quality=100)
    assert mean_difference(decode.decode(cmyk), expected) < 12
    jpegs = {
        "gray": picture.convert("L"),
        "colors": picture,
        "progressive": picture,
        "whole colors": picture,
    }
    for name, image in jpegs.items():
        more = {"progressive": {"progressive": True}, "whole colors": {"subsampling": 0}}
        data = saved(image, "JPEG", **more.get(name, {}))
        by_pillow_itself = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(decode.decode(data), by_pillow_itself, err_msg=name)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied(rng: np.random.Generator, kind: str, orientation: int) -> None:
    picture, buffer, exif = photograph(rng), io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(buffer, kind, exif=exif, quality=100)
    turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    decoded = decode.decode(buffer.getvalue())
    assert decoded.shape == np.rot90(picture, turns).shape
    assert mean_difference(decoded, np.rot90(picture, turns)) < 3


def test_orientation_is_found_where_few_writers_put_it(rng: np.random.Generator) -> None:
    """After a fill byte, and in XMP; a JPEG with EXIF that turns nothing stays on the fast path."""
    picture, exif = photograph(rng), Image.Exif()
    exif[0x0112] = 6
    turned = jpeg(picture, exif=exif)
    at = turned.index(b"\xff\xe1")
    xmp = (
        b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    )
    segment = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp
    plain = jpeg(picture)
    for data in (turned[:at] + b"\xff" + turned[at:], plain[:2] + segment + plain[2:]):
        assert decode.decode(data).shape == (80, 60, 3)
    exif[0x0112] = 1
    upright = decode.open_image(jpeg(picture, exif=exif))
    assert upright.reductions == decode.REDUCTIONS
    np.testing.assert_array_equal(upright.pixels(), decode.decode(plain))


@pytest.mark.parametrize("subsampling", [0, 1, 2, "4:1:1"])
def test_rows_to_a_crops_edge_are_those_of_the_whole(
    rng: np.random.Generator, subsampling: int | str
) -> None:
    data = jpeg(texture(rng, 93, 61), subsampling=subsampling)
    for reduction in (1, *decode.REDUCTIONS):
        whole = decode.open_image(data).pixels(reduction)
        for bottom in (1, 14, 15, 16, 17, 31, 47, 80, 92, 93):
            part = decode.open_image(data).pixels(reduction, bottom)
            rows = -(-bottom // reduction)
            np.testing.assert_array_equal(part[:rows], whole[:rows])
    picture = decode.open_image(data)
    for bottom in (20, 70, 30):
        np.testing.assert_array_equal(
            picture.pixels(1, bottom)[:bottom], decode.decode(data)[:bottom]
        )
    with pytest.raises(Unreadable):
        decode.open_image(data[:-400]).pixels(1, 20)


def test_broken_images_are_unreadable(rng: np.random.Generator) -> None:
    whole = jpeg(photograph(rng))
    for broken in (b"", whole[:100], whole[:-40], whole[:20] + b"\0" * 200):
        with pytest.raises(Unreadable):
            decode.decode(broken)


def test_a_flawed_jpeg_is_reduced_as_a_sound_one(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the fast decoder refuses Pillow decodes whole; a fraction of it is the whole picture."""
    data = jpeg(photograph(rng, 160, 120))
    sound = decode.open_image(data).pixels(4)

    def refuses(*_: object, **__: object) -> None:
        raise ValueError("a flaw")

    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", refuses)
    found = decode.open_image(data).pixels(4)
    assert found.shape == sound.shape == (40, 30, 3)
    assert mean_difference(found, sound) < 2


def test_bombs_are_refused_before_they_are_decoded() -> None:
    header = b"BM" + b"\0" * 12 + (40).to_bytes(4, "little")
    bomb = header + (60_000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + b"\0" * 24
    small = jpeg(np.zeros((16, 16, 3), np.uint8))
    at = small.index(b"\xff\xc0") + 5
    for data in (bomb, small[:at] + b"\xfd\xe8\xfd\xe8" + small[at + 4 :]):
        with pytest.raises(Unreadable, match=r"\d+ x \d+ pixels are more than"):
            decode.decode(data)


def test_three_hundred_spoilt_files(rng: np.random.Generator) -> None:
    """Cut, with bits turned over, zeroed, grown: each one is an image or Unreadable, no more."""
    picture = Image.fromarray(photograph(rng))
    files = []
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        files.append(buffer.getvalue())
    readable = 0
    for number in range(400):
        data = bytearray(files[number % 4])
        how = number // 4 % 5
        if how == 0:
            del data[int(rng.integers(len(data))) :]
        elif how == 4:
            data[int(rng.integers(len(data))) :] = rng.bytes(300)
        else:
            # All over the file, in its header, or a whole stretch of it.
            reach = len(data) if how == 1 else 64
            for _ in range(8 if how < 3 else 64):
                place = int(rng.integers(reach))
                data[place] = 0 if how == 3 else data[place] ^ (1 << int(rng.integers(8)))
        try:
            view = TrainTransform(28, RandAugment())(decode.open_image(bytes(data)), rng)
            assert view.shape == (28, 28, 3)
            readable += 1
        except Unreadable:
            pass
    assert 40 < readable < 360
