"""A configuration becomes the things that train: teacher, students, optimizer, step, images,
devices.

Everything that can be wrong is found here, before anything is written.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proteus_jax.data.dataset import open_configured
from proteus_jax.data.datasets.labeled import Pair, open_pair
from proteus_jax.data.sampler import Order, shares
from proteus_jax.data.sources import skimage
from proteus_jax.data.splits import Split
from proteus_jax.data.transforms.randaugment import RandAugment
from proteus_jax.data.transforms.random_resized_crop import Recipe
from proteus_jax.errors import InputError, collecting
from proteus_jax.evaluation.results import FILE as RESULTS
from proteus_jax.evaluation.teacher_agreement import Said
from proteus_jax.methods.feature_standardization import Moments, restored
from proteus_jax.methods.resample import resized
from proteus_jax.methods.teacher import Teacher, common_grid_size, teacher_features
from proteus_jax.methods.teacher_config import FIRST, lessons, masks, side_of_images
from proteus_jax.models.flops import known_device
from proteus_jax.models.functional import (
    Params,
    StudentFunction,
    in_precision,
    without_layer_scale,
)
from proteus_jax.models.normalization import Normalisation
from proteus_jax.models.precision import dtype_of
from proteus_jax.models.vit import Features, resize_position_table
from proteus_jax.runtime import sharding
from proteus_jax.runtime.filesystem import sha256
from proteus_jax.runtime.metric_writer import FILE as METRICS
from proteus_jax.runtime.workdir import CHECKPOINTS, STUDENTS, first_of, is_remote, why_no_workdir
from proteus_jax.training.builder import (
    Assembly,
    Known,
    assemble,
    length,
    misfits,
    unsuited,
)
from proteus_jax.training.initialization import adapted
from proteus_jax.training.resume import CARD, CONFIGURATION
from proteus_jax.training.train_state import TrainState
from proteus_jax.training.train_step import Metrics
from proteus_jax.weights.fetch import find_teacher, obtain_teacher, teacher_spec
from proteus_jax.weights.model_card import licence_of
from proteus_jax.weights.model_dir import WEIGHTS, ModelCard, load_card, load_model

# What a run writes after its config.json, and would take somebody else's place with.
WRITTEN = (METRICS, *STUDENTS, "report.html", "report", "agreement.png", "dump", "tensorboard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads: images, the directories of its teachers' weights by name, and that of the
    model to start from.
    """

    split: Split
    teachers: dict[str, Path]
    labelled: Pair | None = None
    start: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run needs, placed and compiled at first use."""

    config: Any
    mesh: Mesh
    split: Split
    labelled: Pair | None
    order: Order
    recipe: Recipe
    total_steps: int
    # What is not as was asked for; empty where all is.
    remarks: tuple[str, ...]
    facts: dict[str, Any]
    cards: dict[str, ModelCard]
    teacher_params: dict[str, Params]
    # Statistics and side of the images that are made for a step.
    normalisation: Normalisation
    side: int
    students: dict[str, StudentFunction]
    # "teacher", the first one, and each student's name: class tokens of images that are made so.
    class_tokens: dict[str, Callable[[Params, jax.Array], jax.Array]]
    state_shapes: TrainState
    state_shardings: TrainState
    init: Callable[[], TrainState]
    train_step: Callable[[TrainState, dict[str, Params], jax.Array], tuple[TrainState, Metrics]]
    # The first teacher's, its patches on the students' grid.
    teacher_features: Callable[[np.ndarray], Features]
    said: Callable[[str, TrainState, np.ndarray], Said]
    # As `said`, with the patches under a mask [b, n] hidden: what the patch head says there.
    hidden_patches: Callable[[str, TrainState, np.ndarray, np.ndarray], np.ndarray]
    # Floating-point operations for an image, and what all devices could do in a second; None where
    # that is not known.
    work: float
    peak: float | None


def open_inputs(config: Any, workdir: str | None, known: Sequence[str] = ()) -> Inputs:
    """Finds the images and the teacher; what a package index or a server has is fetched into the
    cache.

    InputError lists all that is wrong, with the problems that are known already first. Nothing is
    fetched while anything is wrong: a download of gigabytes must not come before the news of a
    misspelt path.
    """
    problems = [*known, *_check_workdir(workdir, config.data.root), *_check_devices(config)]
    problems += [] if known else unsuited(config, jax.default_backend())
    return _found(config, problems)


def prepare(config: Any, known: Sequence[str] = ()) -> None:
    """Finds the same, on a machine whose devices are not those of the run."""
    _found(config, list(known))


def _found(config: Any, problems: list[str]) -> Inputs:
    split, labelled = None, None
    models: dict[str, Path | None] = {}
    if config.eval.root not in ("", skimage.NAME):
        with collecting(problems, "--config.eval.root"):
            labelled = open_pair(config.eval.root)
    # These come from a package index.
    fetched = skimage.NAME in config.data.root
    if not fetched:
        with collecting(problems, "--config.data.root"):
            split = open_configured(config.data, config.seed)
    for field, source in _sources(config).items():
        with collecting(problems, f"--config.{field}"):
            models[field] = find_teacher(source)
    problems += _check_models(config, models)
    if not problems and split is None:
        with collecting(problems, "--config.data.root"):
            split = open_configured(config.data, config.seed)
    if not problems and None in models.values():
        for field, source in _sources(config).items():
            with collecting(problems, f"--config.{field}"):
                models[field] = obtain_teacher(source)
        problems += [] if problems else _check_models(config, models)
    if not problems and fetched and config.eval.root == skimage.NAME:
        with collecting(problems, "--config.eval.root"):
            labelled = open_pair(config.eval.root)
    found = {field: path for field, path in models.items() if path is not None}
    if problems or split is None or len(found) < len(models):
        raise InputError(problems)
    teachers = {name: found[_field(name)] for name in lessons(config)}
    return Inputs(split=split, teachers=teachers, labelled=labelled, start=found.get(START))


START = "start"


def _field(teacher: str) -> str:
    return "teacher" if teacher == FIRST else f"more_teachers.{teacher}.teacher"


def _sources(config: Any) -> dict[str, str]:
    """What each field that names a model says."""
    found = {_field(name): lesson.source for name, lesson in lessons(config).items()}
    return found | ({START: config.start} if config.start else {})


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
        return {"teacher", "student"} <= json.loads(described.read_text()).keys()
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


def found_devices() -> str:
    """What JAX found, as "2 hosts x 4 devices"."""

    def several(count: int, name: str) -> str:
        return f"{count} {name}{'' if count == 1 else 's'}"

    hosts, devices = jax.process_count(), jax.local_device_count()
    return f"{several(hosts, 'host')} x {several(devices, 'device')}"


def _check_devices(config: Any) -> list[str]:
    devices, hosts = jax.device_count(), jax.process_count()
    expected = config.hosts or hosts, config.devices or jax.local_device_count()
    if expected != (hosts, jax.local_device_count()):
        return [
            f"--config.hosts, --config.devices: found {found_devices()}, expected {expected[0]} x "
            f"{expected[1]}"
        ]
    if devices % config.fsdp:
        return [f"--config.fsdp: expected a divisor of the {devices} devices, found {config.fsdp}"]
    unit = images_together(config)
    if config.batch % unit:
        parts = f" and {config.accumulate} parts" if config.accumulate > 1 else ""
        return [
            f"--config.batch: expected a multiple of {unit} for {devices} devices{parts}, found "
            f"{config.batch}"
        ]
    return []


def images_together(config: Any) -> int:
    """What a batch has to be a multiple of."""
    # Half of the images is masked, and each device has its share of that half, in every part.
    return (2 if masks(config) else 1) * jax.device_count() * config.accumulate


def _check_models(config: Any, models: Mapping[str, Path | None]) -> list[str]:
    """What the sizes of the models make wrong, of those still to be fetched by what is known of
    them.
    """
    sources = _sources(config)
    specs = {
        field: teacher_spec(sources[field]) if directory is None else load_card(directory).spec
        for field, directory in models.items()
    }
    specs = {field: spec for field, spec in specs.items() if spec is not None}
    teachers = {name: specs[_field(name)] for name in lessons(config) if _field(name) in specs}
    return misfits(config, teachers, specs.get(START))


def build(config: Any, inputs: Inputs) -> Experiment:
    """Everything that a run needs; the teachers' weights go to the devices here."""
    weights = tuple(config.data.weights)
    if weights and 0 in shares(sum(inputs.split.parts), weights):
        raise InputError(f"--config.data.weights: {weights} leave nothing of one root")
    mesh = sharding.make_mesh(config.fsdp)
    steps = length(config, config.data.epoch or len(inputs.split.training))
    cards = {name: load_card(directory) for name, directory in inputs.teachers.items()}
    start = None if inputs.start is None else load_card(inputs.start)
    assembly = assemble(
        config,
        {name: Known(card.spec, card.normalisation) for name, card in cards.items()},
        steps,
        jax.default_backend(),
        start.spec if start else None,
    )
    teacher_params = {
        name: placed_teacher(assembly.teachers[name], directory, mesh)
        for name, directory in inputs.teachers.items()
    }
    init, train_step = assembly.compiled_on(mesh)
    shapes = assembly.state_shapes()
    places = sharding.shardings(shapes, mesh)
    features, said, hidden = _evaluation_functions(config, assembly, teacher_params, mesh)
    return Experiment(
        config=config,
        mesh=mesh,
        split=inputs.split,
        labelled=inputs.labelled,
        order=Order(config.seed, inputs.split.parts, weights, config.data.repeats),
        recipe=Recipe(side_of_images(config), RandAugment(**config.data.randaugment)),
        total_steps=steps.total,
        remarks=assembly.remarks,
        facts=_facts(config, inputs, assembly, cards, start),
        cards=cards,
        teacher_params=teacher_params,
        normalisation=assembly.normalisation,
        side=side_of_images(config),
        students=assembly.students,
        class_tokens=_class_tokens(config, assembly),
        state_shapes=shapes,
        state_shardings=places,
        init=_started(init, inputs.start, assembly, mesh),
        train_step=train_step,
        teacher_features=features,
        said=said,
        hidden_patches=hidden,
        work=assembly.work(config).total,
        peak=_peak(config),
    )


def _started(
    init: Callable[[], TrainState], start: Path | None, assembly: Assembly, mesh: Mesh
) -> Callable[[], TrainState]:
    """`init`, with the students' backbones from a model where there is one to start from."""
    if start is None:
        return init
    params, card = load_model(start)
    backbones = {
        name: adapted(params, card.spec, student.spec)
        for name, student in assembly.students.items()
    }

    def begun() -> TrainState:
        state = init()
        placed = {name: sharding.place_tree(each, mesh) for name, each in backbones.items()}
        learning = {
            name: {**values, "backbone": placed[name]} for name, values in state.params.items()
        }
        ema = state.ema
        if ema is not None:
            # Copies of their own: the state is donated, and no array may be in it twice.
            ema = {name: sharding.place_tree(each, mesh) for name, each in backbones.items()}
        return state._replace(params=learning, ema=ema)

    return begun


def _peak(config: Any) -> float | None:
    """Of all devices together, for matmuls in bfloat16."""
    device = known_device(jax.devices()[0].device_kind)
    if device is None or dtype_of(config.precision, jax.default_backend()) != jnp.bfloat16:
        return None
    return device.peak * jax.device_count()


def teacher_facts(assembly: Assembly, directories: Mapping[str, Path]) -> dict[str, Any]:
    """What must be the same of the teachers, by name."""
    return {
        name: {
            "weights": sha256(directories[name] / WEIGHTS),
            # Its grid follows the crop, which is a fact of its own.
            "spec": {**each.backbone.spec.to_json(), "grid": None},
            "loss_weights": assembly.method.loss_weights[name]._asdict(),
            "normalisation": _listed(each.normalisation),
            "side": each.side,
        }
        for name, each in assembly.teachers.items()
    }


def _facts(
    config: Any,
    inputs: Inputs,
    assembly: Assembly,
    cards: Mapping[str, ModelCard],
    start: ModelCard | None,
) -> dict[str, Any]:
    """What must be the same for a run to go on, and, as `card`, what its student carries on."""
    return {
        "data": inputs.split.training.fingerprint,
        "seed": config.seed,
        "batch": config.batch,
        "crop": config.data.crop,
        "weights": list(config.data.weights),
        "repeats": config.data.repeats,
        "randaugment": dict(config.data.randaugment),
        "erasing": config.data.erasing,
        "student": list(config.student),
        "student_specs": {name: each.spec.to_json() for name, each in assembly.students.items()},
        "start": None if inputs.start is None else sha256(inputs.start / WEIGHTS),
        "normalisation": _listed(assembly.normalisation),
        "teachers": teacher_facts(assembly, inputs.teachers),
        "teacher_widths": {
            name: each.backbone.spec.width for name, each in assembly.teachers.items()
        },
        "first_moment": config.first_moment,
        "averaged": config.ema_decay > 0,
        CONFIGURATION: json.loads(config.to_json()),
        CARD: {
            "licence": licence_of(cards, start),
            "families": {name: _family(name, start) for name in config.student},
        },
        "standardised": [name for name, each in assembly.teachers.items() if each.standardise],
    }


def _family(student: str, start: ModelCard | None) -> str:
    """Whose code has a place for a student: that of what it started from, or of its name."""
    if start is not None:
        return start.family
    return next((family for family in ("synclr", "clip") if family in student.split("_")), "dinov2")


def _listed(normalisation: Normalisation) -> list[list[float]]:
    return [list(part) for part in normalisation]


def placed_teacher(teacher: Teacher, directory: Path, mesh: Mesh) -> Params:
    """A frozen teacher's weights, those of its matmuls in its precision, the position table resized
    once for the size of its images.
    """
    params, card = load_model(directory)
    if card.spec.positions == "table":
        side = teacher.backbone.spec.grid
        table = resize_position_table(jnp.asarray(params["pos_embed"]), card.spec, (side, side))
        params["pos_embed"] = np.asarray(table)
    params = in_precision(without_layer_scale(params), teacher.backbone.dtype)
    return sharding.place_tree(params, mesh)


def _class_tokens(
    config: Any, assembly: Assembly
) -> dict[str, Callable[[Params, jax.Array], jax.Array]]:
    crop, teacher = config.data.crop, assembly.teachers[FIRST]
    grid = common_grid_size(assembly.students)

    def taught(params: Params, images: jax.Array) -> jax.Array:
        pixels = assembly.normalisation(images)
        said = teacher_features(teacher, params, pixels, assembly.normalisation, crop, grid)
        return said.cls.astype(jnp.float32)

    def of(student: StudentFunction) -> Callable[[Params, jax.Array], jax.Array]:
        backbone = student.backbone

        def learnt(params: Params, images: jax.Array) -> jax.Array:
            pixels = resized(assembly.normalisation(images), crop)
            return backbone(params, pixels).cls.astype(jnp.float32)

        return learnt

    return {FIRST: taught, **{name: of(student) for name, student in assembly.students.items()}}


def _evaluation_functions(
    config: Any, assembly: Assembly, teacher_params: dict[str, Params], mesh: Mesh
) -> tuple[Callable, Callable, Callable]:
    """First teacher and students as functions from a host batch to host arrays."""
    crop, grid = config.data.crop, common_grid_size(assembly.students)
    teacher, normalise = assembly.teachers[FIRST], assembly.normalisation

    def compiled(function: Callable, **options: Any) -> Callable:
        whole = sharding.replicated(mesh)
        return jax.jit(sharding.traced_on(mesh, function), out_shardings=whole, **options)

    @compiled
    def taught(params: Params, images: jax.Array) -> Features:
        return teacher_features(teacher, params, normalise(images), normalise, crop, grid)

    def in_its_scale(features: Features, statistics: dict[str, Moments]) -> Features:
        return restored(features, statistics[FIRST]) if FIRST in statistics else features

    @functools.partial(compiled, static_argnums=0)
    def learnt(name: str, params: Params, statistics: Any, images: jax.Array) -> Said:
        found = assembly.students[name](params, resized(normalise(images), crop))
        answers = found.answers[FIRST]
        spoken = in_its_scale(
            Features(answers.token, answers.feature, found.features.registers), statistics
        )
        return Said(found.features, spoken.cls, spoken.patches)

    @functools.partial(compiled, static_argnums=0)
    def guessed(
        name: str, params: Params, statistics: Any, images: jax.Array, mask: jax.Array
    ) -> jax.Array:
        pixels = resized(normalise(images), crop)
        answers = assembly.students[name](params, pixels, pixels, mask).answers[FIRST]
        assert answers.patch is not None
        spoken = Features(answers.token, answers.patch, answers.patch[:, :0])
        return in_its_scale(spoken, statistics).patches

    def features(images: np.ndarray) -> Features:
        return jax.device_get(taught(teacher_params[FIRST], _share(images, mesh)))

    def said(name: str, state: TrainState, images: np.ndarray) -> Said:
        known = state.params[name], state.statistics
        return jax.device_get(learnt(name, *known, _share(images, mesh)))

    def hidden(name: str, state: TrainState, images: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shares = (_share(part, mesh) for part in (images, mask))
        return jax.device_get(guessed(name, state.params[name], state.statistics, *shares))

    return features, said, hidden


def _share(images: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch that every host has whole, spread over the devices."""
    share = len(images) // jax.process_count()
    first = share * jax.process_index()
    return sharding.place_batch(images[first : first + share], mesh)
