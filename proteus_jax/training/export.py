"""Export of students: each as a model directory, with its card and README."""

from pathlib import Path
from typing import Any

import jax

import proteus_jax
from proteus_jax.methods.config import PRIMARY
from proteus_jax.runtime import sharding
from proteus_jax.runtime.metric_writer import read_metrics
from proteus_jax.training.evaluator import AVERAGE
from proteus_jax.training.setup import Experiment
from proteus_jax.training.train_state import TrainState
from proteus_jax.weights.model_card import text_of
from proteus_jax.weights.model_dir import ModelCard, save_model


def export_students(experiment: Experiment, state: TrainState, workdir: Path) -> list[Path]:
    """Writes the backbones alone, as model directories; the averaged ones beside them where there
    are any; returns where the students lie.
    """
    several, step = len(experiment.students) > 1, int(state.step)
    directories = []
    for name in experiment.students:
        card = _card(experiment, name, step)
        copies = {"student": state.params[name]["backbone"]}
        results = _results(experiment, name, workdir)
        if state.ema is not None:
            copies["student_ema"] = state.ema[name]
        for folder, params in copies.items():
            averaged = folder == "student_ema"
            readme = _readme(experiment, name, card, step, _of(results, averaged=averaged))
            target = workdir / folder / name if several else workdir / folder
            # Of all hosts: each may hold a part.
            whole = sharding.gather(params, experiment.mesh)
            if jax.process_index() == 0:
                save_model(target, whole, card, replace=True, readme=readme)
        directories.append(workdir / "student" / name if several else workdir / "student")
    return directories


def _card(experiment: Experiment, name: str, step: int) -> ModelCard:
    """A student's config.json."""
    config = experiment.config
    sources = {key: each.source for key, each in config.teachers.items()}
    digests = {key: facts["weights"] for key, facts in experiment.facts["teachers"].items()}
    several = {"teachers": sources, "teachers_sha256": digests} if len(sources) > 1 else {}
    return ModelCard(
        spec=experiment.students[name].spec,
        family=experiment.facts["card"]["families"][name],
        normalization=experiment.normalization,
        license=experiment.facts["card"]["licence"],
        source={
            "student": name,
            "teacher": sources[PRIMARY],
            "teacher_sha256": digests[PRIMARY],
            **several,
            **_recipe(experiment, step),
        },
    )


def _recipe(experiment: Experiment, step: int) -> dict[str, Any]:
    config = experiment.config
    recipe = {
        "steps": step,
        "batch": config.batch,
        "crop": config.data.crop,
        "images": ", ".join(config.data.root),
        "proteus_jax": proteus_jax.__version__,
    }
    if config.start:
        recipe |= {
            "init": config.init.method,
            "start": config.start,
            "start_sha256": experiment.facts["start"],
        }
    return recipe


def _results(experiment: Experiment, name: str, workdir: Path) -> dict[str, float]:
    """The newest value of each key of a student's metrics; nothing on other hosts than the
    first.
    """
    if jax.process_index():
        return {}
    prefix = f"{name}/" if len(experiment.students) > 1 else ""
    return {
        key.removeprefix(prefix): value
        for row in read_metrics(workdir)
        for key, value in row.items()
    }


def _of(results: dict[str, float], *, averaged: bool) -> dict[str, float]:
    """The results of a student or of its average, under the same keys; its teacher's are both's."""
    if not averaged:
        return results
    teachers = {key: value for key, value in results.items() if key.startswith("teacher_")}
    own = {
        key.removeprefix(AVERAGE): value
        for key, value in results.items()
        if key.startswith(AVERAGE)
    }
    return own | (teachers if own else {})


def _readme(
    experiment: Experiment, name: str, card: ModelCard, step: int, results: dict[str, float]
) -> str:
    teachers = {
        key: (each.source, experiment.cards[key])
        for key, each in experiment.config.teachers.items()
    }
    return text_of(card, name, teachers, _recipe(experiment, step), results)
