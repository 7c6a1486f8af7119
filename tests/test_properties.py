"""What holds for every seed, size and file: orders, splits, crops, seals, configurations, weights.

The examples are drawn, the same ones each time.
"""

import contextlib
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proteus_jax import config
from proteus_jax.checkpoint.checksums import verify_checksums, write_checksums
from proteus_jax.data.sampler import Sampler, shares, subset_indices
from proteus_jax.data.sources.base import MemorySource
from proteus_jax.data.splits import HeldOut, split
from proteus_jax.data.transforms.random_resized_crop import crop_box
from proteus_jax.data.transforms.resize import resized
from proteus_jax.errors import InputError
from proteus_jax.training.schema import schema_of, training_schema
from proteus_jax.weights.convert import torch_writer
from proteus_jax.weights.convert.readers import read_weights

settings.register_profile(
    "drawn", derandomize=True, deadline=None, max_examples=60, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("drawn")

SEEDS = st.integers(0, 2**31 - 1)


@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3), st.data())
def test_an_epoch_is_every_image_once(
    seed: int, sizes: list[int], repeats: int, data: st.DataObject
) -> None:
    """Whatever was asked before, and drawn so many times in a row; epochs differ."""
    order = Sampler(seed, tuple(sizes), (), repeats)
    total = sum(sizes)
    draws = list(range(3 * total * repeats))
    asked = data.draw(st.permutations(draws))
    found = {draw: order(draw) for draw in asked}
    assert [found[draw].repeat for draw in draws] == [draw % repeats for draw in draws]
    images = np.array([found[draw].image for draw in draws]).reshape(3, total, repeats)
    assert (images == images[..., :1]).all()
    for epoch in images[..., 0]:
        assert sorted(epoch) == list(range(total))


@given(SEEDS, st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 9)), min_size=2, max_size=4))
def test_a_mixture_gives_each_part_its_share(seed: int, parts: list[tuple[int, float]]) -> None:
    """And over epochs a part sees its own images as often as each other."""
    sizes, weights = (tuple(each) for each in zip(*parts, strict=True))
    total = sum(sizes)
    order = Sampler(seed, sizes, weights)
    counts = Counter(order(draw).image for draw in range(4 * total))
    first = 0
    for size, share in zip(sizes, shares(total, weights), strict=True):
        own = [counts[image] for image in range(first, first + size)]
        assert sum(own) == 4 * share
        assert max(own) - min(own) <= 1
        first += size
    assert sum(shares(total, weights)) == total


@given(SEEDS, st.integers(1, 40), st.data())
def test_more_of_a_choice_contains_less(seed: int, length: int, data: st.DataObject) -> None:
    fewer = data.draw(st.integers(0, length))
    more = data.draw(st.integers(fewer, length))
    few, many = (subset_indices(seed, length, wanted).tolist() for wanted in (fewer, more))
    assert (len(few), len(many)) == (fewer, more)
    assert set(few) <= set(many) <= set(range(length))
    assert few == sorted(few)


class Contents(MemorySource):
    """Images known by contents, of which some are copies."""

    def __init__(self, contents: list[int]):
        super().__init__([np.zeros((1, 1, 3), np.uint8)] * len(contents), list(map(str, contents)))
        self._contents = contents

    def digests(self) -> list[bytes]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [bytes([content]) for content in self._contents]


@given(st.lists(st.integers(0, 12), min_size=3, max_size=30), st.integers(1, 8))
def test_copies_fall_on_one_side(contents: list[int], wanted: int) -> None:
    try:
        found = split(Contents(contents), HeldOut(0.5, wanted, wanted))
    except InputError:
        groups = Counter(contents).values()
        assert wanted >= len(contents) or min(groups) > wanted
        return
    assert found.held_out is not None
    training, held_out = (
        [source.name(index) for index in range(len(source))]
        for source in (found.training, found.held_out)
    )
    assert sorted(training + held_out) == sorted(map(str, contents))
    assert not set(training) & set(held_out)
    assert 0 < len(held_out) <= wanted


@given(SEEDS, st.integers(1, 60), st.integers(1, 60))
def test_a_crop_lies_in_its_image(seed: int, height: int, width: int) -> None:
    left, top, right, bottom = crop_box(np.random.default_rng(seed), height, width)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(SEEDS, st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_resizing_mirrors_and_keeps_what_is_flat(
    seed: int, height: int, width: int, size: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = resized(pixels, size).astype(int)
    assert found.shape == (size, size, 3)
    for axis in (0, 1):
        mirrored = resized(np.ascontiguousarray(np.flip(pixels, axis)), size).astype(int)
        # Blocks are counted from the first pixel on.
        if max(height, width) <= 4 * size:
            assert np.abs(np.flip(mirrored, axis) - found).max() <= 2
    flat = np.full((height, width, 3), pixels[0, 0], np.uint8)
    assert (resized(flat, size) == pixels[0, 0]).all()


@given(
    st.dictionaries(st.sampled_from(["a", "b/c", "b/d", "e"]), st.binary(max_size=40), min_size=1),
    st.data(),
)
def test_a_seal_sees_every_change(files: dict[str, bytes], data: st.DataObject) -> None:
    """A byte, a length, a file that is gone, another name of the whole."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "sealed"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        write_checksums(folder, "step 1")
        assert verify_checksums(folder, "step 1") is None
        assert verify_checksums(folder, "step 2") == "seal.json is that of step 1"
        name = data.draw(st.sampled_from(sorted(files)))
        content = files[name]
        changed = data.draw(st.binary(max_size=40).filter(lambda other: other != content))
        (folder / name).write_bytes(changed)
        assert (verify_checksums(folder, "step 1") or "").startswith(f"{name}: expected ")
        (folder / name).unlink()
        assert verify_checksums(folder, "step 1") == f"{name} is missing"
        (folder / name).write_bytes(content)
        assert verify_checksums(folder, "step 1") is None
        shutil.rmtree(folder)
        assert verify_checksums(folder, "step 1") == "no seal.json: a save that was not finished"


FIELDS = sorted(config.fields_of(str(ROOT / "configs" / "vitb14.py")))
VALUES = st.one_of(
    st.sampled_from(["0", "1", "-1", "0.5", "1e-3", "true", "false", "none", "", "nan", "inf"]),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(max_size=12),
)


@given(st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), max_size=4))
def test_a_configuration_is_whole_or_says_what_is_wrong(fields: list[tuple[str, str]]) -> None:
    """No value ends in anything but a list of problems; what is accepted is what config.json
    brings back.
    """
    overrides = [config.Override(*field) for field in fields]
    found, problems = config.load(str(ROOT / "configs" / "vitb14.py"), overrides, schema_of)
    for problem in problems:
        assert problem.startswith("--config")
        assert "\n" not in problem
    if not problems:
        content = json.loads(json.dumps(found.as_json))
        again = config.complete(content, training_schema)
        assert again == found
        assert not training_schema(content).together(again)


DTYPES = ["float32", "float16", "int64", "uint8", "bool", "float64", ml_dtypes.bfloat16]
ARRAYS = st.dictionaries(
    st.text("abc.é_", min_size=1, max_size=8),
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=4,
)


def _drawn(arrays: dict[str, tuple[list[int], Any]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = {name: 50 * np.asarray(rng.normal(size=each)) for name, (each, _) in arrays.items()}
    return {name: np.asarray(drawn[name].astype(kind)) for name, (_, kind) in arrays.items()}


@given(ARRAYS)
def test_what_is_written_for_pytorch_is_read_again(arrays: dict) -> None:
    written = {name: np.asarray(array, np.float32) for name, array in _drawn(arrays).items()}
    with tempfile.TemporaryDirectory() as root:
        torch_writer.save(Path(root) / "w.pth", written)
        found = read_weights(Path(root) / "w.pth").arrays
    assert found.keys() == written.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@given(ARRAYS, st.data())
def test_a_spoilt_file_of_weights_is_refused_or_read(arrays: dict, data: st.DataObject) -> None:
    """Never anything but InputError, whatever byte is another or missing."""
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "w.pth"
        torch_writer.save(path, {n: np.asarray(a, np.float32) for n, a in _drawn(arrays).items()})
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            del content[place:]
        else:
            content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            read_weights(path)
