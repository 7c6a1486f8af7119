"""Counts what a step compiled for a TPU moves and computes, in the text of its optimized HLO.

    python main.py --config=configs/vitb14.py --plan --topology=v5e:4x4 --hlo=step.hlo
    python benchmarks/hlo_floor.py step.hlo v5e

XLA's own cost analysis counts the body of a loop once. Here a loop counts as often as it runs, an
array with the padding of its tiles, and what stays in fast memory (VMEM) not at all.

bytes: what goes to and from the chip's memory (HBM).
floor: the sum over operations of the larger of bytes at the memory's bandwidth and matmul
    arithmetic at the chip's peak. No run of this program is faster.
estimate: with the compiler's own cycles in place of the peak. Right for matmuls, as it knows their
    tiles; pessimistic for copies.

An attention kernel counts with its arguments, its results and the matmuls of attention: two for
each pair of tokens forward, five backward.

Longer than other files here: the reader of the text and what it counts mean nothing apart.
"""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Chip(NamedTuple):
    """Bytes a second, operations a second in bfloat16, cycles a second."""

    bandwidth: float
    peak: float
    clock: float


CHIPS = {
    "v5e": Chip(819e9, 197e12, 1.5e9),
    "v5p": Chip(2765e9, 459e12, 1.75e9),
    "v6e": Chip(1640e9, 918e12, 1.75e9),
}
_BITS = re.compile(r"(?:[a-z]+?)(\d+)")
_ARRAY = re.compile(r"\b(pred|token|bf16|f8\w+|[fsu]\d+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_HEAD = re.compile(r"^(ENTRY )?(%\S+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?(%\S+) = ")
# Names for what is somewhere already, and the control of what counts by itself.
_FREE = frozenset(
    {
        *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "after-all"),
        *("partition-id", "opt-barrier", "while", "conditional", "call"),
    }
)
_LOOK_INSIDE = ("fusion", "call")


class Array(NamedTuple):
    """A result: its elements, its bytes with the padding of its tiles, and where it lies."""

    dims: tuple[int, ...]
    bytes: int
    fast: bool

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.dims)


def _array(kind: str, dims: str, order: str, tiles: str) -> Array:
    lengths = tuple(int(length) for length in dims.split(",") if length)
    bits = _BITS.match(kind)
    itemsize = max(1, int(bits[1]) // 8) if bits else int(kind == "pred")
    minor_first = [lengths[int(axis)] for axis in order.split(",") if axis] or list(lengths)
    tile = re.search(r"T\(([\d,]+)\)", tiles)
    if tile and lengths:
        for place, step in enumerate(reversed([int(part) for part in tile[1].split(",")])):
            if place < len(minor_first):
                minor_first[place] = -(-minor_first[place] // step) * step
    return Array(lengths, math.prod(minor_first) * itemsize, "S(" in tiles and "S(0)" not in tiles)


class Operation(NamedTuple):
    """A line of a computation."""

    name: str
    kind: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    number: int
    root: bool

    def called(self, *keys: str) -> list[str]:
        """Computations that it names under these keys."""
        computations = []
        for key in keys:
            for named in re.findall(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes):
                computations += re.findall(r"%[\w.\-]+", named)
        return computations


def _end_of(text: str, start: int) -> int:
    """Past the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"no closing parenthesis in {text[:100]}")


def _operation(line: str, match: re.Match) -> Operation:
    rest = line[match.end() :]
    cut = _end_of(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:cut], rest[cut:].lstrip()
    opening = rest.index("(")
    closing = _end_of(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    return Operation(
        name=match[2],
        kind=rest[:opening],
        results=tuple(_array(*(part or "" for part in each)) for each in _ARRAY.findall(shapes)),
        operands=tuple(re.findall(r"%[\w.\-]+", inside)),
        attributes=rest[closing:],
        number=int(inside) if inside.isdecimal() else -1,
        root=bool(match[1]),
    )


class Row(NamedTuple):
    """An operation of the program, for all the times that it runs."""

    operation: Operation
    times: int
    bytes: float
    flops: float
    cycles: float


class Program:
    """A device's program."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Operation]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                current = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (match := _LINE.match(line)):
                operation = _operation(line, match)
                current[operation.name] = operation
        self._flops: dict[str, float] = {}

    def rows(self) -> Iterator[Row]:
        """Everything that runs."""
        for computation, operation, times in self._executed(self.entry, 1):
            read, written = self._moved(computation, operation)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', operation.attributes)
            yield Row(
                operation,
                times,
                times * (read + written),
                times * self._arithmetic(computation, operation),
                times * int(cycles[1] if cycles else 0),
            )

    def _executed(self, name: str, times: int) -> Iterator[tuple[str, Operation, int]]:
        for operation in self.computations[name].values():
            yield name, operation, times
            if operation.kind == "while":
                (body,) = operation.called("body")
                yield from self._executed(body, times * self._rounds(operation))
            elif operation.kind in ("call", "conditional"):
                keys = "to_apply", "branch_computations", "true_computation", "false_computation"
                for called in operation.called(*keys):
                    yield from self._executed(called, times)

    def _rounds(self, loop: Operation) -> int:
        """What the loop's condition counts to: the one constant there that is no 0 or 1."""
        (condition,) = loop.called("condition")
        counts = [1]

        def look(name: str) -> None:
            for operation in self.computations[name].values():
                if operation.kind == "constant":
                    counts.append(operation.number)
                for called in operation.called("calls", "to_apply"):
                    look(called)

        look(condition)
        return max(counts)

    def _arithmetic(self, computation: str, operation: Operation) -> float:
        within = self.computations[computation]
        if operation.kind == "convolution":
            return _of_convolution(operation, within)
        if operation.kind == "fusion":
            return sum(self._flops_of(called) for called in operation.called("calls"))
        if operation.kind == "custom-call" and "tpu_custom_call" in operation.attributes:
            return _of_attention(operation, within)
        return 0.0

    def _flops_of(self, name: str) -> float:
        if name not in self._flops:
            total = 0.0
            for operation in self.computations[name].values():
                if operation.kind == "convolution":
                    total += _of_convolution(operation, self.computations[name])
                elif operation.kind in _LOOK_INSIDE:
                    called = operation.called("calls", "to_apply")
                    total += sum(self._flops_of(each) for each in called)
            self._flops[name] = total
        return self._flops[name]

    def _moved(self, computation: str, operation: Operation) -> tuple[float, float]:
        """Bytes read from and written to memory."""
        kind, results = operation.kind, operation.results
        if kind in _FREE or kind.endswith("-done"):
            return 0, 0
        if kind in ("copy-start", "slice-start"):
            target, source = results[:2]
            size = min(target.bytes, source.bytes)
            return size * (not source.fast), size * (not target.fast)
        if kind.endswith("-start"):
            return 0, 0
        (inside,) = operation.called("calls") if kind == "fusion" else (None,)
        read = written = 0.0
        for place, name in enumerate(operation.operands):
            source = self.computations[computation].get(name)
            if source is None or not source.results or source.results[0].fast:
                continue
            part = None
            if inside is not None:
                part = self._read_inside(inside, place)
            elif kind in ("dynamic-slice", "dynamic-update-slice"):
                # A slice of the first; the second is what updates it; the others are where.
                part = _taken(operation, place, None if place == 1 else 0)
            read += source.results[0].bytes if part is None else part
        parts: list[float | None] = [None] * len(results)
        if inside is not None:
            parts = self._written_inside(inside)
        elif kind == "dynamic-update-slice":
            parts = [self.computations[computation][operation.operands[1]].results[0].bytes]
        for place, target in enumerate(results):
            if not target.fast:
                part = parts[place] if place < len(parts) else None
                written += target.bytes if part is None else part
        return read, written

    def _read_inside(self, name: str, number: int) -> float | None:
        """Returns what a fusion reads of its argument; None for all of it."""
        within = self.computations[name]
        argument = next(
            (
                each
                for each in within.values()
                if each.kind == "parameter" and each.number == number
            ),
            None,
        )
        return None if argument is None else self._read_of(within, argument.name)

    def _read_of(self, within: dict[str, Operation], name: str, deep: bool = True) -> float | None:
        if within[name].root:
            return None
        total = 0.0
        for user in within.values():
            for place, operand in enumerate(user.operands):
                if operand != name:
                    continue
                part = None
                if user.kind in ("slice", "dynamic-slice", "dynamic-update-slice"):
                    part = _taken(user, place, None)
                elif user.kind in ("bitcast", "get-tuple-element") and deep:
                    part = self._read_of(within, user.name, deep=False)
                elif user.kind == "fusion":
                    part = self._read_inside(user.called("calls")[0], place)
                if part is None:
                    return None
                total += part
        return total

    def _written_inside(self, name: str) -> list[float | None]:
        """Returns what a fusion writes of each of its results; None for all of it."""
        within = self.computations[name]
        (root,) = (each for each in within.values() if each.root)
        ends = [within[each] for each in root.operands] if root.kind == "tuple" else [root]
        written: list[float | None] = []
        for end in ends:
            while end.kind in ("bitcast", "copy") and end.operands:
                end = within[end.operands[0]]
            if end.kind == "dynamic-update-slice":
                written.append(within[end.operands[1]].results[0].bytes)
            elif end.kind == "fusion":
                inner = self._written_inside(end.called("calls")[0])
                written.append(inner[0] if len(inner) == 1 else None)
            else:
                written.append(None)
        return written


def _taken(user: Operation, place: int, otherwise: float | None) -> float | None:
    """Returns what a slice takes of its operand: its own size; an update in place, nothing."""
    if place:
        return otherwise
    return 0 if user.kind == "dynamic-update-slice" else user.results[0].bytes


def _of_convolution(operation: Operation, within: dict[str, Operation]) -> float:
    """Twice the products that are summed: matmuls are convolutions on a TPU, and a batch may be a
    window that meets one element.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.attributes)
    assert labels is not None
    left, right = (within[name].results[0].dims for name in operation.operands[:2])
    result = operation.results[0]
    window = re.search(r"window=\{([^}]*)\}", operation.attributes)
    fields = dict(part.split("=", 1) for part in window[1].split()) if window else {}
    products = 2.0 * right[labels[2].index("i")] * result.elements
    for axis, size in enumerate(int(each) for each in fields.get("size", "").split("x") if each):

        def field(name: str, default: str, axis: int = axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        before = int(field("pad", "0_0").split("_")[0])
        stride, apart = int(field("stride", "1")), int(field("lhs_dilate", "1"))
        spread = int(field("rhs_dilate", "1"))
        given = left[labels[1].index(str(axis))]
        made = result.dims[labels[3].index(str(axis))]
        places = (
            start * stride + tap * spread - before for start in range(made) for tap in range(size)
        )
        met = sum(at % apart == 0 and 0 <= at // apart < given for at in places)
        products *= met / made
    return products


def _of_attention(operation: Operation, within: dict[str, Operation]) -> float:
    arguments = [within[name].results for name in operation.operands if name in within]
    arrays = [each for results in arguments for each in results if len(each.dims) > 2]
    if not arrays:
        return 0.0
    batch, tokens, *rest = arrays[0].dims
    backward = any(result.dims == arrays[0].dims for result in operation.results)
    return (5 if backward else 2) * 2.0 * batch * tokens**2 * math.prod(rest) / 3


class Count(NamedTuple):
    """Totals of a whole step: bytes, and seconds."""

    bytes: float
    floor: float
    estimate: float


def count(text: str, chip: Chip) -> Count:
    """Counts the program of one device."""
    rows = list(Program(text).rows())
    return Count(
        sum(row.bytes for row in rows),
        sum(max(row.bytes / chip.bandwidth, row.flops / chip.peak) for row in rows),
        sum(max(row.bytes / chip.bandwidth, row.cycles / chip.clock) for row in rows),
    )


def main() -> None:
    """Prints the three figures."""
    if len(sys.argv) != 3 or sys.argv[2] not in CHIPS:
        sys.exit(f"usage: python benchmarks/hlo_floor.py STEP.hlo {'|'.join(CHIPS)}")
    totals = count(Path(sys.argv[1]).read_text(), CHIPS[sys.argv[2]])
    print(f"bytes: {totals.bytes / 1e9:.1f} GB")
    print(f"floor: {1e3 * totals.floor:.1f} ms")
    print(f"estimate: {1e3 * totals.estimate:.1f} ms")


if __name__ == "__main__":
    main()
