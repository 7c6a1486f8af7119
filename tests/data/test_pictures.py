"""Pictures as people have them: every format, more than 8 bits, transparency, and what lies beside
them in their folders.
"""

import io
import os
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import photograph
from PIL import Image

from proteus_jax.config import Override, load
from proteus_jax.data import decode, image_formats
from proteus_jax.data.dataset import Reading, open_images, open_source
from proteus_jax.data.datasets.labeled import open_pair
from proteus_jax.data.passed_over import PassedOver
from proteus_jax.data.pillow_images import Decoding, deep_image
from proteus_jax.data.sources import image_folder
from proteus_jax.data.splits import HeldOut
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.training.schema import schema_of

# 0 to 65535 in equal steps.
RAMP = np.linspace(0, 65535, 40 * 50).round().reshape(40, 50).astype(np.uint16)
GRAY = np.rint(RAMP.astype(np.float64) * 255 / 65535)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTEUS_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def encoded(array: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def colors(values: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, values[..., ::-1])[1].tobytes()


DEEP = {
    "png": lambda values: encoded(values, "PNG"),
    "tiff": lambda values: encoded(values, "TIFF"),
    "tiff, compressed": lambda values: encoded(values, "TIFF", compression="tiff_lzw"),
    "tiff of 32 bits": lambda values: encoded(values.astype(np.int32), "TIFF"),
    "tiff of floats": lambda values: encoded(values.astype(np.float32), "TIFF"),
    "jpeg 2000": lambda values: encoded(values, "JPEG2000"),
    "pgm": lambda values: cv2.imencode(".pgm", values)[1].tobytes(),
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("shift", [4, 6, 8])
def test_the_range_that_a_file_uses_becomes_black_to_white(kind: str, shift: int) -> None:
    """12, 10 or 8 bits in a file of 16 or more: at 65535 / 255 a step all would be black."""
    pixels = decode.decode(DEEP[kind](RAMP >> shift))
    expected = np.rint((RAMP >> shift) * (255 / (65535 >> shift)))
    assert np.array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff, compressed", "jpeg 2000", "pgm"])
def test_a_file_that_uses_all_bits_is_as_it_is(kind: str) -> None:
    dark = np.clip(RAMP, 9000, 40000)
    assert np.array_equal(decode.decode(DEEP[kind](dark))[..., 1], np.rint(dark * (255 / 65535)))


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".ppm", ".jp2"])
def test_colors_of_more_than_8_bits_share_one_range(suffix: str) -> None:
    """Pillow would keep the upper 8 bits of 16 and show 12 bits nearly black."""
    values = np.stack([RAMP >> 4, RAMP[::-1] >> 5, np.full_like(RAMP, 100)], axis=-1)
    pixels = decode.decode(colors(values, suffix)).astype(int)
    assert np.abs(pixels - np.rint(values * (255 / 4095))).max() <= (1 if suffix == ".jp2" else 0)


def test_floats_from_0_to_1_are_as_they_are_and_others_stretched() -> None:
    share = (RAMP / 65535).astype(np.float32)
    assert np.array_equal(decode.decode(encoded(share, "TIFF"))[..., 0], np.rint(share * 255.0))
    assert np.array_equal(decode.decode(encoded(share * 80 - 40, "TIFF"))[..., 0], GRAY)
    share[3, 4] = np.nan
    assert decode.decode(encoded(share, "TIFF"))[3, 4].tolist() == [0, 0, 0]
    of_colors = np.stack([share] * 3, axis=-1)
    assert decode.decode(colors(np.nan_to_num(of_colors), ".tiff"))[..., 2].max() == 255
    with pytest.raises(Unreadable, match="none that is finite"):
        decode.decode(encoded(np.full((8, 8), np.nan, np.float32), "TIFF"))


def test_a_range_can_be_declared() -> None:
    data = encoded(RAMP >> 4, "PNG")
    assert decode.decode(data, Decoding.of("full", "drop")).max() == round(4095 * 255 / 65535)
    window = decode.decode(data, Decoding.of("1000,2000", "drop"))[..., 0]
    expected = np.rint(((RAMP >> 4).astype(float) - 1000) * 0.255).clip(0, 255)
    assert np.array_equal(window, expected)
    # What has 8 bits is not touched.
    plain = encoded(GRAY.astype(np.uint8), "PNG")
    assert np.array_equal(decode.decode(plain, Decoding.of("1000,2000", "drop"))[..., 0], GRAY)


def test_one_value_everywhere_is_not_black() -> None:
    assert decode.decode(encoded(np.full((9, 9), 1000, np.uint16), "PNG")).min() > 200
    assert deep_image(encoded(RAMP >> 4, "PNG")).used() == (0, 4095)  # pyright: ignore[reportOptionalMemberAccess]
    assert deep_image(encoded(GRAY.astype(np.uint8), "PNG")) is None


def test_transparency_is_dropped_or_laid_on_a_color(tmp_path: Path) -> None:
    """A red disk whose page is transparent, with a hidden blue under it."""
    rows, columns = np.mgrid[:40, :40]
    inside = (rows - 20) ** 2 + (columns - 20) ** 2 < 100
    image = np.where(inside[..., None], [200, 30, 30, 255], [0, 0, 250, 0]).astype(np.uint8)
    half = image.copy()
    half[..., 3] = 51
    white = Decoding.of("auto", "white")
    for name, array, on_white in (
        ("whole", image, np.where(inside[..., None], [200, 30, 30], [255] * 3)),
        ("a fifth", half, np.rint(half[..., :3] * 0.2 + 255 * 0.8)),
    ):
        for data in (
            encoded(array, "PNG"),
            encoded(array, "TIFF"),
            encoded(array, "WEBP", lossless=True, exact=True),
        ):
            assert np.array_equal(decode.decode(data), array[..., :3]), name
            assert np.abs(decode.decode(data, white) - on_white).max() <= 1, name
    deep = image.astype(np.uint16) * 257
    data = cv2.imencode(".png", deep[..., [2, 1, 0, 3]])[1].tobytes()
    assert np.array_equal(decode.decode(data), image[..., :3])
    gray = Decoding.of("full", "#102030")
    assert decode.decode(data, gray)[0, 0].tolist() == [0x10, 0x20, 0x30]
    palette = Image.fromarray(GRAY.astype(np.uint8)).quantize(4)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=palette.getpixel((0, 0)))
    assert decode.decode(file.getvalue(), white)[0, 0].tolist() == [255] * 3
    (tmp_path / "disk.png").write_bytes(encoded(image, "PNG"))
    source, _ = open_source(str(tmp_path), Reading(decoding=white))
    split = open_images(
        [str(tmp_path)], held_out=HeldOut(0.0, 1, 1), reading=Reading(decoding=white)
    )
    for seen in (source, split.training):
        assert seen.open(0).pixels()[0, 0].tolist() == [255] * 3


def test_other_numbers_of_channels_are_named() -> None:
    """A TIFF of five channels: Pillow has no mode for it."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, "TIFF")
    data = bytearray(file.getvalue())
    # The entry of SamplesPerPixel, 277, has its value in its last four bytes.
    at = data.index((277).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    data[at + 8 : at + 10] = (5).to_bytes(2, "little")
    with pytest.raises(Unreadable, match="expected 1, 3 or 4 channels, found 5"):
        decode.decode(bytes(data))


FORMATS = {
    "a.tif": "TIFF", "b.TIFF": "TIFF", "c.avif": "AVIF", "d.gif": "GIF", "e.jp2": "JPEG2000",
    "f.jfif": "JPEG", "g.jpe": "JPEG", "h.ppm": "PPM", "i.pgm": "PPM", "j.tga": "TGA",
    "k.ico": "ICO", "l.qoi": "QOI", "m": "PNG", "n": "TIFF", "o.dds": "DDS", "p.sgi": "SGI",
    "q.pcx": "PCX", "r.jpg": "WEBP", "s.png": "AVIF", "t": "AVIF",
}  # fmt: skip


@pytest.mark.parametrize("small", [True, False])
def test_every_format_that_pillow_decodes(
    tmp_path: Path, rng: np.random.Generator, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By suffix, and without one by content."""
    monkeypatch.setattr(image_folder, "SMALL", 100 if small else 1)
    picture = photograph(rng, 64, 64)
    for name, kind in FORMATS.items():
        (tmp_path / name).write_bytes(
            encoded(picture[..., 0] if name == "i.pgm" else picture, kind)
        )
    (tmp_path / "notes").write_text("no image")
    (tmp_path / "x.svg").write_text("<svg/>")
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    source, passed_over = open_source(str(tmp_path))
    names = [source.name(index) for index in range(len(source))]
    assert names == sorted(FORMATS)
    assert passed_over == PassedOver({"no suffix": 1, ".svg": 1, ".heic": 1})
    assert open_source(str(tmp_path))[1] == passed_over, "the same from the cache"
    for index, name in enumerate(names):
        pixels = source.open(index).pixels()
        assert pixels.shape == (64, 64, 3), name
        if name != "i.pgm":
            assert np.abs(pixels.astype(int) - picture).mean() < 8, name


def test_pages_and_frames_are_the_first(rng: np.random.Generator) -> None:
    first, second = photograph(rng), photograph(rng)
    for kind in ("TIFF", "GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        more = [Image.fromarray(second)]
        Image.fromarray(first).save(file, kind, save_all=True, append_images=more, lossless=True)
        assert np.abs(decode.decode(file.getvalue()).astype(int) - first).mean() < 8, kind


def test_formats_are_those_of_pillow() -> None:
    """All but those that run programs, decode nothing, or are of one system."""
    Image.init()
    left_out = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    of_left_out = {s for s, kind in Image.registered_extensions().items() if kind in left_out}
    assert known - of_left_out <= {*image_formats.SUFFIXES, ".heic", ".heif", ".hif"}
    assert {name for name in image_formats.FORMATS if name != "HEIF"} <= set(Image.OPEN)


CLUTTER = (
    ".hidden/1.png", ".ipynb_checkpoints/1-checkpoint.png", "@eaDir/1.png/SYNOPHOTO_THUMB_M.png",
    "__MACOSX/._1.png", "a/._1.png", "a/Thumbs.db", "a/.DS_Store", "a/@eaDir/2.png",
)  # fmt: skip


@pytest.mark.parametrize("place", ["folder", "large folder", "store", "list", "zip", "tar"])
def test_what_is_hidden_is_passed_over_everywhere(
    tmp_path: Path, rng: np.random.Generator, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    folder = tmp_path / ".data" / "set"
    taken = ["a/1.png", "a/2.png", "b/3.png"]
    for name in (*taken, *CLUTTER):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(photograph(rng, 8, 8), "PNG"))
    root, archived = str(folder), tmp_path / f"set.{place}"
    if place == "large folder":
        monkeypatch.setattr(image_folder, "SMALL", 1)
    elif place == "store":
        root = f"file://{folder}"
    elif place == "list":
        listed = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        (tmp_path / "list.txt").write_text("\n".join(map(str, listed)))
        root = str(tmp_path / "list.txt")
    elif place == "zip":
        root = str(archived)
        with zipfile.ZipFile(archived, "w") as archive:
            for path in folder.rglob("*"):
                archive.write(path, path.relative_to(folder))
    elif place == "tar":
        root = str(archived)
        with tarfile.open(archived, "w") as archive:
            archive.add(folder, "set")
    source, passed_over = open_source(root)
    paths = [str(source.path(index)) for index in range(len(source))]
    assert [path[-7:] for path in sorted(paths)] == taken
    assert passed_over.hidden == len(CLUTTER), "each is in a place of its own"


def test_a_place_that_is_there_is_never_absent(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "one.tif").write_bytes(encoded(photograph(rng), "TIFF"))
    assert len(open_source(str(tmp_path / "one.tif"))[0]) == 1
    (tmp_path / "without suffix").write_bytes(encoded(photograph(rng), "PNG"))
    assert len(open_source(str(tmp_path / "without suffix"))[0]) == 1
    for name, content, words in (
        ("paper.pdf", b"%PDF-1.7", "found a .pdf file that is none of these"),
        ("README", b"hello", "found a file without a suffix"),
        ("empty.jpg", b"", "found a .jpg file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            open_source(str(tmp_path / name))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=r"no image below it .*, but nothing at all"):
        open_source(str(tmp_path / "nothing"))
    (tmp_path / "papers").mkdir()
    for number in range(3):
        (tmp_path / "papers" / f"{number}.pdf").touch()
    with pytest.raises(InputError, match=r"but 3 files of other kinds \(3 \.pdf\)"):
        open_source(str(tmp_path / "papers"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="expected a folder or a file, found neither"):
        open_source(str(tmp_path / "pipe"))


def test_a_comma_in_a_path(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "cats, and dogs"
    folder.mkdir()
    (folder / "1.png").write_bytes(encoded(photograph(rng), "PNG"))
    for text, roots in (
        (str(folder), (str(folder),)),
        (f"{tmp_path},{tmp_path}", (str(tmp_path), str(tmp_path))),
    ):
        config, problems = load("base", [Override("data.root", text)], schema_of)
        assert problems == []
        assert config.data.root == roots


def test_fields_of_reading_are_checked() -> None:
    def wrong(field: str, text: str) -> list[str]:
        return load("base", [Override(field, text)], schema_of)[1]

    assert wrong("data.range", "0,4095") == wrong("data.alpha", "white") == []
    assert (
        "expected auto, full, or two numbers LOW,HIGH, found '9,3'" in wrong("data.range", "9,3")[0]
    )
    assert "expected drop, or a color as white or #808080" in wrong("data.alpha", "nocolor")[0]


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_zip_files(tmp_path: Path, rng: np.random.Generator) -> None:
    members = {
        f"set/{split}/{name}/{number}.{kind.lower()}": encoded(photograph(rng), kind)
        for split, count in (("train", 3), ("test", 2))
        for name in ("cat", "dog")
        for number in range(count)
        for kind in ("PNG", "BMP")
    }
    zipped(tmp_path / "set.zip", {**members, "set/readme.md": b"x", "../evil.png": b"x"})
    source, passed_over = open_source(str(tmp_path / "set.zip"))
    assert passed_over == PassedOver({".md": 1}, links=1)
    found = {source.name(i).split(": ")[1]: source.read(i) for i in range(len(source))}
    assert found == members
    pair = open_pair(str(tmp_path / "set.zip"))
    assert pair.train.classes == ("cat", "dog")
    assert np.bincount(pair.train.labels).tolist() == [6, 6]
    assert np.bincount(pair.test.labels).tolist() == [4, 4]
    for index, label in enumerate(pair.test.labels):
        assert f"test/{pair.test.classes[label]}/" in pair.test.source.name(index)
    zipped(tmp_path / "none.zip", {"a.txt": b"x"})
    with pytest.raises(InputError, match=r"but 1 file of other kinds \(1 \.txt\)"):
        open_source(str(tmp_path / "none.zip"))
    (tmp_path / "no.zip").write_bytes(b"no")
    with pytest.raises(InputError, match="expected a zip file"):
        open_source(str(tmp_path / "no.zip"))
    # A member without a suffix is looked into; a broken one is no image.
    zipped(tmp_path / "spoilt.zip", {"a.png": b"x" * 50, "b": b"y" * 5000})
    data = bytearray((tmp_path / "spoilt.zip").read_bytes())
    at = data.index(b"PK\x03\x04", 4)
    data[at + 31 : at + 35] = b"\xff" * 4
    (tmp_path / "spoilt.zip").write_bytes(data)
    assert open_source(str(tmp_path / "spoilt.zip"))[1] == PassedOver({"no suffix": 1})
    zipped(tmp_path / "odd.zip", {"a.png": b"x" * 50}, zipfile.ZIP_LZMA)
    with pytest.raises(InputError, match="packed in an uncommon way"):
        open_source(str(tmp_path / "odd.zip"))


def test_a_zip_file_that_lies_about_sizes(tmp_path: Path) -> None:
    """A member that unpacks to more than its directory says, and one that claims gigabytes."""
    bomb = tmp_path / "bomb.zip"
    zipped(bomb, {"a.bmp": b"BM" + b"\0" * 200_000})
    data = bomb.read_bytes()
    for size, words in ((1000, "broken in its archive"), (1 << 31, "bytes are more than")):
        directory = data.rindex(b"PK\x01\x02")
        bomb.write_bytes(
            data[: directory + 24] + size.to_bytes(4, "little") + data[directory + 28 :]
        )
        source, _ = open_source(str(bomb))
        with pytest.raises(Unreadable, match=words):
            source.read(0)


def test_links_of_an_archive_lead_nowhere(tmp_path: Path, rng: np.random.Generator) -> None:
    import tarfile

    (tmp_path / "secret.png").write_bytes(encoded(photograph(rng), "PNG"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "secret.png", "1.png")
        for name, kind in (("2.png", tarfile.SYMTYPE), ("3.png", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "../secret.png"
            archive.addfile(link)
        archive.add(tmp_path / "secret.png", "x/../../4.png")
    source, passed_over = open_source(str(tmp_path / "a.tar"))
    assert len(source) == 1
    assert passed_over.links == 3
    info = zipfile.ZipInfo("link.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "../secret.png")
        archive.write(tmp_path / "secret.png", "1.png")
    source, passed_over = open_source(str(tmp_path / "a.zip"))
    assert len(source) == 1
    assert passed_over.links == 1
