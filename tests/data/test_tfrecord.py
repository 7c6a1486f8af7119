"""Data sets of tensorflow-datasets as TFRecord, read without TensorFlow: the same images in the
same order as the ArrayRecord form.
"""

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import photograph
from PIL import Image

from proteus_jax.data.dataset import open_source
from proteus_jax.data.datasets.labeled import open_pair
from proteus_jax.data.sources.tf_example import values_of
from proteus_jax.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PROTEUS_JAX_CACHE", str(directory))
    return directory


def varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(**features: bytes | Sequence[int]) -> bytes:
    """A tf.train.Example by hand: bytes, or whole numbers (packed)."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            kind = field(1, field(1, value))
        else:
            kind = field(3, field(1, b"".join(map(varint, value))))
        entries += field(1, field(1, name.encode()) + field(2, kind))
    return field(1, entries)


CRC = [0] * 256
for _byte in range(256):
    _value = _byte
    for _ in range(8):
        _value = _value >> 1 ^ (0x82F63B78 if _value & 1 else 0)
    CRC[_byte] = _value


def checksum(data: bytes) -> bytes:
    """The masked CRC-32C that TFRecord has."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def write_records(path: Path, records: Sequence[bytes]) -> None:
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + checksum(length) + record + checksum(record))


FEATURE = "tensorflow_datasets.core.features"


def prepare(folder: Path, splits: dict[str, list[list[bytes]]], name: str = "mine") -> None:
    """Writes what tensorflow-datasets writes of a data set: shards of each split."""
    folder.mkdir(parents=True)
    info: dict[str, Any] = {"name": name, "version": "1.0.0", "fileFormat": "tfrecord"}
    info["splits"] = []
    for split, shards in splits.items():
        for number, records in enumerate(shards):
            write_records(
                folder / f"{name}-{split}.tfrecord-{number:05}-of-{len(shards):05}", records
            )
        lengths = [str(len(records)) for records in shards]
        info["splits"].append({"name": split, "shardLengths": lengths, "numBytes": "1"})
    (folder / "dataset_info.json").write_text(json.dumps(info))
    features = {
        "image": {"pythonClassName": f"{FEATURE}.image_feature.Image"},
        "label": {"pythonClassName": f"{FEATURE}.class_label_feature.ClassLabel"},
    }
    kind = f"{FEATURE}.features_dict.FeaturesDict"
    described = {"pythonClassName": kind, "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(described))
    (folder / "label.labels.txt").write_text("ant\nbee\ncat\n")


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    rng, contents = np.random.default_rng(2), []
    for _ in range(10):
        file = io.BytesIO()
        Image.fromarray(photograph(rng, 20, 24)).save(file, "PNG")
        contents.append(file.getvalue())
    return contents


@pytest.fixture
def prepared(tmp_path: Path, images: list[bytes]) -> Path:
    """Two splits, the first in three shards of which one is empty."""
    records = [example(image=c, label=[i % 3], file_name=b"x") for i, c in enumerate(images)]
    folder = tmp_path / "tfds" / "mine" / "1.0.0"
    prepare(folder, {"train": [records[:3], [], records[3:7]], "test": [records[7:]]})
    return folder


def test_examples_by_hand() -> None:
    record = example(image=b"\0\1", label=[300], none=[], several=[1, 2, 128])
    assert values_of(record, "image") == [b"\0\1"]
    assert values_of(record, "label") == [300]
    assert values_of(record, "several") == [1, 2, 128]
    assert not values_of(record, "none")
    assert not values_of(record, "absent")
    with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
        values_of(b"\xff\xff\xff", "image")


def test_random_access_in_order(prepared: Path, images: list[bytes]) -> None:
    """By directory, by address, by name and version; the index is made once."""
    roots = [f"tfds:{prepared}", f"tfds:file://{prepared}:train", f"tfds:{prepared.parent}"]
    for root in roots:
        source, _ = open_source(root)
        assert [source.read(index) for index in (6, 0, 3)] == [images[6], images[0], images[3]]
        assert source.labels().tolist() == [0, 1, 2, 0, 1, 2, 0]  # pyright: ignore[reportOptionalMemberAccess]
        assert list(source.class_names()) == ["ant", "bee", "cat"]
        assert source.name(3) == "tfds:mine/1.0.0: example 3 of train"
    pair = open_pair(f"tfds:{prepared}")
    assert pair.train.classes == ("ant", "bee", "cat")
    assert pair.test.labels.tolist() == [1, 2, 0]


def test_the_index_is_kept(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, images: list[bytes]
) -> None:
    from proteus_jax.data.sources import tfrecord

    first, _ = open_source(f"tfds:{prepared}")
    monkeypatch.setattr(tfrecord, "_records", None)
    again, _ = open_source(f"tfds:{prepared}")
    assert again.fingerprint == first.fingerprint
    assert again.read(5) == images[5]


def test_names_versions_and_parts(
    prepared: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared.parent.parent))
    newer = prepared.with_name("1.10.0")
    records = [example(image=images[9], label=[0])]
    prepare(newer, {"train": [records]})
    assert len(open_source("tfds:mine")[0]) == 1
    assert len(open_source("tfds:mine:1.0.0")[0]) == 7
    for part, expected in (
        ("[:50%]", images[:4]),  # 3.5 is rounded to the even 4
        ("[50%:]", images[4:7]),
        ("[2:5]", images[2:5]),
        ("[-2:]", images[5:7]),
        ("[10%:90%]", images[1:6]),
    ):
        source, _ = open_source(f"tfds:mine:1.0.0:train{part}")
        assert [source.read(index) for index in range(len(source))] == expected, part
        assert len(source.labels()) == len(expected)  # pyright: ignore[reportArgumentType]
    for root, words in (
        ("tfds:mine:1.0.0:train[5:2]", "is empty"),
        ("tfds:mine:1.0.0:train[a]", r"expected a part as \[:50%\]"),
        ("tfds:mine:1.0.0:valid", "expected a split out of train, test, found valid"),
    ):
        with pytest.raises(InputError, match=words):
            open_source(root)


def test_what_is_no_tfrecord(prepared: Path) -> None:
    file = prepared / "mine-train.tfrecord-00000-of-00003"
    whole = file.read_bytes()
    for content, words in (
        (whole[:-5], "no TFRecord file, or cut short"),
        (whole[: len(whole) - 1] + bytes(3), "ends inside a record|cut short"),
        (b"x" * 100, "no TFRecord file"),
        (b"", "expected 3 examples, found 0"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=words):
            open_source(f"tfds:{prepared}")
    file.unlink()
    with pytest.raises(InputError, match="No such file"):
        open_source(f"tfds:{prepared}")
    (prepared / "features.json").write_text("{}")
    with pytest.raises(InputError, match="its description makes no sense"):
        open_source(f"tfds:{prepared}")


def test_the_order_is_that_of_array_record(tmp_path: Path, images: list[bytes]) -> None:
    """tensorflow-datasets itself prepares the one; its shards in their order are written as the
    other by hand.
    """
    import tensorflow_datasets as tfds

    class Both(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, content in enumerate(images):
                path = tmp_path / f"{number}.png"
                path.write_bytes(content)
                yield number, {"image": str(path), "label": number % 3}

    builder = Both(data_dir=str(tmp_path / "one"), file_format="array_record")
    builder.download_and_prepare()
    one, _ = open_source(f"tfds:{builder.data_dir}")
    from array_record.python.array_record_module import ArrayRecordReader

    (shard,) = Path(builder.data_dir).glob("*.array_record*")
    reader = ArrayRecordReader(str(shard))
    records = [bytes(record) for record in reader.read_all()]
    reader.close()
    prepare(tmp_path / "other" / "1.0.0", {"train": [records]}, name="both")
    other, _ = open_source(f"tfds:{tmp_path / 'other'}")
    assert [other.read(i) for i in range(10)] == [bytes(one.read(i)) for i in range(10)]
    assert other.labels().tolist() == one.labels().tolist()  # pyright: ignore[reportOptionalMemberAccess]
    assert other.key(4) == one.key(4)


def test_a_label_that_is_a_text_is_refused(tmp_path: Path, images: list[bytes]) -> None:
    records = [example(image=content, label=b"ant") for content in images]
    prepare(tmp_path / "mine" / "1.0.0", {"train": [records]})
    source, _ = open_source(f"tfds:{tmp_path / 'mine'}")
    assert source.read(2) == images[2]
    with pytest.raises(InputError, match="expected numbers in its feature label"):
        source.labels()
