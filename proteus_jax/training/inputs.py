"""A run's inputs, found and checked before anything is fetched or written."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from proteus_jax.data.dataset import open_images
from proteus_jax.data.sources import skimage
from proteus_jax.data.splits import Split
from proteus_jax.errors import InputError, collecting
from proteus_jax.evaluation.results import FILE as RESULTS
from proteus_jax.methods.config import PRIMARY
from proteus_jax.models.normalization import Normalization
from proteus_jax.runtime.metric_writer import FILE as METRICS
from proteus_jax.runtime.workdir import CHECKPOINTS, STUDENTS, is_remote
from proteus_jax.runtime.workdir_checks import first_of, why_no_workdir
from proteus_jax.training.builder import (
    check_compatibility,
    check_platform,
)
from proteus_jax.training.config import TrainConfig
from proteus_jax.training.online_evaluation import FOLDER as EVALUATION
from proteus_jax.training.online_evaluation import Evaluation, open_evaluations
from proteus_jax.weights.fetch import find_model, obtain_model, teacher_spec
from proteus_jax.weights.model_dir import WEIGHTS, load_card

# What a run writes after its config.json, and would take somebody else's place with.
WRITTEN = (
    METRICS,
    *STUDENTS,
    "report.html",
    "report",
    "agreement.png",
    "dump",
    "tensorboard",
    EVALUATION,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """A run's inputs: images, the directories of its teachers' weights by name, and that of the
    model to start from.
    """

    split: Split
    teachers: dict[str, Path]
    evaluations: tuple[Evaluation, ...] = ()
    start: Path | None = None


def open_inputs(config: TrainConfig, workdir: str | None, known: Sequence[str] = ()) -> Inputs:
    """Finds the images and the teacher; what a package index or a server has is fetched into the
    cache.

    InputError lists all that is wrong, with the problems that are known already first. Nothing is
    fetched while anything is wrong: a download of gigabytes must not come before the news of a
    misspelt path.
    """
    problems = [*known, *_check_workdir(workdir, config.data.root), *_check_devices(config)]
    problems += [] if known else check_platform(config, jax.default_backend())
    return _found(config, problems)


def prepare(config: TrainConfig, known: Sequence[str] = ()) -> None:
    """Finds the same, on a machine whose devices are not those of the run."""
    _found(config, list(known))


def _found(config: TrainConfig, problems: list[str]) -> Inputs:
    split, evaluations = None, ()
    models: dict[str, Path | None] = {}
    if config.eval.root not in ("", skimage.NAME):
        with collecting(problems):
            evaluations = open_evaluations(config)
    # These come from a package index.
    fetched = skimage.NAME in config.data.root
    if not fetched:
        with collecting(problems, "--config.data.root"):
            split = open_split(config)
    for field, source in _sources(config).items():
        with collecting(problems, f"--config.{field}"):
            models[field] = find_model(source)
    problems += _check_models(config, models)
    if not problems and split is None:
        with collecting(problems, "--config.data.root"):
            split = open_split(config)
    if not problems and None in models.values():
        for field, source in _sources(config).items():
            with collecting(problems, f"--config.{field}"):
                models[field] = obtain_model(source)
        problems += [] if problems else _check_models(config, models)
    if not problems and fetched and config.eval.root == skimage.NAME:
        with collecting(problems):
            evaluations = open_evaluations(config)
    directories = {field: path for field, path in models.items() if path is not None}
    if problems or split is None or len(directories) < len(models):
        raise InputError(problems)
    teachers = {name: directories[_field(name)] for name in config.teachers}
    return Inputs(
        split=split,
        teachers=teachers,
        evaluations=evaluations,
        start=directories.get(start_field(config)),
    )


def open_split(config: TrainConfig) -> Split:
    """Opens the images of a run; see proteus_jax.data.dataset.open_images."""
    data = config.data
    return open_images(
        data.root,
        held_out=data.held_out,
        subset=data.subset,
        seed=config.seed,
        reading=data.reading,
    )


START = "init.source"


def start_field(config: TrainConfig) -> str:
    """The field that names the model which students are copied or sliced from."""
    return _field(PRIMARY) if config.init.slices and not config.init.source else START


def _field(teacher: str) -> str:
    """The field that names a teacher's source, by its short form where it has one."""
    return "teacher" if teacher == PRIMARY else f"teachers.{teacher}.source"


def _sources(config: TrainConfig) -> dict[str, str]:
    """The models that the fields of a configuration name, by field."""
    sources = {_field(name): each.source for name, each in config.teachers.items()}
    return sources | ({START: config.init.source} if config.init.source else {})


def _check_workdir(workdir: str | None, roots: Sequence[str]) -> list[str]:
    problems: list[str] = []
    with collecting(problems, "--workdir"):
        reason = None if workdir is None else why_no_workdir(workdir)
        if workdir is not None and not reason:
            reason = _why_no_run(workdir) or _why_among_images(workdir, roots)
        if reason:
            raise InputError(reason)
    return problems


def _why_no_run(workdir: str) -> str | None:
    """Why a run would write over what lies in a folder; None where that is nothing, or a run."""
    if first_of(workdir, (f"{CHECKPOINTS}.json",)):
        return None
    there = first_of(workdir, (WEIGHTS, RESULTS))
    if there:
        return f"{workdir} holds a model or an evaluation ({there}); give another folder"
    if is_remote(workdir) or _is_a_runs(Path(workdir).expanduser() / "config.json"):
        return None
    there = first_of(workdir, ("config.json", *WRITTEN))
    if there:
        return f"{workdir} holds {there}, and is no run's; give another folder"
    return None


def _is_a_runs(described: Path) -> bool:
    try:
        return {"teachers", "student"} <= json.loads(described.read_text()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _why_among_images(workdir: str, roots: Sequence[str]) -> str | None:
    """A run's own pictures would be images to train on."""
    if is_remote(workdir):
        return None
    # os.path's own raise nothing: what is wrong with a root is said of the root.
    place = Path(os.path.realpath(os.path.expanduser(workdir)))  # noqa: PTH111
    for root in roots:
        folder = os.path.realpath(os.path.expanduser(root))  # noqa: PTH111
        if os.path.isdir(folder) and place.is_relative_to(folder):  # noqa: PTH112
            return f"{workdir} lies in {root}, whose images the run's own would be among"
    return None


def describe_devices() -> str:
    """Describes the devices that JAX found, as "2 hosts x 4 devices"."""

    def several(count: int, name: str) -> str:
        return f"{count} {name}{'' if count == 1 else 's'}"

    hosts, devices = jax.process_count(), jax.local_device_count()
    return f"{several(hosts, 'host')} x {several(devices, 'device')}"


def _check_devices(config: TrainConfig) -> list[str]:
    devices, hosts = jax.device_count(), jax.process_count()
    expected = config.hosts or hosts, config.devices or jax.local_device_count()
    if expected != (hosts, jax.local_device_count()):
        return [
            f"--config.hosts, --config.devices: found {describe_devices()}, expected "
            f"{expected[0]} x {expected[1]}"
        ]
    if devices % config.fsdp:
        return [f"--config.fsdp: expected a divisor of the {devices} devices, found {config.fsdp}"]
    unit, count = config.batch_unit(devices), config.grad_accum_steps
    if config.batch % unit:
        parts = f" and {count} parts" if count > 1 else ""
        return [
            f"--config.batch: expected a multiple of {unit} for {devices} devices{parts}, found "
            f"{config.batch}"
        ]
    return []


def _check_models(config: TrainConfig, models: Mapping[str, Path | None]) -> list[str]:
    """Lists what the sizes of the models make wrong, of those still to be fetched by what is known
    of them.
    """
    sources = _sources(config)
    specs = {
        field: teacher_spec(sources[field]) if directory is None else load_card(directory).spec
        for field, directory in models.items()
    }
    specs = {field: spec for field, spec in specs.items() if spec is not None}
    teachers = {name: specs[_field(name)] for name in config.teachers if _field(name) in specs}
    problems = check_compatibility(config, teachers, specs.get(start_field(config)))
    return problems + _check_statistics(config, models)


def _check_statistics(config: TrainConfig, models: Mapping[str, Path | None]) -> list[str]:
    """A slice computes what its source does only on images of the same channel statistics."""
    primary, start = models.get(_field(PRIMARY)), models.get(START)
    if not config.init.slices or primary is None or start is None:
        return []
    students = config.teachers[PRIMARY].statistics(load_card(primary).normalization)
    found = load_card(start).normalization
    if found == students:
        return []
    return [
        f"--config.{START}: expected a model of the channel statistics that students see, "
        f"{_mean_and_deviation(students)}, found {_mean_and_deviation(found)}"
    ]


def _mean_and_deviation(statistics: Normalization) -> str:
    mean, deviation = (", ".join(f"{value:.3g}" for value in part) for part in statistics)
    return f"mean {mean} and deviation {deviation}"
