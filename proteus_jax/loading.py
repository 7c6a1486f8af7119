"""Whatever holds a backbone, loaded: a model directory, a known teacher, a run."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proteus_jax.checkpoint.checkpointer import Checkpoints
from proteus_jax.checkpoint.items import FORMAT, PARAMS, STATISTICS, VERSION
from proteus_jax.checkpoint.store import CheckpointStore
from proteus_jax.errors import InputError
from proteus_jax.feature_extractor import Model
from proteus_jax.methods.config import PRIMARY
from proteus_jax.methods.feature_standardization import RunningMoments, init_moments, unstandardize
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import Params, StudentFunction, in_precision
from proteus_jax.models.normalization import Normalization
from proteus_jax.models.precision import dtype_of
from proteus_jax.models.vit import Features
from proteus_jax.runtime.workdir import CHECKPOINTS, Workdir, is_remote
from proteus_jax.weights.convert.hf_directory import wanted_files
from proteus_jax.weights.fetch import obtain_model
from proteus_jax.weights.model_dir import CARD, WEIGHTS, ModelCard, load_model


def load_any(source: str | Path, precision: str = "float32") -> Model:
    """See proteus_jax.load."""
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise InputError(f"load: expected a path or the name of a model, found {source!r}")
    if precision not in ("float32", "bfloat16", "auto"):
        raise InputError(f"precision: expected float32, bfloat16 or auto, found {precision!r}")
    model = _loaded(source)
    dtype = dtype_of(precision, jax.default_backend())
    if dtype == jnp.float32:
        return model
    return Model(in_precision(model.params, dtype), model.card, dtype)


def _loaded(source: str | Path) -> Model:
    directory = Path(source).expanduser()
    if not directory.is_dir() or wanted_files(path.name for path in directory.iterdir()):
        return Model(*load_model(obtain_model(str(source))))
    students = directory / "student"
    if (students / WEIGHTS).is_file():
        model = Model(*load_model(students))
        # A run that has been made longer, and has not ended again, has a newer one.
        saved, exported = (
            CheckpointStore(Workdir(directory).checkpoints).last_saved_step(),
            model.card.source,
        )
        if saved is None or saved <= exported.get("steps", saved):
            return model
        return _from_checkpoint(directory)
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
    """The configuration of a run; InputError where the file is no run's."""
    path = workdir / CARD
    try:
        config = json.loads(path.read_text())
        if not all(isinstance(name, str) for name in config["student"]):
            raise ValueError("student")
        config["teachers"][PRIMARY]["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the configuration of a run: {error!r}") from None
    return config


class Heads(NamedTuple):
    """A student with its heads, as the newest checkpoint of its run has it, and the statistics of
    the images that it saw. `statistics` has the moments of the teachers whose tokens were
    standardized, `facts` what the run must agree with.
    """

    student: StudentFunction
    params: Params
    step: int
    normalization: Normalization
    statistics: dict[str, RunningMoments]
    facts: dict[str, Any]

    @property
    def teacher(self) -> dict[str, Any]:
        """Facts of the first teacher: `spec`, `side`, `normalization` and more."""
        return self.facts["teachers"][PRIMARY] | {"width": self.facts["teacher_widths"][PRIMARY]}

    @property
    def moments(self) -> RunningMoments | None:
        """The first teacher's."""
        return self.statistics.get(PRIMARY)

    def predictions(self, images: np.ndarray | jax.Array) -> dict[str, Features]:
        """Predicts each teacher's tokens of uint8 images [B, H, W, 3]: class token [B, T] and
        patches [B, N, T], in the teacher's own scale.
        """
        outputs = self.student(self.params, self.normalization(jnp.asarray(images))).by_teacher
        nothing = jnp.zeros((len(images), 0, 1))
        features = {
            name: Features(each.token, each.feature, nothing) for name, each in outputs.items()
        }
        return {
            name: unstandardize(each, self.statistics[name]) if name in self.statistics else each
            for name, each in features.items()
        }


def load_heads(source: str | Path) -> Heads | None:
    """The student of a run's directory with its heads; None for what is no run with a checkpoint,
    or has several students.
    """
    workdir = Path(source).expanduser()
    if is_remote(str(source)) or not (workdir / CHECKPOINTS).is_dir():
        return None
    if len(_run_config(workdir)["student"]) != 1:
        return None
    with contextlib.closing(Checkpoints(Workdir(workdir).checkpoints)) as checkpoints:
        step = checkpoints.store.newest().step
        if step is None:
            return None
        facts = checkpoints.facts(step)
        if facts.get(FORMAT) != VERSION:
            raise InputError(
                f"{workdir}: its checkpoint is of another version of proteus_jax (format "
                f"{facts.get(FORMAT, 1)}, expected {VERSION}); load its student/ instead"
            )
        if len(facts["student_specs"]) != 1:
            return None
        (name,) = facts["student_specs"]
        spec = ViTSpec.from_json(facts["student_specs"][name])
        student = StudentFunction(spec, facts["teacher_widths"])
        mean, deviation = (tuple(part) for part in facts["normalization"])
        wanted: dict[str, Any] = {PARAMS: {name: student.shapes}}
        if facts["standardized"]:
            wanted[STATISTICS] = {
                key: init_moments(facts["teacher_widths"][key])._asdict()
                for key in facts["standardized"]
            }
        items = checkpoints.restore(step, wanted)
        return Heads(
            student,
            items[PARAMS][name],
            step,
            Normalization(mean, deviation),
            {name: RunningMoments(**each) for name, each in items.get(STATISTICS, {}).items()},
            facts,
        )


def _from_checkpoint(workdir: Path) -> Model:
    """The backbone of the newest checkpoint of a run that has not ended."""
    config = _run_config(workdir)
    if len(config["student"]) != 1:
        raise InputError(f"{workdir}: a run with several students that has not ended")
    heads = load_heads(workdir)
    if heads is None:
        raise InputError(f"{workdir}: a run without a checkpoint")
    card = ModelCard(
        spec=heads.student.spec,
        family=next(iter(heads.facts["card"]["families"].values())),
        normalization=heads.normalization,
        license=heads.facts["card"]["licence"],
        source={
            "run": str(workdir),
            "step": heads.step,
            "teacher": config["teachers"][PRIMARY]["source"],
        },
    )
    return Model(jax.device_get(heads.params["backbone"]), card)
