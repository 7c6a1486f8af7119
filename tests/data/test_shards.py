"""Shards as people have them: labels of tar files by their full names, parquet of all kinds,
folders of shards with splits. A wrong label is worse than a refusal.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import photograph
from PIL import Image

from proteus_jax.data.dataset import Reading, open_source
from proteus_jax.data.datasets.labeled import open_labeled, open_pair
from proteus_jax.data.sources.base import Columns
from proteus_jax.errors import InputError, Unreadable

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTEUS_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    rng = np.random.default_rng(7)
    contents = []
    for _ in range(12):
        file = io.BytesIO()
        Image.fromarray(photograph(rng, 20, 20)).save(file, "PNG")
        contents.append(file.getvalue())
    return contents


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return str(path)


def label_of_each(root: str, contents: list[bytes]) -> dict[int, str]:
    """The class of each image, by its number in the contents."""
    found = open_labeled(root)
    return {
        contents.index(bytes(found.source.read(index))): found.classes[label]
        for index, label in enumerate(found.labels)
    }


def digit(i: int) -> bytes:
    return b"%d" % (i % 3)


def as_json(**values: Any) -> bytes:
    return json.dumps(values).encode()


# How the label of image i is told (None: the image), and the class that is meant.
TOLD = {
    "dots in names": lambda i: ([(f"22.{i:02}.jpg", None), (f"22.{i:02}.cls", digit(i))], i % 3),
    "two numbers": lambda i: ([(f"{i % 2}.{i}.jpg", None), (f"{i % 2}.{i}.cls", digit(i))], i % 3),
    "label first": lambda i: ([(f"{i}.cls", digit(i)), (f"{i}.jpg", None)], i % 3),
    "repeated keys": lambda i: ([(f"{i % 4}.jpg", None), (f"{i % 4}.cls", digit(i))], i % 3),
    "one key in a row": lambda i: ([(f"{i // 6}.jpg", None), (f"{i // 6}.cls", digit(i))], i % 3),
    "words": lambda i: (
        [(f"{i}.jpg", None), (f"{i}.cls", b"kind %d\n" % (i % 2))],
        f"kind {i % 2}",
    ),
    "capitals": lambda i: ([(f"{i}.JPG", None), (f"{i}.CLS", digit(i))], i % 3),
    "two parts": lambda i: ([(f"s{i}.input.jpg", None), (f"s{i}.target.cls", digit(i))], i % 3),
    "class.txt": lambda i: ([(f"{i}.jpg", None), (f"{i}.cls.txt", digit(i))], i % 3),
    "json": lambda i: ([(f"{i}.jpg", None), (f"{i}.json", as_json(label=i % 3))], i % 3),
    "json of words": lambda i: (
        [(f"{i}.json", as_json(caption="x", class_name="ab"[i % 2])), (f"{i}.jpg", None)],
        "ab"[i % 2],
    ),
    "cls beside json": lambda i: (
        [(f"{i}.jpg", None), (f"{i}.json", as_json(label=9)), (f"{i}.cls", digit(i))],
        i % 3,
    ),
    "folders": lambda i: ([(f"./set/{'ab'[i % 2]}/img {i}.jpg", None)], "ab"[i % 2]),
}


@pytest.mark.parametrize("kind", TOLD)
def test_labels_belong_to_their_images(tmp_path: Path, images: list[bytes], kind: str) -> None:
    members, expected = [], {}
    for i, content in enumerate(images):
        told, meant = TOLD[kind](i)
        members += [(name, content if data is None else data) for name, data in told]
        expected[i] = str(meant)
    root = write_tar(tmp_path / "a-000.tar", members)
    assert label_of_each(root, images) == expected


def test_labels_that_lie_apart(tmp_path: Path, images: list[bytes]) -> None:
    """All images first, then all labels; unclear ones get none."""
    names = [f"x.{i}" for i in range(12)]
    members = [(f"{name}.jpg", content) for name, content in zip(names, images, strict=True)]
    members += [(f"{name}.cls", b"%d" % (i % 2)) for i, name in enumerate(names)]
    root = write_tar(tmp_path / "a.tar", members)
    assert label_of_each(root, images) == {i: str(i % 2) for i in range(12)}


def test_missing_members_shift_no_label(tmp_path: Path, images: list[bytes]) -> None:
    """Images without a label are not measured, labels without an image forgotten."""
    members = []
    for i, content in enumerate(images):
        members += [(f"9.{i}.jpg", content)] if i % 3 else []
        members += [(f"9.{i}.cls", b"%d" % (i % 2))] if i % 4 else []
    root = write_tar(tmp_path / "a.tar", members)
    assert label_of_each(root, images) == {i: str(i % 2) for i in range(12) if i % 3 and i % 4}
    assert len(open_source(root)[0]) == 8
    assert [name[-7:] for name in open_labeled(root).passed_over.unlabeled] == [
        "9.4.jpg",
        "9.8.jpg",
    ]


def test_a_label_is_never_that_of_another_number(tmp_path: Path, images: list[bytes]) -> None:
    """An image without a label, and beside it the label of an image that is missing."""
    members = [("7.1.jpg", images[0]), ("7.2.cls", b"5")]
    for i, content in enumerate(images[1:], 1):
        members += [(f"8.{i}.jpg", content), (f"8.{i}.cls", b"%d" % (i % 2))]
    root = write_tar(tmp_path / "a.tar", members)
    assert label_of_each(root, images) == {i: str(i % 2) for i in range(1, 12)}


def test_labels_of_two_folders_that_lie_apart(tmp_path: Path, images: list[bytes]) -> None:
    """Files of one name in each, all images first."""
    members = [(f"{folder}/same.jpg", images[i]) for i, folder in enumerate("xy")]
    members += [(f"{folder}/same.cls", str(i + 4).encode()) for i, folder in enumerate("xy")]
    assert label_of_each(write_tar(tmp_path / "a.tar", members), images) == {0: "4", 1: "5"}


@pytest.mark.parametrize("label", [b"-1", b"", b"a\nb", b"\xff\xfe", b"x" * 999])
def test_what_cannot_be_a_label_is_named(tmp_path: Path, images: list[bytes], label: bytes) -> None:
    """And does not keep the images from training."""
    members = [
        part
        for i, content in enumerate(images)
        for part in ((f"{i}.jpg", content), (f"{i}.cls", label if i == 5 else b"%d" % (i % 2)))
    ]
    root = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=r"a\.tar: 5\.cls: expected a class, found"):
        open_labeled(root)
    assert len(open_source(root)[0]) == 12


def test_json_without_a_class_is_none(tmp_path: Path, images: list[bytes]) -> None:
    members = [
        (f"{i}.{s}", d) for i, c in enumerate(images) for s, d in (("jpg", c), ("json", b"{}"))
    ]
    with pytest.raises(InputError, match="expected images with classes, found none"):
        open_labeled(write_tar(tmp_path / "a.tar", members))


def test_a_folder_of_img2dataset(tmp_path: Path, images: list[bytes]) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"0000{shard}.tar", [(f"{i}.jpg", c) for i, c in enumerate(images)])
        pq.write_table(pa.table({"url": ["a"]}), tmp_path / f"0000{shard}.parquet")
        (tmp_path / f"0000{shard}_stats.json").write_text("{}")
    assert len(open_source(str(tmp_path))[0]) == 24


def write_parquet(path: Path, images: list[bytes], **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pa.array([{"bytes": content, "path": None} for content in images], IMAGE)
    pq.write_table(pa.table({"image": rows, **columns}), path)
    return str(path)


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("label", ["cat", "dog"] * 6, {i: ("cat", "dog")[i % 2] for i in range(12)}),
        ("class", [0, 1] * 6, {i: str(i % 2) for i in range(12)}),
        ("label", [0, 1, None] * 4, {i: str(i % 3) for i in range(12) if i % 3 < 2}),
        (
            "label",
            ["a", None, "b", ""] * 3,
            {i: "a b"[i % 4] for i in range(12) if i % 4 in (0, 2)},
        ),
    ],
)
def test_classes_of_parquet(
    tmp_path: Path, images: list[bytes], column: str, values: list, expected: dict
) -> None:
    """Numbers or words; what has none is no class."""
    root = write_parquet(tmp_path / "a.parquet", images, **{column: values})
    assert label_of_each(root, images) == expected
    left_out = len(images) - len(expected)
    assert len(open_labeled(root).passed_over.unlabeled) == left_out


def test_names_of_classes_in_parquet(tmp_path: Path, images: list[bytes]) -> None:
    """As Hugging Face's datasets keeps them, for numbers."""
    rows = pa.array([{"bytes": content, "path": None} for content in images], IMAGE)
    feature = {"names": ["tench", "goldfish", "shark"], "_type": "ClassLabel"}
    described = json.dumps({"info": {"features": {"label": feature}}})
    table = pa.table({"image": rows, "label": [0, 2] * 6})
    table = table.replace_schema_metadata({"huggingface": described})
    pq.write_table(table, tmp_path / "a.parquet")
    assert open_labeled(str(tmp_path / "a.parquet")).classes == ("shark", "tench")


def test_columns_are_chosen_by_type_and_name(tmp_path: Path, images: list[bytes]) -> None:
    """Never the masks; by a field where that is not clear."""
    masks, others = images[:6], images[6:]
    structured = [
        pa.array([{"bytes": c, "path": None} for c in part], IMAGE) for part in (masks, others)
    ]
    path = tmp_path / "a.parquet"
    for columns in (
        {"mask": pa.array(masks), "photo": structured[1]},
        {"mask": structured[0], "pixel_values": structured[1]},
        {"depth_map": structured[0], "x": structured[1]},
        {"audio": pa.array([b"x"] * 6), "scene": structured[1]},
    ):
        pq.write_table(pa.table(columns), path)
        assert open_source(str(path))[0].read(2) == others[2]
    pq.write_table(
        pa.table({"left": structured[0], "right": structured[1], "side": [0, 1] * 3}), path
    )
    with pytest.raises(
        InputError, match=r"several columns hold images, left, right; .*image_column"
    ):
        open_source(str(path))
    reading = Reading(Columns("right", "side"))
    assert open_source(str(path), reading)[0].read(2) == others[2]
    assert open_labeled(str(path), reading).classes == ("0", "1")
    for columns, words in (
        (Columns("up"), "no column 'up'"),
        (Columns("side"), "expected images in"),
    ):
        with pytest.raises(InputError, match=words):
            open_source(str(path), Reading(columns))


def test_parquet_that_names_files(tmp_path: Path, images: list[bytes]) -> None:
    """Beside it, or anywhere."""
    (tmp_path / "imgs").mkdir()
    for i, content in enumerate(images):
        (tmp_path / "imgs" / f"{i}.png").write_bytes(content)
    rows = pa.array([{"bytes": None, "path": f"imgs/{i}.png"} for i in range(12)], IMAGE)
    for columns in (
        {"image": rows},
        {"file": [f"imgs/{i}.png" for i in range(12)], "caption": ["x"] * 12},
        {"image": [str(tmp_path / "imgs" / f"{i}.png") for i in range(12)]},
    ):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        source, _ = open_source(str(tmp_path / "a.parquet"))
        assert [source.read(i) for i in range(12)] == images
    (tmp_path / "imgs" / "3.png").unlink()
    with pytest.raises(Unreadable, match="No such file"):
        open_source(str(tmp_path / "a.parquet"))[0].read(3)
    lists = pa.array([[{"bytes": c, "path": None}] for c in images], pa.list_(IMAGE))
    pq.write_table(pa.table({"images": lists}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="images holds lists of images; expected one image a row"):
        open_source(str(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-0000{}-of-00002.parquet", "data/test-00000-of-00001.parquet"),
        ("train/000{}.parquet", "validation/0000.parquet"),
        ("train-{}.parquet", "val-0.parquet"),
        ("default/train/000{}.parquet", "default/test/0000.parquet"),
    ],
)
def test_splits_of_a_repository(tmp_path: Path, images: list[bytes], train: str, test: str) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("x")
    for number in range(2):
        part = images[4 * number : 4 * number + 4]
        write_parquet(tmp_path / train.format(number), part, label=[0, 1] * 2)
    write_parquet(tmp_path / test, images[8:], label=[1, 0] * 2)
    source, passed_over = open_source(str(tmp_path))
    assert [source.read(i) for i in range(len(source))] == images[:8]
    assert [kind.startswith("of the split") for kind in passed_over.suffixes] == [True]
    pair = open_pair(str(tmp_path))
    assert pair.train.labels.tolist() == [0, 1] * 4
    assert pair.test.labels.tolist() == [1, 0] * 2
    assert pair.test.source.read(3) == images[11]
