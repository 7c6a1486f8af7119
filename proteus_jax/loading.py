"""Whatever holds a backbone, loaded: a model directory, a known teacher, a run."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from proteus_jax.checkpoint import Checkpoints
from proteus_jax.errors import InputError
from proteus_jax.known import KNOWN
from proteus_jax.models.functional import Params, StudentFunction
from proteus_jax.models.specs import SPECS
from proteus_jax.pretrained import CARD, WEIGHTS, Model, ModelCard, load_card, load_model
from proteus_jax.teachers import find_teacher, obtain_teacher
from proteus_jax.workdir import CHECKPOINTS, Workdir, fetched, is_remote


def load_any(source: str | Path) -> Model:
    """See proteus_jax.load."""
    if str(source) in KNOWN:
        return Model(*load_model(obtain_teacher(str(source))))
    if is_remote(str(source)):
        with fetched(str(source), (CARD, WEIGHTS)) as folder:
            return Model(*load_model(folder))
    directory = Path(source).expanduser()
    if not directory.is_dir():
        find_teacher(str(source))
    if (directory / WEIGHTS).is_file():
        return Model(*load_model(directory))
    students = directory / "student"
    if (students / WEIGHTS).is_file():
        return Model(*load_model(students))
    if students.is_dir():
        names = sorted(path.name for path in students.iterdir() if (path / WEIGHTS).is_file())
        raise InputError(
            f"{source}: a run with several students: load one of {', '.join(map(str, names))} "
            "in student/"
        )
    if (directory / CHECKPOINTS).is_dir() and (directory / CARD).is_file():
        return _from_checkpoint(directory)
    raise InputError(f"{source}: neither a model directory (no {CARD} and {WEIGHTS}) nor a run")


def _run_config(workdir: Path) -> dict[str, Any]:
    """What a run was configured with; InputError where that is no run's."""
    path = workdir / CARD
    try:
        config = json.loads(path.read_text())
        known = all(name in SPECS for name in config["student"])
        if not known or not isinstance(config["data"]["crop"], int):
            raise ValueError("student or data.crop")
        config["teacher"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the configuration of a run: {error!r}") from None
    return config


class Heads(NamedTuple):
    """A student with its heads, as the newest checkpoint of its run has it."""

    student: StudentFunction
    params: Params
    step: int


def load_heads(source: str | Path) -> Heads | None:
    """The student of a run's directory with its heads; None for what is no run with a checkpoint,
    or has several students.
    """
    workdir = Path(source).expanduser()
    if is_remote(str(source)) or not (workdir / CHECKPOINTS).is_dir():
        return None
    config = _run_config(workdir)
    if len(config["student"]) != 1:
        return None
    (name,) = config["student"]
    spec = dataclasses.replace(SPECS[name], grid=config["data"]["crop"] // SPECS[name].patch_size)
    with contextlib.closing(Checkpoints(Workdir(workdir).checkpoints)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            return None
        student = StudentFunction(spec, checkpoints.facts(step)["teacher_width"])
        return Heads(student, checkpoints.params(step, {name: student.shapes})[name], step)


def _from_checkpoint(workdir: Path) -> Model:
    """The backbone of the newest checkpoint of a run that has not ended."""
    config = _run_config(workdir)
    if len(config["student"]) != 1:
        raise InputError(f"{workdir}: a run with several students that has not ended")
    found = load_heads(workdir)
    if found is None:
        raise InputError(f"{workdir}: a run without a checkpoint")
    teacher = load_card(obtain_teacher(config["teacher"]))
    card = ModelCard(
        spec=found.student.spec,
        normalisation=teacher.normalisation,
        licence=f"that of its teacher: {teacher.licence}",
        source={"run": str(workdir), "step": found.step, "teacher": config["teacher"]},
    )
    return Model(jax.device_get(found.params["backbone"]), card)
