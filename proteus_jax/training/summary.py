"""The lines that a run prints at its beginning and at its end."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import proteus_jax
from proteus_jax.engine.hooks import LAST_STEPS
from proteus_jax.evaluation.teacher_agreement import NEIGHBORS
from proteus_jax.methods.config import NATIVE, TeacherConfig
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.metric_writer import read_metrics
from proteus_jax.training.inputs import describe_devices
from proteus_jax.training.setup import Experiment

# Percent by which accuracy and balanced accuracy differ where both are said.
WORTH_A_WORD = 1.0


def print_header(
    experiment: Experiment,
    workdir: str,
    resumed: int | None,
    remarks: Sequence[str],
    console: Console,
) -> None:
    """Prints teachers, students and images, how far the run is, and remarks."""
    config = experiment.config
    kind = jax.devices()[0].device_kind
    console.line(f"proteus_jax {proteus_jax.__version__} on {describe_devices()} ({kind})")
    for name, each in config.teachers.items():
        spec = experiment.cards[name].spec
        size = sum(array.size for array in jax.tree.leaves(experiment.teacher_params[name]))
        console.line(
            f"teacher  {each.source}: {spec.depth} blocks, {spec.width} wide, "
            f"{size / 1e6:.1f} M parameters{_given(each)}"
        )
    for name, shapes in experiment.state_shapes.params.items():
        size = sum(array.size for array in jax.tree.leaves(shapes["backbone"]))
        spec = experiment.students[name].spec
        console.line(
            f"student  {name}: {spec.depth} blocks, {spec.width} wide, {size / 1e6:.1f} M "
            "parameters"
        )
    split, roots = experiment.split, ", ".join(config.data.root)
    console.line(f"images   {len(split.training)} to train on, from {roots}")
    for line in split.passed_over.lines():
        console.line(f"         passed over: {line}")
    console.line(
        f"training {experiment.total_steps} steps of {config.batch} crops of {config.data.crop} "
        f"px, in {workdir}"
    )
    for remark in remarks:
        console.line(remark)
    if resumed is not None:
        at_its_end = resumed >= experiment.total_steps
        console.line(
            f"resuming at step {resumed}" + (", where nothing is left to train" * at_its_end)
        )


def _given(each: TeacherConfig) -> str:
    """Words for a teacher whose images or tokens are not as usual."""
    facts = []
    if each.image_size is not None:
        facts.append(f"images of {each.image_size} px")
    if each.normalization != NATIVE:
        facts.append(f"{each.normalization} statistics")
    if each.standardize:
        facts.append("standardized")
    return f" ({', '.join(facts)})" if facts else ""


def print_summary(
    experiment: Experiment, workdir: Path, directories: Sequence[str], console: Console
) -> None:
    """Prints what was learned, where it lies, and how to load it."""
    rows = list(read_metrics(workdir))
    for name, directory in zip(experiment.students, directories, strict=True):
        prefix = f"{name}/" if len(directories) > 1 else ""
        console.line()
        console.line(f"what {name} learned")
        for text in _score_lines(rows, prefix, experiment.loss_names):
            console.line("  " + text)
        console.line(f"it lies in {directory}; to use it:")
        console.line()
        console.line("  import proteus_jax")
        console.line(f'  model = proteus_jax.load("{directory}")')
        side = experiment.config.data.crop
        console.line(
            f"  features = model(images)  # uint8 [B, {side}, {side}, 3] -> .cls [B, D], "
            ".patches [B, N, D]"
        )


def _score_lines(rows: list[dict[str, Any]], prefix: str, losses: Sequence[str]) -> Iterator[str]:
    steps = [row for row in rows if prefix + "loss" in row]
    if steps:
        # Of a run that another version began only every so many steps have a row.
        first = "first step" if steps[0]["step"] == 1 else f"step {steps[0]['step']}"
        ending = [row for row in steps if row["step"] > steps[-1]["step"] - LAST_STEPS]
        yield f"{'':38}{first:>12}{f'last {len(ending)}':>10}"
        for key in losses:
            last = np.mean([row[prefix + key] for row in ending])
            yield f"{key.replace('_', ' '):38}{steps[0][prefix + key]:12.3f}{last:10.3f}"
    measured = [row for row in rows if prefix + "agreement_class" in row]
    if measured:
        yield f"{'on held-out views':38}{'before':>12}{'after':>10}"
        labels = {
            "agreement_class": "centered cosine, class token",
            "agreement_patch": "centered cosine, patch tokens",
            "neighbour_overlap": f"share of {NEIGHBORS} nearest neighbors",
            "cka": "linear CKA, class token",
            "ema_neighbour_overlap": f"share of {NEIGHBORS} nearest neighbors, average",
            "ema_cka": "linear CKA, class token, average",
        }
        for key, label in labels.items():
            first, last = _before(rows, prefix + key), measured[-1].get(prefix + key)
            # Without a feature head nothing is said of patches, without an average nothing of it.
            if last is not None:
                shown = "not measured" if first is None else f"{first:.3f}"
                yield f"{label:38}{shown:>12}{last:10.3f}"
    yield from _scored(rows, prefix)


def _before(rows: list[dict[str, Any]], key: str) -> float | None:
    """What was measured before the first step; None where nothing was, as where a run was given
    images with classes later.
    """
    return next((row[key] for row in rows if row["step"] == 0 and key in row), None)


def _scored(rows: list[dict[str, Any]], prefix: str) -> Iterator[str]:
    """Percent right on labeled images, student and teacher side by side."""
    labels = {"knn_top1": "nearest neighbors", "ridge_top1": "ridge probe"}
    named = dict.fromkeys(key for row in rows for key in row if key.startswith("teacher_"))
    for key in (each.removeprefix("teacher_") for each in named if "balanced" not in each):
        measured = [row for row in rows if prefix + key in row]
        label = labels.get(key, key.replace("_", " "))
        if measured:
            before, after = _before(rows, prefix + key), measured[-1][prefix + key]
            of_teacher = measured[-1][f"teacher_{key}"]
            share = f": {after / of_teacher:.0%}" if of_teacher else ""
            average = measured[-1].get(f"{prefix}ema_{key}")
            also = "" if average is None else f", average {average:.1f}"
            even = measured[-1].get(prefix + key.replace("_top1", "_balanced_top1"), after)
            if abs(even - after) > WORTH_A_WORD:
                also = f" (balanced {even:.1f}){also}"
            random = measured[-1].get(f"{prefix}random_{key}")
            start = "" if random is None else f", random weights {random:.1f}"
            yield (
                f"{label}: student {after:.1f}{also}, teacher {of_teacher:.1f}{share} "
                f"(before {'not measured' if before is None else f'{before:.1f}'}{start})"
            )
