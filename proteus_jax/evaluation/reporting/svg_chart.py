"""Line charts as SVG, in the page's own colors; no script, no library."""

import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 26
# More points than this are means of neighbors.
MOST = 300
COLORS = 6


class Series(NamedTuple):
    """A name, and points (step, value) in the order of the steps."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def chart(series: Sequence[Series]) -> str:
    """An SVG of lines over steps, axes and legend; colors are the variables --c0 to --c5."""
    thinned = [each._replace(points=_thinned(each.points)) for each in series]
    values = [value for each in thinned for _, value in each.points]
    steps = [step for each in thinned for step, _ in each.points]
    low, high, marks = _axis(min(values), max(values))
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="11" fill="var(--faint)">']
    for mark in marks:
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}" '
            f'stroke="var(--line)"/><text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" '
            f'text-anchor="end">{_text(mark, marks)}</text>'
        )
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(
            f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step:g}</text>'
        )
    for number, each in enumerate(thinned):
        parts.append(_line(each, f"var(--c{number % COLORS})", x, y))
    legend = "".join(
        f'<span style="color:var(--c{number % COLORS})">{"- -" if each.dashed else "&#9632;"} '
        f"{html.escape(each.name)}</span>"
        for number, each in enumerate(series)
    )
    return "".join(parts) + f'</svg><p class="legend">{legend}</p>'


def _line(series: Series, color: str, x, y) -> str:
    """A line, or a dot where there is one point only."""
    if len(series.points) == 1:
        ((step, value),) = series.points
        return f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3" fill="{color}"/>'
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in series.points)
    dashes = ' stroke-dasharray="5 4"' if series.dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dashes}/>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MOST:
        return list(points)
    edges = [round(at * len(points) / MOST) for at in range(MOST + 1)]
    pieces = [points[start:stop] for start, stop in itertools.pairwise(edges)]
    return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]


def _text(mark: float, marks: Sequence[float]) -> str:
    """A mark with as many digits as tell it from its neighbors."""
    unit = marks[1] - marks[0]
    if max(abs(marks[0]), abs(marks[-1])) < 1e-3:
        return f"{mark:.1e}" if mark else "0"
    digits = max(0, -math.floor(math.log10(unit) + 1e-9))
    # 2.5 needs one more than its power of ten says.
    digits += abs(round(unit, digits) - unit) > unit * 1e-6
    return f"{mark:.{digits}f}"


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round bounds around the values, and round marks between them."""
    if high - low < 1e-12:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * 0.999)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return first * unit, last * unit, [number * unit for number in range(first, last + 1)]
