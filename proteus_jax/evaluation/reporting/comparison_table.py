"""Models against benchmarks, from the results.json of any number of evaluations.

Published numbers are those of the Proteus paper (arXiv 2407.10366) and of DINOv2's repository.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proteus_jax.errors import InputError
from proteus_jax.evaluation.protocols.registry import PROTOCOLS
from proteus_jax.evaluation.results import read_results

COLUMNS = ("linear", "linear, frozen crops", "knn", "fine-grained", "A", "R", "Sketch", "V2", "mCE")
# Percent. Linear and fine-grained: the paper's tables 1 and 4, its weight table for ViT-Ti;
# robustness: its table 7; knn: DINOv2's repository.
PUBLISHED = {
    "Proteus ViT-Ti/14 from DINOv2-S": {
        "linear": 75.2,
        "fine-grained": 80.2,
        "A": 11.3,
        "R": 39.8,
        "Sketch": 26.7,
        "mCE": 67.3,
    },
    "Proteus ViT-S/14 from DINOv2-B": {
        "linear": 81.8,
        "fine-grained": 85.8,
        "A": 31.1,
        "R": 51.0,
        "Sketch": 39.8,
        "mCE": 50.5,
    },
    "Proteus ViT-B/14 from DINOv2-L": {
        "linear": 84.9,
        "fine-grained": 88.6,
        "A": 52.4,
        "R": 63.4,
        "Sketch": 51.0,
        "mCE": 38.6,
    },
    "Proteus ViT-L/14 from DINOv2-g": {"linear": 86.2, "fine-grained": 91.0},
    "DINOv2 ViT-S/14": {"linear": 81.1, "knn": 79.0, "fine-grained": 87.6},
    "DINOv2 ViT-B/14": {"linear": 84.5, "knn": 82.1, "fine-grained": 90.0},
    "DINOv2 ViT-L/14": {"linear": 86.3, "knn": 83.5, "fine-grained": 91.0},
}


def cells(results: dict[str, Any]) -> dict[str, float]:
    """The cells of one evaluation, by column."""
    protocol = PROTOCOLS.get(results["protocol"].partition(",")[0])
    return {} if protocol is None else protocol.cells(results)


def table(directories: Sequence[Path], *, published: bool = True) -> str:
    """A table of Markdown. InputError lists directories without results."""
    places: set[str] = set()
    rows: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    problems = []
    for directory in directories:
        try:
            results = read_results(directory)
            key = results["model"]["weights_sha256"]
            names.setdefault(key, results["model"]["name"])
            row = rows.setdefault(key, {})
            for column, value in cells(results).items():
                if row.get(column, value) != value:
                    problems.append(
                        f"{directory}: another {column} of {names[key]} than a directory before "
                        "it: one table takes one of each"
                    )
                row[column] = value
            places.add(_source_of(results))
        except InputError as error:
            problems += error.problems
        except (KeyError, TypeError, AttributeError) as error:
            problems.append(f"{directory}: not the results of an evaluation: {error!r}")
    if problems:
        raise InputError(problems)
    shown = [(names[key], row) for key, row in rows.items()]
    measured = list(dict.fromkeys(column for _, row in shown for column in row))
    used = [column for column in COLUMNS if column in measured]
    used += [column for column in measured if column not in COLUMNS]
    if published:
        shown += [
            (f"{name} (published)", row)
            for name, row in PUBLISHED.items()
            if row.keys() & set(used)
        ]
    lines = [f"| model | {' | '.join(used)} |", "|---" * (len(used) + 1) + "|"]
    for name, row in shown:
        values = [f"{row[column]:.1f}" if column in row else "" for column in used]
        safe = name.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {safe} | {' | '.join(values)} |")
    lines.append(f"\nMeasured: {'; '.join(sorted(places))}.")
    if published:
        lines.append("Published: on ImageNet-1K, its variants, and the twelve data sets.")
    return "\n".join(lines)


def _source_of(results: dict[str, Any]) -> str:
    """How one evaluation was made, as far as numbers depend on it."""
    source = f"{results['protocol']} on {results['data']['root']}"
    share = results.get("constants", {}).get("held_out", 0)
    if results["protocol"].startswith("linear"):
        source += " (best head by the test set"
        source += f", {share:.0%} of the training images left for another choice)" if share else ")"
    return source + (" (best k)" if results["protocol"] == "knn" else "")
