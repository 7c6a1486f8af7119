"""Looks at every image before a run does: what is broken, odd, or there twice."""

import contextlib
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Generator
from hashlib import sha256
from typing import Any, NamedTuple

import cv2
import numpy as np

from proteus_jax.data.pillow_images import ORIENTATION, deep_image, image_of
from proteus_jax.data.sources.base import Source
from proteus_jax.errors import Unreadable

# Images looked at by one call.
CHUNK = 64
# A shorter side of fewer pixels than this is tiny.
TINY = 32
# Copies whose perceptual hashes differ in so many of 64 bits or fewer look alike.
ALIKE = 3
_JPEG = b"\xff\xd8\xff"
# An image whose pixels differ by less of 255 shows nothing.
FAINT = 8
# Of an image with less contrast than this the perceptual hash says nothing.
_FLAT = 4.0
# How many neighbors in the order of their hashes an image is compared with.
_NEIGHBORS = 32
_SIDES = (0, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096)
_DEEP = "more than 8 bits"
ODD = ("CMYK", _DEEP, "several pages or frames", "turned by EXIF", "tiny", "transparency")


_RECORD = np.dtype(
    [
        ("height", np.int32),
        ("width", np.int32),
        ("odd", np.bool_, len(ODD)),
        ("content", np.uint64),
        ("look", np.uint64),
        ("flat", np.bool_),
        ("seconds", np.float32),
        # Of more than 8 bits: the values that are used, and the largest that there may be.
        ("used", np.float64, 2),
        ("highest", np.float64),
        # Darkest and brightest of the pixels that a run sees.
        ("seen", np.uint8, 2),
    ]
)


class Look(NamedTuple):
    """Records of some images in a row, and for each why it cannot be read ("" where it can)."""

    records: np.ndarray
    faults: tuple[str, ...]


class Findings(NamedTuple):
    """The findings about a source's images, in their order."""

    records: np.ndarray
    faults: list[str]

    def unreadable(self) -> dict[int, str]:
        """Index and reason of each image that cannot be read."""
        return {index: fault for index, fault in enumerate(self.faults) if fault}

    def odd(self) -> dict[str, list[int]]:
        """Images of unusual kinds, which training takes."""
        return {
            kind: np.flatnonzero(self.records["odd"][:, column]).tolist()
            for column, kind in enumerate(ODD)
        }

    def ranges(self) -> dict[int, tuple[float, float, float]]:
        """Values used by each image of more than 8 bits, and the largest there may be."""
        deep = np.flatnonzero(self.records["odd"][:, ODD.index(_DEEP)])
        rows = self.records[deep]
        return {
            int(index): (float(row["used"][0]), float(row["used"][1]), float(row["highest"]))
            for index, row in zip(deep, rows, strict=True)
        }

    def flat(self) -> list[int]:
        """Images that have nearly one color, as black ones."""
        seen = self.records["seen"].astype(int)
        low = seen[:, 1] - seen[:, 0] < FAINT
        return [index for index in self._readable() if low[index]]

    def equal(self) -> list[list[int]]:
        """Groups of images with the same content."""
        return _groups(self.records["content"], self._readable())

    def alike(self) -> list[list[int]]:
        """Groups of images that look the same, those of `equal` left out but for their first."""
        copies = {index for group in self.equal() for index in group[1:]}
        rest = [
            index
            for index in self._readable()
            if index not in copies and not self.records["flat"][index]
        ]
        return _alike(self.records["look"], np.array(rest, np.int64))

    def _readable(self) -> list[int]:
        return [index for index, fault in enumerate(self.faults) if not fault]

    def excluded(self) -> dict[int, str]:
        """Index and reason of each image that training is better without: what cannot be read, and
        every copy but the first.
        """
        copies = {
            index: f"the same as image {group[0]}" for group in self.equal() for index in group[1:]
        }
        return dict(sorted((self.unreadable() | copies).items()))

    def smaller_than(self, side: int) -> int:
        """The number of images whose shorter side is shorter."""
        sides = np.minimum(self.records["height"], self.records["width"])[self._readable()]
        return int((sides < side).sum())

    def histogram(self) -> list[tuple[str, int]]:
        """Numbers of images by their shorter side."""
        readable = self._readable()
        sides = np.minimum(self.records["height"], self.records["width"])[readable]
        counts, _ = np.histogram(sides, (*_SIDES, 2**31))
        labels = [f"{low} to {high - 1}" for low, high in itertools.pairwise(_SIDES)]
        return list(zip([*labels, f"{_SIDES[-1]} and more"], counts.tolist(), strict=True))

    def decode_rate(self) -> float:
        """Images a second that one core decodes."""
        spent = float(self.records["seconds"].sum())
        return len(self.records) / spent if spent else 0.0


Parallel = Callable[[Callable[[int], Look], int], Generator[Look]]


def examine(
    source: Source, in_parallel: Parallel, progress: Callable[[int, int], None] = lambda *_: None
) -> Findings:
    """Reads and decodes every image; `told(done, unreadable)` is called now and then."""
    pieces = -(-len(source) // CHUNK)
    records = np.zeros(len(source), _RECORD)
    faults: list[str] = []
    for look in in_parallel(functools.partial(_look, source=source), pieces):
        rows = np.asarray(look.records).view(_RECORD).reshape(-1)
        records[len(faults) : len(faults) + len(rows)] = rows
        faults += look.faults
        progress(len(faults), sum(map(bool, faults[-len(rows) :])))
    return Findings(records, faults)


def _look(piece: int, *, source: Source) -> Look:
    indices = range(piece * CHUNK, min((piece + 1) * CHUNK, len(source)))
    records, faults = np.zeros(len(indices), _RECORD), []
    for record, index in zip(records, indices, strict=True):
        try:
            _describe(record, source, index)
            faults.append("")
        except Unreadable as error:
            faults.append(str(error))
    # As bytes: other processes hand over plain arrays.
    return Look(records.view(np.uint8), tuple(faults))


def _describe(record: Any, source: Source, index: int) -> None:
    content = source.read(index)
    data = content if isinstance(content, bytes) else content.tobytes()
    if not data:
        raise Unreadable("empty")
    start = time.thread_time()
    pixels = source.open(index).pixels()
    record["seconds"] = time.thread_time() - start
    record["height"], record["width"] = pixels.shape[:2]
    record["content"] = int.from_bytes(sha256(data).digest()[:8], "little")
    small = cv2.resize(
        cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA
    )
    brighter = small[:, 1:] > small[:, :-1]
    record["look"] = int.from_bytes(np.packbits(brighter).tobytes(), "big")
    record["flat"] = float(small.std()) < _FLAT
    record["seen"] = pixels.min(), pixels.max()
    odd = {"tiny": min(pixels.shape[:2]) < TINY}
    if isinstance(content, bytes):
        odd |= _oddities(content)
        deep = None if content.startswith(_JPEG) else deep_image(content)
        if deep is not None:
            odd[_DEEP] = True
            record["used"], record["highest"] = deep.used(), deep.highest
    record["odd"] = [odd.get(kind, False) for kind in ODD]


def _oddities(data: bytes) -> dict[str, bool]:
    """Oddities of a decoded image, by its header; none where Pillow trips over that."""
    with contextlib.suppress(Unreadable), image_of(data) as image:
        return {
            "CMYK": image.mode == "CMYK",
            "several pages or frames": getattr(image, "n_frames", 1) > 1,
            "turned by EXIF": image.getexif().get(ORIENTATION, 1) not in (0, 1),
            "transparency": image.has_transparency_data,
        }
    return {}


def _groups(values: np.ndarray, indices: list[int]) -> list[list[int]]:
    """Indices with equal values, where there is more than one."""
    groups: dict[int, list[int]] = {}
    repeated = {value for value, count in Counter(values[indices].tolist()).items() if count > 1}
    for index in indices:
        if int(values[index]) in repeated:
            groups.setdefault(int(values[index]), []).append(index)
    return sorted(groups.values())


def _alike(looks: np.ndarray, indices: np.ndarray) -> list[list[int]]:
    """Groups of indices whose hashes differ in at most ALIKE bits.

    Two such hashes agree in one of four quarters: ordered with each quarter first in turn, they
    come near each other.
    """
    leader = {int(index): int(index) for index in indices}

    def first(index: int) -> int:
        while leader[index] != index:
            leader[index] = index = leader[leader[index]]
        return index

    for quarter in range(ALIKE + 1):
        turn = np.uint64(16 * quarter)
        values = looks[indices]
        if quarter:
            values = (values << turn) | (values >> (np.uint64(64) - turn))
        order = np.argsort(values, kind="stable")
        ordered, places = values[order], indices[order]
        for step in range(1, min(_NEIGHBORS, len(ordered) - 1) + 1):
            near = np.bitwise_count(ordered[step:] ^ ordered[:-step]) <= ALIKE
            for one, other in zip(places[step:][near], places[:-step][near], strict=True):
                low, high = sorted((first(int(one)), first(int(other))))
                leader[high] = low
    groups: dict[int, list[int]] = {}
    for index in map(int, indices):
        groups.setdefault(first(index), []).append(index)
    return sorted(group for group in groups.values() if len(group) > 1)
