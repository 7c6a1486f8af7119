"""report.html: one file that shows a run, without a network, on a phone and in the dark.

Made of what lies in the run's directory: metrics.jsonl, config.json and the pictures of
snapshots.py. Whatever comes from outside (names of files and students, values of the configuration)
is escaped.
"""

import base64
import html
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from proteus_jax.evaluation.reporting.snapshots import FOLDER
from proteus_jax.evaluation.reporting.svg_chart import Series, chart
from proteus_jax.methods.config import PRIMARY
from proteus_jax.runtime.filesystem import write_atomically
from proteus_jax.runtime.metric_writer import read_metrics

FILE = "report.html"
# So many moments of a run are shown as pictures.
MOMENTS = 6
AGREEMENT = ("agreement_class", "agreement_patch", "neighbour_overlap", "cka")
STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d2330; --faint: #66708a; --line: #dde1ea;
  --c0: #2563c9; --c1: #c2410c; --c2: #15803d; --c3: #8b3fb5; --c4: #b4890a; --c5: #0f8a94; }
@media (prefers-color-scheme: dark) { :root { --back: #14171f; --text: #e5e8f0; --faint: #98a2ba;
  --line: #2d3342; --c0: #7aa7f7; --c1: #f2935c; --c2: #63c98a; --c3: #cf94ee; --c4: #e3c058;
  --c5: #5cc8d1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { color: var(--faint); margin: .25rem 0; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem),
  1fr)); }
figure { margin: 0; min-width: 0; } figure svg { width: 100%; height: auto; display: block; }
figure img { width: 100%; max-width: 72rem; height: auto; display: block; border-radius: 4px; }
.moment { display: grid; grid-template-columns: 5.5rem 1fr; gap: .5rem; align-items: center;
  margin: .25rem 0; color: var(--faint); font-size: .85rem; }
@media (max-width: 34rem) { .moment { grid-template-columns: 1fr; gap: 0; } }
table { border-collapse: collapse; } td, th { overflow-wrap: normal;
  padding: .15rem .9rem .15rem 0; text-align: right;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; } .wide { overflow-x: auto; }
pre { overflow-x: auto; font-size: .8rem; border: 1px solid var(--line); padding: .75rem;
  border-radius: 4px; } .pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 20rem), 1fr)); } .legend span { margin-right: 1rem; white-space: nowrap; }
"""


def write_report(workdir: Path, students: Sequence[str], total_steps: int) -> None:
    """Renews WORKDIR/report.html."""
    write_atomically(workdir / FILE, report(workdir, students, total_steps))


def report(workdir: Path, students: Sequence[str], total_steps: int) -> str:
    """The page. With one student its name is in none of the keys of metrics.jsonl."""
    rows = list(read_metrics(workdir))
    config = (workdir / "config.json").read_text()
    facts = json.loads(config)
    step = rows[-1]["step"] if rows else 0
    title = f"{', '.join(students)} from {facts['teachers'][PRIMARY]['source']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>step {step} of {total_steps} &middot; images from "
        f"{html.escape(', '.join(facts['data']['root']))}</p>",
        *_students(rows, workdir, students),
        *_machine(rows),
        f"<h2>Configuration</h2><pre>{html.escape(config)}</pre>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _students(rows: list[dict[str, Any]], workdir: Path, students: Sequence[str]) -> Iterator[str]:
    for name in students:
        prefix = f"{name}/" if len(students) > 1 else ""
        if prefix:
            yield f"<h2>{html.escape(name)}</h2>"
        yield from _summary(rows, prefix)
        yield '<div class="charts">'
        yield _figure("losses", _series(rows, prefix, _losses(rows, prefix)))
        yield _figure(
            "agreement with the teacher on held-out views", _series(rows, prefix, AGREEMENT)
        )
        charts = [*_series(rows, prefix, _scores(rows)), *_levels(rows)]
        yield _figure("percent right on labeled images", charts)
        yield "</div>"
        yield from _pictures(workdir, name)


def _machine(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield '<h2>Pace</h2><div class="charts">'
    yield _figure("learning rate", _series(rows, "", ("learning_rate",)))
    yield _figure("images a second", _series(rows, "", ("images_per_second",)))
    yield _figure("share of the time that waits for images", _series(rows, "", ("data_wait",)))
    yield _figure("MFU", _series(rows, "", ("mfu",)))
    yield "</div>"


def _series(rows: list[dict[str, Any]], prefix: str, keys: Sequence[str]) -> list[Series]:
    series = []
    for key in keys:
        points = [(row["step"], row[prefix + key]) for row in rows if prefix + key in row]
        if points:
            series.append(Series(key.replace("_", " "), points))
    return series


def _losses(rows: list[dict[str, Any]], prefix: str) -> list[str]:
    """The names of a student's losses, their sum first."""
    names = dict.fromkeys(key for row in rows for key in row if key.endswith("_loss"))
    return ["loss", *(key.removeprefix(prefix) for key in names if key.startswith(prefix))]


def _scores(rows: list[dict[str, Any]]) -> list[str]:
    """The names of what protocols measured of students and teacher alike."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("teacher_"))
    return [key.removeprefix("teacher_") for key in names if "balanced" not in key]


def _levels(rows: list[dict[str, Any]]) -> list[Series]:
    """The teacher's scores, which stay, as lines over the whole run."""
    levels = []
    for key in _scores(rows):
        values = [row[f"teacher_{key}"] for row in rows if f"teacher_{key}" in row]
        if values:
            points = [(rows[0]["step"], values[-1]), (rows[-1]["step"], values[-1])]
            levels.append(Series(f"teacher {key.replace('_', ' ')}", points, dashed=True))
    return levels


def _figure(caption: str, series: list[Series]) -> str:
    """A chart under its caption; nothing where nothing was measured."""
    if not series:
        return ""
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{chart(series)}</figure>"


def _summary(rows: list[dict[str, Any]], prefix: str) -> Iterator[str]:
    """First and last numbers, as a table."""
    lines = []
    scores = _scores(rows)
    for key in (*_losses(rows, prefix), *AGREEMENT, *scores):
        values = [row[prefix + key] for row in rows if prefix + key in row]
        if values:
            of_teacher = [row[f"teacher_{key}"] for row in rows if f"teacher_{key}" in row]
            beside = (
                f"{of_teacher[-1]:.1f}: {_share(values[-1], of_teacher[-1])}" if of_teacher else ""
            )
            digits = 1 if key in scores else 3
            first = next(row for row in rows if prefix + key in row)
            # What is measured is measured before the first step, if it is asked for by then.
            known = key in _losses(rows, prefix) or first["step"] == 0
            before = f"{values[0]:.{digits}f}" if known else "not measured"
            lines.append(
                f"<tr><td>{key.replace('_', ' ')}</td><td>{before}</td>"
                f"<td>{values[-1]:.{digits}f}</td><td>{beside}</td></tr>"
            )
    if lines:
        yield '<div class="wide"><table><tr><th></th><th>first</th><th>last</th>'
        yield "<th>teacher: share</th></tr>"
        yield "".join(lines) + "</table></div>"


def _share(student: float, teacher: float) -> str:
    return f"{student / teacher:.0%}" if teacher and math.isfinite(student / teacher) else ""


def _pictures(workdir: Path, name: str) -> Iterator[str]:
    folder = workdir / FOLDER
    moments = _chosen(sorted((folder / name).glob("pca-*.png")))
    if not moments or not (folder / "views.png").is_file():
        return
    yield "<h3>Patch tokens as colors</h3>"
    yield "<p>the teacher's three principal components; the student through its feature head</p>"
    yield _moment("views", folder / "views.png")
    yield _moment("teacher", folder / "teacher.png")
    for path in moments:
        yield _moment(f"step {int(path.stem.rpartition('-')[2])}", path)
    errors = _chosen(sorted((folder / name).glob("errors-*.png")))
    if errors:
        yield "<h3>Errors where patches are hidden</h3>"
        yield "<p>dark blue: none; yellow: as large as the teacher's own spread, or larger</p>"
        for path in errors:
            yield _moment(f"step {int(path.stem.rpartition('-')[2])}", path)
    both = (("by the teacher", folder / "neighbours-teacher.png"),)
    both += ((f"by {name}", folder / name / "neighbours.png"),)
    if all(path.is_file() for _, path in both):
        yield "<h3>Nearest held-out views</h3><p>each row: a view, then the nearest to it</p>"
        yield '<div class="pair">'
        for caption, path in both:
            yield f"<figure><figcaption>{html.escape(caption)}</figcaption>{_image(path)}</figure>"
        yield "</div>"


def _chosen(paths: list[Path]) -> list[Path]:
    """The first, the last, and some between."""
    if len(paths) <= MOMENTS:
        return paths
    return [paths[round(at * (len(paths) - 1) / (MOMENTS - 1))] for at in range(MOMENTS)]


def _moment(caption: str, path: Path) -> str:
    figure = f"<figure>{_image(path, caption)}</figure>"
    return f'<div class="moment"><span>{html.escape(caption)}</span>{figure}</div>'


def _image(path: Path, text: str = "") -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{content}">'
