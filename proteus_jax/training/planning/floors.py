"""Floors of steps compiled for TPUs: a table of the bytes that they move, made by
benchmarks/topologies.py (floors.json), and the share of a chip's peak that this leaves.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("floors.json")


class Floor(NamedTuple):
    """A step, compiled: for `images` a device of a `topology`; `work` is the arithmetic that the
    method needs for an image, in operations. `floor` is the time in seconds that no run of it is
    faster than, by the bytes that it moves and its matmuls at the chip's peak; `estimate` has the
    compiler's own cycles; `memory` is its peak, in bytes a device.
    """

    config: str
    topology: str
    fsdp: int
    remat: str
    images: int
    work: float
    bytes: float
    floor: float
    estimate: float
    memory: float

    def most(self, peak: float) -> float:
        """The share of a chip's peak, in operations a second, that is left at most."""
        return self.work * self.images / peak / self.floor

    def expected(self, peak: float) -> float:
        """The share midway between the two times: copies are slower than the floor has them, and
        faster than the compiler does.
        """
        return self.work * self.images / peak / ((self.floor + self.estimate) / 2)


class Table(NamedTuple):
    """All that were compiled, and with what."""

    made: dict[str, str]
    floors: list[Floor]


@functools.cache
def table() -> Table:
    """The table of this package."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return Table(content["made"], [Floor(**row) for row in content["floors"]])


def nearest(topology: str, work: float, images: float) -> Floor | None:
    """The step that is most like one of so much arithmetic an image, and images a device, on chips
    of the same kind; None where none was compiled for it.
    """
    kind = topology.partition(":")[0]
    of_kind = [each for each in table().floors if each.topology.partition(":")[0] == kind]

    def unlike(floor: Floor) -> tuple[float, float]:
        return abs(math.log(floor.work / work)), abs(math.log(floor.images / images))

    return min(of_kind, key=unlike, default=None)
