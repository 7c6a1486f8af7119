"""Folders, lists, shards, records, mixtures: what they hold, how they are split, and refusals."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from conftest import ROOT, photograph
from PIL import Image

from proteus_jax.config import Override, load
from proteus_jax.data.dataset import open_images, open_source
from proteus_jax.data.datasets import labeled
from proteus_jax.data.mmap_table import read_table, write_table
from proteus_jax.data.passed_over import PassedOver
from proteus_jax.data.sources import image_folder as folders
from proteus_jax.data.sources import skimage
from proteus_jax.data.sources.base import MemorySource, Source
from proteus_jax.data.splits import HeldOut, Split, Subset
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.training.inputs import open_split
from proteus_jax.training.schema import schema_of

NONE = HeldOut(0.0, 1, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PROTEUS_JAX_CACHE", str(directory))
    return directory


def open_folder(root: Path, held_out: HeldOut) -> Split:
    return open_images([str(root)], held_out=held_out)


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def names_of(source: Source) -> list[str]:
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
    assert split.passed_over == PassedOver(
        {".txt": 1}, no_images=("empty.jpg", "gone.png", "text.png")
    )


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


@pytest.mark.parametrize("small", [True, False])
def test_fingerprint_tells_names_contents_and_classes(
    tmp_path: Path, rng: np.random.Generator, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large folder by names and sizes, of a small one by contents."""
    monkeypatch.setattr(folders, "SMALL", 10 if small else 1)
    for name in ("x/a.png", "x/b.png", "y/c.png"):
        save(tmp_path / name, photograph(rng))
    seen = {open_source(str(tmp_path))[0].fingerprint}
    changes = [
        # Into another class, under a name that keeps its place.
        lambda: (tmp_path / "x/b.png").rename(tmp_path / "y/b.png"),
        lambda: (tmp_path / "y/b.png").rename(tmp_path / "y/bb.png"),
        # As a program that syncs folders replaces a file: of a large one no file is looked at
        # while its directories stay as they are.
        lambda: save(tmp_path / "x/new.png", photograph(rng, 61, 80)),
        lambda: (tmp_path / "x/new.png").rename(tmp_path / "x/a.png"),
        lambda: (tmp_path / "y/c.png").unlink(),
    ]
    for number, change in enumerate(changes, 2):
        change()
        seen.add(open_source(str(tmp_path))[0].fingerprint)
        assert len(seen) == number


def test_fingerprint_of_a_small_folder_tells_equal_sizes_apart(tmp_path: Path) -> None:
    """One bit of a pixel, and a file that goes on differently after its beginning."""
    folder = tmp_path / "images"
    for level in (0, 1):
        save(folder / "a.bmp", np.full((4, 4, 3), level, np.uint8))
        save(tmp_path / f"{level}.bmp", np.full((4, 4, 3), level, np.uint8))
    one = open_source(str(folder))[0]
    (folder / "a.bmp").write_bytes((tmp_path / "0.bmp").read_bytes())
    other = open_source(str(folder))[0]
    assert one.fingerprint != other.fingerprint
    assert one.digests() != other.digests()
    large = bytearray((tmp_path / "0.bmp").read_bytes() + bytes(folders.HASHED_BYTES))
    (folder / "a.bmp").write_bytes(large)
    longer = open_source(str(folder))[0]
    (folder / "a.bmp").write_bytes(large + b"1")
    assert open_source(str(folder))[0].digests() != longer.digests()


def test_fingerprint_of_shards_tells_names_and_sizes(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Parquet files of as many rows; tar shards whose members have other classes."""

    def written(name: str, content: bytes) -> str:
        for old in tmp_path.glob("*.parquet"):
            old.unlink()
        pq.write_table(pa.table({"image": [content] * 2}), tmp_path / name)
        return open_source(str(tmp_path))[0].fingerprint

    first = written("a.parquet", b"x" * 100)
    assert written("a.parquet", b"x" * 100) == first
    assert written("b.parquet", b"x" * 100) != first
    # Bytes that do not compress, so that the file is longer.
    assert written("a.parquet", rng.bytes(3000)) != first
    contents = [encoded(rng), encoded(rng)]
    seen = set()
    for labels in ("01", "10"):
        with tarfile.open(tmp_path / "a.tar", "w") as shard:
            for number, content in enumerate(contents):
                for suffix, data in (("png", content), ("cls", labels[number].encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
        source, _ = open_source(str(tmp_path / "a.tar"))
        found = source.labels()
        assert found is not None
        assert "".join(map(str, found.tolist())) == labels
        seen.add(source.fingerprint)
    assert len(seen) == 2


@pytest.mark.parametrize("known", [True, False])
def test_what_is_held_out_is_no_class_alone(
    tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By content, or by numbers where contents are not known: some of each of four classes."""
    monkeypatch.setattr(folders, "SMALL", 1000 if known else 1)
    for number in range(80):
        save(
            tmp_path / f"class {number // 20}" / f"{number:02}.png",
            np.full((4, 4, 3), number, np.uint8),
        )
    split = open_folder(tmp_path, HeldOut(0.25, 1, 99))
    assert split.held_out is not None
    assert len(split.held_out) == 20
    held_out = [Path(name).parent.name for name in names_of(split.held_out)]
    assert {held_out.count(f"class {number}") > 0 for number in range(4)} == {True}


def test_nothing_is_left_where_as_many_are_held_out(tmp_path: Path) -> None:
    for number in range(16):
        save(tmp_path / f"{number}.png", np.full((4, 4, 3), number, np.uint8))
    with pytest.raises(InputError, match="found 16 images of which 16 would be held out"):
        open_folder(tmp_path, HeldOut(0.02, 16, 1024))
    split = open_folder(tmp_path, HeldOut(0.02, 15, 1024))
    assert len(split.training) == 1


HELD_OUT = (("share", "0.5"), ("minimum", "2"), ("maximum", "30"))


def test_a_configurations_shares_are_taken_in_their_order(tmp_path: Path) -> None:
    for number in range(80):
        save(
            tmp_path / f"class {number // 20}" / f"{number:02}.png",
            np.full((4, 4, 3), number, np.uint8),
        )
    overrides = [
        Override("data.root", str(tmp_path)),
        *(Override(f"data.held_out.{name}", value) for name, value in HELD_OUT),
        *(Override("data.subset.classes", "0.5"), Override("data.subset.images", "0.25")),
        Override("seed", "3"),
    ]
    configuration, problems = load(str(ROOT / "configs" / "vits14.py"), overrides, schema_of)
    assert not problems
    split = open_split(configuration)
    assert split.held_out is not None
    assert len(split.held_out) == 30
    kept = [Path(name).parent.name for name in names_of(split.training)]
    assert len(set(kept)) == 2
    # A quarter of what is left of each of two classes.
    left = [20 - sum(c in name for name in names_of(split.held_out)) for c in sorted(set(kept))]
    assert [kept.count(c) for c in sorted(set(kept))] == [max(1, round(n / 4)) for n in left]


def test_paths_that_are_no_unicode(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "a.png", photograph(rng))
    (tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    source = open_folder(tmp_path, NONE).training
    assert len(source) == 1
    code = f"from proteus_jax.runtime.console import Console; Console().line({source.name(0)!r})"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert shown.stdout == b"\\udcff.png\n"


def encoded(rng: np.random.Generator, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photograph(rng)).save(buffer, kind)
    return buffer.getvalue()


def assert_holds(source: Source, contents: list[bytes]) -> None:
    """Those files in that order, also in another process."""
    for opened in (source, pickle.loads(pickle.dumps(source))):
        assert isinstance(opened, Source)
        assert len(opened) == len(contents)
        assert opened.fingerprint == source.fingerprint
        for index in (len(contents) - 1, *range(len(contents))):
            assert opened.read(index) == contents[index]
            assert opened.name(index)


@pytest.fixture
def contents(rng: np.random.Generator) -> list[bytes]:
    return [encoded(rng, kind) for kind in ("PNG", "JPEG", "PNG", "WEBP", "JPEG", "PNG")]


def write_tar(path: Path, contents: list[bytes], labels: bool = True) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for number, content in enumerate(contents):
            for name, data in (
                (f"a/{number:03}.photo.jpg", content),
                (f"a/{number:03}.cls", str(number % 2).encode()),
                (f"a/{number:03}.json", b"{}"),
            ):
                if labels or not name.endswith(".cls"):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))


def test_tar_shards(tmp_path: Path, contents: list[bytes]) -> None:
    for number in range(3):
        write_tar(tmp_path / f"train-{number:02}.tar", contents[2 * number : 2 * number + 2])
    (tmp_path / "sizes.json").write_text("{}")
    for root in ("", "train-{00..02}.tar", "train-*.tar"):
        source, _ = open_source(str(tmp_path / root))
        assert_holds(source, contents)
    labels = source.labels()
    assert labels is not None
    assert labels.tolist() == [0, 1] * 3
    assert source.name(5) == f"{tmp_path}/train-02.tar: a/001.photo.jpg"
    before = source.fingerprint
    write_tar(tmp_path / "train-01.tar", contents[:2], labels=False)
    changed, _ = open_source(str(tmp_path))
    assert_holds(changed, contents[:2] * 2 + contents[4:])
    assert changed.fingerprint != before
    labels = changed.labels()
    assert labels is not None
    assert labels.tolist() == [0, 1, -1, -1, 0, 1]


def test_images_of_one_name_in_two_folders_of_a_shard(
    tmp_path: Path, contents: list[bytes]
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for folder, number in (("x", 4), ("y", 7)):
            for suffix, data in (("jpg", contents[0]), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{folder}/same.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    labels = open_source(str(tmp_path / "a.tar"))[0].labels()
    assert labels is not None
    assert labels.tolist() == [4, 7]


def test_what_is_no_tar_shard(tmp_path: Path, contents: list[bytes]) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(contents[0])
    with pytest.raises(InputError, match=r"a\.tar: expected an uncompressed tar file"):
        open_source(str(shard))
    write_tar(shard, contents)
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"a\.tar: "):
        open_source(str(shard))
    write_tar(shard, [])
    with pytest.raises(InputError, match="no image"):
        open_source(str(shard))
    with pytest.raises(InputError, match="compressed tar file has no random access"):
        open_source(str(tmp_path / "a.tar.gz"))
    with pytest.raises(InputError, match=r"b-00001\.tar: no such file"):
        open_source(str(tmp_path / "b-{00001..00003}.tar"))


@pytest.mark.parametrize("nested", [True, False])
def test_parquet(tmp_path: Path, contents: list[bytes], nested: bool) -> None:
    """As Hugging Face writes image sets, and with plain bytes."""
    for number in range(2):
        part = contents[3 * number : 3 * number + 3]
        column = [{"bytes": content, "path": None} for content in part] if nested else part
        table = pa.table({"label": [number, 7, number], "image": column})
        pq.write_table(table, tmp_path / f"train-{number}.parquet", row_group_size=2)
    source, _ = open_source(str(tmp_path))
    assert_holds(source, contents)
    assert source.name(5) == f"{tmp_path}/train-1.parquet: row 0 of group 1"
    labels = source.labels()
    assert labels is not None
    assert labels.tolist() == [0, 7, 0, 1, 7, 1]
    remote, _ = open_source(f"file://{tmp_path}/train-*.parquet")
    assert [remote.read(index) for index in range(6)] == contents


def test_images_come_from_the_column_that_is_called_so(
    tmp_path: Path, contents: list[bytes]
) -> None:
    """Not from masks before it; a column of other bytes serves where none is called so."""
    table = {"mask": [b"m", b"n"], "image": contents[:2], "cls": [3, 1]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    source, _ = open_source(str(tmp_path / "a.parquet"))
    assert_holds(source, contents[:2])
    labels = source.labels()
    assert labels is not None
    assert labels.tolist() == [3, 1]
    pq.write_table(pa.table({"n": [1, 2], "scan": contents[2:4]}), tmp_path / "b.parquet")
    assert_holds(open_source(str(tmp_path / "b.parquet"))[0], contents[2:4])


def test_shards_of_a_store_lie_in_the_folder_named(tmp_path: Path, contents: list[bytes]) -> None:
    """Not in folders below; an address may write a space as %20."""
    folder = tmp_path / "my shards"
    (folder / "val").mkdir(parents=True)
    for place, part in ((folder, contents[:2]), (folder / "val", contents[2:])):
        pq.write_table(pa.table({"image": part}), place / "train-0.parquet")
    for address in (f"file://{folder}/train-*.parquet", f"file://{tmp_path}/my%20shards/*.parquet"):
        assert_holds(open_source(address)[0], contents[:2])


def test_what_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(InputError, match=r"a\.parquet: expected a parquet file"):
        open_source(str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"expected a column of images .*, found text"):
        open_source(str(tmp_path / "b.parquet"))
    pq.write_table(pa.table({"image": [b"x", None]}), tmp_path / "c.parquet")
    source, _ = open_source(str(tmp_path / "c.parquet"))
    with pytest.raises(Unreadable, match="no image"):
        source.read(1)


def write_records(path: Path, records: list[bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_records(tmp_path: Path, contents: list[bytes]) -> None:
    write_records(tmp_path / "a.array_record-00000-of-00002", contents[:4])
    write_records(tmp_path / "a.array_record-00001-of-00002", contents[4:])
    source, _ = open_source(str(tmp_path))
    assert_holds(source, contents)
    # A longer image in the last of the files is another data set.
    longer = contents[0] + np.random.default_rng(0).bytes(2**18)
    write_records(tmp_path / "a.array_record-00001-of-00002", [contents[4], longer])
    assert open_source(str(tmp_path))[0].fingerprint != source.fingerprint
    write_records(tmp_path / "b.array_record", [b"text"])
    with pytest.raises(InputError, match=r"expected records that are image files, found .*text"):
        open_source(str(tmp_path / "b.array_record"))
    with pytest.raises(InputError, match="read from a disk"):
        open_source("gs://bucket/a.array_record")


def test_a_builder_of_tensorflow_datasets(tmp_path: Path, contents: list[bytes]) -> None:
    """Prepared and read without TensorFlow."""
    import tensorflow_datasets as tfds

    class Mine(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "picture": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, content in enumerate(contents):
                path = tmp_path / f"{number}.png"
                path.write_bytes(content)
                yield number, {"picture": str(path), "label": number % 3}

    builder = Mine(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    source, _ = open_source(f"tfds:{builder.data_dir}")
    read = [bytes(source.read(index)) for index in range(len(source))]
    assert sorted(read) == sorted(contents)
    assert_holds(source, read)
    for _ in range(2):  # the second time out of the cache
        labels = source.labels()
        assert labels is not None
        assert [contents.index(content) % 3 for content in read] == labels.tolist()
    # Examples of one number in two splits are not the same image.
    assert source.key(0).split()[-2:] == ["train", "0"]
    with pytest.raises(InputError, match="expected a split out of train, found test"):
        open_source(f"tfds:{builder.data_dir}:test")
    with pytest.raises(InputError, match="is named as tfds:NAME or tfds:DIRECTORY"):
        open_source(str(builder.data_dir))


def test_what_is_no_tfds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match="tfds:nothing_such: tensorflow-datasets cannot open it"):
        open_source("tfds:nothing_such")
    with pytest.raises(InputError, match="tfds:mnist: expected "):
        open_source("tfds:mnist")


def test_a_list_of_paths(tmp_path: Path, contents: list[bytes]) -> None:
    for number, content in enumerate(contents):
        (tmp_path / f"{number} ü.img").write_bytes(content)
    names = [f"{number} ü.img" for number in (3, 1, 4)]
    text = "# chosen\n\n" + "\n".join([names[0], str(tmp_path / names[1]), names[2]])
    (tmp_path / "list.txt").write_text(text)
    source, _ = open_source(str(tmp_path / "list.txt"))
    assert_holds(source, [contents[3], contents[1], contents[4]])
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\na.jpg\n")
    with pytest.raises(InputError, match=r"names a\.jpg twice"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(InputError, match="names no image"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf0 \xc3\xbc.img\r\n2 \xc3\xbc.img\r\n")
    assert_holds(open_source(str(tmp_path / "list.txt"))[0], [contents[0], contents[2]])
    (tmp_path / "list.txt").write_bytes(b"0.img\0001.img\0")
    with pytest.raises(InputError, match="one path a line, found bytes of zero"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("gone.jpg\n")
    with pytest.raises(InputError, match=r"1 of its files are missing, as gone\.jpg"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("0 ü.img\nlist.txt\n")
    with pytest.raises(InputError, match=r"1 of its files are no images, as list\.txt"):
        open_source(str(tmp_path / "list.txt"))


def test_a_folder_on_a_store(photographs: Path) -> None:
    here, _ = open_source(str(photographs))
    there, _ = open_source(f"file://{photographs}")
    assert names_of(there) == names_of(here)
    assert there.read(7) == here.read(7)
    with pytest.raises(InputError, match=r"nowhere://bucket/: expected an address on gs://"):
        open_source("nowhere://bucket")


def test_names_in_capitals_on_a_store(tmp_path: Path, contents: list[bytes]) -> None:
    (tmp_path / "A.JPEG").write_bytes(contents[1])
    (tmp_path / "b.JPG").write_bytes(contents[4])
    assert_holds(open_source(f"file://{tmp_path}")[0], [contents[1], contents[4]])


def test_a_large_folder_by_another_name_is_the_same(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to it has the same keys, when it is listed and when the listing is found again."""
    monkeypatch.setattr(folders, "SMALL", 10)
    link = tmp_path / "link"
    link.symlink_to(photographs)
    keys = [open_source(str(place))[0].key(3) for place in (photographs, link, link)]
    assert len(set(keys)) == 1


def test_folders_of_one_name_are_two_classes(tmp_path: Path, rng: np.random.Generator) -> None:
    for place in ("a/left", "b/left"):
        save(tmp_path / place / "x.png", photograph(rng, 8, 8))
    labels = open_source(str(tmp_path))[0].labels()
    assert labels is not None
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 63, 64, 65, 128])
def test_a_listing_of_any_length_is_found_again(tmp_path: Path, count: int) -> None:
    """Whatever its last column fills of the file."""
    columns = {
        "text": np.frombuffer(b"a" * count, np.uint8),
        "ends": np.arange(count, dtype=np.int64),
        "last": np.full(count, 7, np.uint8),
    }
    write_table(tmp_path / "table", {"count": count}, columns)
    found = read_table(tmp_path / "table")
    assert found.facts == {"count": count}
    for name, values in columns.items():
        np.testing.assert_array_equal(found.columns[name], values)


def test_the_listing_of_a_large_folder_is_kept(
    photographs: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "SMALL", 10)
    walked = []
    walk = folders.Walk
    monkeypatch.setattr(folders, "Walk", lambda root: walked.append(root) or walk(root))
    for number, path in enumerate(sorted(photographs.rglob("*.*"))):
        place = tmp_path / f"class {number % 4}" / f"{number}{path.suffix}"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(path.read_bytes())
    first, _ = open_source(str(tmp_path))
    assert len(first) == 40
    walks = len(walked)
    again, _ = open_source(str(tmp_path))
    assert len(walked) == walks, "listed again though nothing changed"
    assert names_of(again) == names_of(first)
    assert again.fingerprint == first.fingerprint
    assert len(pickle.dumps(again)) < 500, "workers share the file"
    assert_holds(again, [(tmp_path / name).read_bytes() for name in names_of(first)])
    labels = again.labels()
    assert labels is not None
    assert np.bincount(labels).tolist() == [10] * 4
    (tmp_path / "class 2" / "new.jpg").write_bytes((tmp_path / "class 0" / "0.jpg").read_bytes())
    changed, _ = open_source(str(tmp_path))
    assert len(changed) == 41
    assert changed.fingerprint != first.fingerprint
    # What cannot be kept, or is spoilt, is made again.
    for path in (cache / "listings").iterdir():
        path.write_bytes(b"spoilt")
    assert len(open_source(str(tmp_path))[0]) == 41
    split = open_images([str(tmp_path)], held_out=HeldOut(0.1, 1, 9))
    assert split.held_out is not None
    assert len(split.held_out) == 4
    assert not set(names_of(split.held_out)) & set(names_of(split.training))


def test_one_image_is_a_data_set(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "one.png", photograph(rng))
    split = open_images([str(tmp_path / "one.png")], held_out=HeldOut(0.02, 16, 1024))
    assert split.held_out is not None
    left, right = split.training.read(0), split.held_out.read(0)
    assert isinstance(left, np.ndarray)
    assert isinstance(right, np.ndarray)
    np.testing.assert_array_equal(np.hstack([left, right]), photograph(np.random.default_rng(0)))
    with pytest.raises(InputError, match=r"two\.png: No such file"):
        open_images([str(tmp_path / "two.png")], held_out=NONE)


def test_several_roots_are_one_data_set(photographs: Path, tmp_path: Path) -> None:
    sub = sorted(path for path in photographs.iterdir() if path.is_dir())
    split = open_images([str(path) for path in sub], held_out=HeldOut(0.02, 2, 4))
    assert sum(split.parts) == len(split.training) == 40 - 2 * len(sub)
    assert split.held_out is not None
    assert len(split.held_out) == 2 * len(sub)
    assert len(split.parts) == len(sub)
    for index in (0, split.parts[0], len(split.training) - 1):
        assert isinstance(split.training.read(index), bytes)
    with pytest.raises(InputError) as error:
        open_images([str(sub[0]), str(tmp_path / "a"), str(tmp_path / "b")], held_out=NONE)
    assert len(error.value.problems) == 2


def test_overlapping_roots_never_train_on_what_one_holds_out(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sub = sorted(path for path in photographs.iterdir() if path.is_dir())[1]
    favorites = tmp_path / "favourites.txt"
    favorites.write_text("\n".join(map(str, sorted(photographs.rglob("*.png"))[:6])))
    for small in (True, False):
        if not small:
            monkeypatch.setattr(folders, "SMALL", 1)
        split = open_images(
            [str(photographs), str(sub), str(favorites)], held_out=HeldOut(0.1, 2, 9)
        )
        assert split.held_out is not None
        out, kept = (
            {bytes(source.read(index)) for index in range(len(source))}
            for source in (split.held_out, split.training)
        )
        assert len(out) >= 6
        assert not out & kept
        assert sum(split.parts) == len(split.training)


def test_a_copy_of_a_held_out_image_is_not_trained_on(photographs: Path, tmp_path: Path) -> None:
    """In another root, under another name, and whichever root comes first: there are more copies
    there than that root holds out itself.
    """
    share = HeldOut(0.2, 2, 9)
    first = open_folder(photographs, share).held_out
    assert first is not None
    assert len(first) == 8
    for number in range(8):
        name = f"copy {number}{Path(first.name(number)).suffix}"
        (tmp_path / name).write_bytes(bytes(first.read(number)))
    for number in range(2):
        save(tmp_path / f"own {number}.png", np.full((9, 9, 3), number, np.uint8))
    for roots in ([photographs, tmp_path], [tmp_path, photographs]):
        split = open_images([str(root) for root in roots], held_out=share)
        assert split.held_out is not None
        out, kept = (
            [bytes(source.read(index)) for index in range(len(source))]
            for source in (split.held_out, split.training)
        )
        assert len(out) == 8 + 2
        assert set(out).isdisjoint(kept)
        # What neither root holds out is there: 32 of the one, at most two of the other.
        assert 32 <= len(kept) <= 34


def test_parts_of_one_picture_can_be_mixed_with_others(
    photographs: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    for place in ("a", "b"):
        save(tmp_path / place / "one.png", photograph(rng))
    roots = [str(tmp_path / "a" / "one.png"), str(tmp_path / "b" / "one.png"), str(photographs)]
    split = open_images(roots, held_out=HeldOut(0.1, 2, 9))
    assert split.parts == (1, 1, 36)
    assert split.held_out is not None
    assert len(split.held_out) == 6


def test_names_that_look_like_another_kind(photographs: Path, tmp_path: Path) -> None:
    """A folder is a folder, whatever it is called."""
    for name in ("my.target", "train.tar", "a.parquet", "pics.png", "x.json", "dir.txt"):
        (tmp_path / name).symlink_to(photographs)
        assert len(open_source(str(tmp_path / name))[0]) == 40
        assert len(open_images([str(tmp_path / name)], held_out=NONE).training) == 40
    (tmp_path / "backup.tar").touch()
    assert len(open_source(str(tmp_path))[0]) == 40  # the same images by many links, and a tar


def test_folders_of_shards(tmp_path: Path, contents: list[bytes]) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / "train-0000.tar.idx").touch()
    write_tar(tmp_path / "train-0000.tar", contents[:3])
    write_tar(tmp_path / "train-0001.tar", contents[3:])
    assert_holds(open_source(str(tmp_path))[0], contents)
    write_tar(tmp_path / "val-0000.tar", contents[:2])
    source, passed_over = open_source(str(tmp_path))
    assert_holds(source, contents)
    assert passed_over.suffixes["of the split val"] == 1
    assert_holds(open_source(str(tmp_path / "val*.tar"))[0], contents[:2])
    write_tar(tmp_path / "more-0000.tar", contents)
    with pytest.raises(
        InputError, match=r"several kinds, more\*\.tar, train\*\.tar, val\*\.tar; name .*/train\*"
    ):
        open_source(str(tmp_path))
    for number, split in enumerate(("train", "test")):
        name = f"mine-{split}.array_record-00000-of-00001"
        write_records(tmp_path / "records" / name, contents[number:])
    with pytest.raises(InputError, match=r"as .*/mine-train\.array_record-\*"):
        open_source(str(tmp_path / "records"))
    chosen, _ = open_source(str(tmp_path / "records" / "mine-test.array_record-*"))
    assert_holds(chosen, contents[1:])
    with pytest.raises(InputError, match="found nothing to count"):
        open_source(str(tmp_path / "train-{0005..0003}.tar"))


def test_what_cannot_be_listed_is_passed_over(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").symlink_to(photographs)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    source, passed_over = open_source(str(tmp_path))
    assert len(source) == 40
    assert passed_over.no_images == ("self.png",)


@pytest.mark.parametrize("small", [True, False])
def test_folders_that_cannot_be_read_are_named(
    tmp_path: Path, rng: np.random.Generator, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the others is taken."""
    monkeypatch.setattr(folders, "SMALL", 10 if small else 1)
    for name in ("open/a.png", "open/b.png", "shut/c.png"):
        save(tmp_path / name, photograph(rng, 8, 8))
    scan = os.scandir

    def refused(place: str) -> Any:
        if str(place).endswith("shut"):
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(folders.os, "scandir", refused)
    source, passed_over = open_source(str(tmp_path))
    assert names_of(source) == ["open/a.png", "open/b.png"]
    assert passed_over.unreadable == ("shut",)


def test_a_listing_that_is_cut_short_is_made_again(
    photographs: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "SMALL", 10)
    names = names_of(open_source(str(photographs))[0])
    (listing,) = (cache / "listings").iterdir()
    whole = listing.read_bytes()
    for length in range(0, len(whole), 64):
        listing.write_bytes(whole[:length])
        assert names_of(open_source(str(photographs))[0]) == names


def test_another_listing_is_noticed_in_a_worker(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "SMALL", 10)
    for path in photographs.rglob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    traveling = pickle.dumps(open_source(str(tmp_path))[0])
    (tmp_path / "one more.png").write_bytes((tmp_path / "image 1.png").read_bytes())
    open_source(str(tmp_path))
    with pytest.raises(InputError, match="listed anew while a run was starting"):
        pickle.loads(traveling)


def test_copies_of_one_image_cannot_be_held_out(tmp_path: Path, rng: np.random.Generator) -> None:
    for number in range(30):
        save(tmp_path / f"{number}.png", photograph(np.random.default_rng(0)))
    with pytest.raises(InputError, match="copies of each other"):
        open_images([str(tmp_path)], held_out=HeldOut(0.02, 16, 1024))
    save(tmp_path / "narrow.png", photograph(rng, 50, 2))
    with pytest.raises(InputError, match="at least 4 pixels across, found 2"):
        open_images([str(tmp_path / "narrow.png")], held_out=NONE)


def test_subsets(tmp_path: Path, rng: np.random.Generator) -> None:
    for number in range(60):
        save(tmp_path / f"class {number % 6}" / f"{number}.png", photograph(rng, 8, 8))

    def subset(seed: int, **shares: float) -> list[str]:
        split = open_images([str(tmp_path)], held_out=NONE, subset=Subset(**shares), seed=seed)
        return names_of(split.training)

    half = subset(0, classes=0.5)
    assert len(half) == 30
    assert len({Path(name).parent for name in half}) == 3
    assert subset(0, classes=0.5) == half
    assert {frozenset(subset(seed, classes=0.5)) for seed in range(5)} != {frozenset(half)}
    assert set(subset(0, classes=0.34)) < set(half), "a smaller subset lies in a larger one"
    assert len({frozenset(subset(seed, images=0.2)) for seed in range(4)}) == 4
    # What is held out first does not shift the classes of what is left.
    split = open_images(
        [str(tmp_path)], held_out=HeldOut(0.3, 1, 99), subset=Subset(classes=0.5), seed=0
    )
    assert split.held_out is not None
    left = Counter(Path(name).parent.name for name in names_of(split.training))
    out = Counter(Path(name).parent.name for name in names_of(split.held_out))
    assert len(left) == 3
    assert all(left[name] == 10 - out[name] for name in left)
    few = subset(3, images=0.2)
    assert len(few) == 12
    assert len({Path(name).parent for name in few}) == 6
    assert len(subset(3, classes=0.01, images=0.01)) == 1
    for number in range(60):
        path = tmp_path / f"class {number % 6}" / f"{number}.png"
        path.rename(tmp_path / path.name)
    assert len(subset(0, images=0.5)) == 30
    with pytest.raises(InputError, match="these images have no classes"):
        subset(0, classes=0.5)


def test_quickstarts_pictures(cache: Path, rng: np.random.Generator) -> None:
    """Left three quarters to train on; labeled, each tile is of the picture that it was cut from.
    A spoilt one is named with its remedy.
    """
    folder = cache / "pictures"
    folder.mkdir()
    shades = {}
    for number, name in enumerate(skimage.FILES):
        shades[name] = 12 * number
        plain = np.full((64, 200, 3), 12 * number, np.uint8)
        Image.fromarray(plain).save(folder / name)
    split = open_images([skimage.NAME], held_out=NONE)
    assert split.held_out is not None
    assert (len(split.training), len(split.held_out)) == (19, 19)
    assert np.asarray(split.training.read(3)).shape == (64, 150, 3)
    assert np.asarray(split.held_out.read(3)).shape == (64, 50, 3)
    pair = labeled.open_pair(skimage.NAME)
    for part in (pair.train, pair.test):
        assert part.classes == skimage.FILES
        for at in range(0, len(part.source), 7):
            tile = np.asarray(part.source.read(at))
            assert abs(tile.mean() - shades[part.classes[part.labels[at]]]) < 4
    (folder / "coins.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"spoilt .* remove the folder to fetch it again"):
        skimage.open_pictures()


def test_a_split_without_classes_has_none() -> None:
    """Test splits of public data sets carry the label -1, others none at all."""
    for values, words in ((None, "expected images with classes, found none"), ([-1, -1], "are -1")):
        source = MemorySource([np.zeros((8, 8, 3), np.uint8)] * 2, ["a", "b"])
        source.labels = lambda values=values: None if values is None else np.array(values)
        with pytest.raises(InputError, match=words):
            labeled.labeled("tfds:somewhere:test", source)
