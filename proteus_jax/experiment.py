"""A configuration becomes the things that train: teacher, students, optimizer, step, images,
devices.

Everything that can be wrong is found here, before anything is written.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proteus_jax import sharding
from proteus_jax.assembly import assemble, dtype_of, length
from proteus_jax.data import pictures
from proteus_jax.data.augment import Recipe
from proteus_jax.data.catalog import open_images
from proteus_jax.data.labelled import Pair, open_pair
from proteus_jax.data.order import Order, shares
from proteus_jax.data.randaugment import RandAugment
from proteus_jax.data.splits import HeldOut, Split, Subset
from proteus_jax.errors import InputError, collecting
from proteus_jax.flops import known_device
from proteus_jax.models.functional import BackboneFunction, Params, StudentFunction
from proteus_jax.models.specs import SPECS
from proteus_jax.models.student import Predictions
from proteus_jax.models.vit import Features, resize_position_table
from proteus_jax.pretrained import WEIGHTS, ModelCard, load_card, load_model
from proteus_jax.step import Metrics, TrainState
from proteus_jax.storage import sha256
from proteus_jax.teachers import find_teacher, obtain_teacher
from proteus_jax.workdir import why_no_workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads: images, and the directory of the teacher's weights."""

    split: Split
    teacher: Path
    labelled: Pair | None = None


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
    facts: dict[str, Any]
    teacher_card: ModelCard
    teacher_params: Params
    students: dict[str, StudentFunction]
    # "teacher" and each student's name: the ViT alone.
    backbones: dict[str, BackboneFunction]
    state_shapes: TrainState
    state_shardings: TrainState
    init: Callable[[], TrainState]
    train_step: Callable[[TrainState, Params, jax.Array], tuple[TrainState, Metrics]]
    teacher_features: Callable[[np.ndarray], Features]
    predictions: Callable[[str, Params, np.ndarray], Predictions]
    # As `predictions`, with the patches under a mask [b, n] hidden: what the patch head says there.
    hidden_patches: Callable[[str, Params, np.ndarray, np.ndarray], np.ndarray]
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
    problems = [*known, *_check_workdir(workdir), *_check_devices(config)]
    split, teacher, labelled = None, None, None
    if config.eval.root not in ("", pictures.NAME):
        with collecting(problems, "--config.eval.root"):
            labelled = open_pair(config.eval.root)
    # These come from a package index.
    fetched = pictures.NAME in config.data.root
    if not fetched:
        with collecting(problems, "--config.data.root"):
            split = _open_images(config)
    with collecting(problems, "--config.teacher"):
        teacher = find_teacher(config.teacher)
        problems += _check_teacher(config, teacher)
    if not problems and split is None:
        with collecting(problems, "--config.data.root"):
            split = _open_images(config)
    if not problems and teacher is None:
        with collecting(problems, "--config.teacher"):
            teacher = obtain_teacher(config.teacher)
            problems += _check_teacher(config, teacher)
    if not problems and fetched and config.eval.root == pictures.NAME:
        with collecting(problems, "--config.eval.root"):
            labelled = open_pair(config.eval.root)
    if problems or split is None or teacher is None:
        raise InputError(problems)
    return Inputs(split=split, teacher=teacher, labelled=labelled)


def _open_images(config: Any) -> Split:
    held_out, subset = config.data.held_out, config.data.subset
    return open_images(
        config.data.root,
        held_out=HeldOut(held_out.share, held_out.minimum, held_out.maximum),
        subset=Subset(subset.classes, subset.images),
        seed=config.seed,
    )


def _check_workdir(workdir: str | None) -> list[str]:
    reason = None if workdir is None else why_no_workdir(workdir)
    return [f"--workdir: {reason}"] if reason else []


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
    # Half of the images is masked, and each device has its share of that half, in every part.
    unit = (2 if config.loss.patch else 1) * devices * config.accumulate
    if config.batch % unit:
        parts = f" and {config.accumulate} parts" if config.accumulate > 1 else ""
        return [
            f"--config.batch: expected a multiple of {unit} for {devices} devices{parts}, found "
            f"{config.batch}"
        ]
    return []


def _check_teacher(config: Any, directory: Path | None) -> list[str]:
    if directory is None:
        return []
    patch = load_card(directory).spec.patch_size
    return [
        f"--config.student: {name} has patches of {SPECS[name].patch_size} px, the teacher of "
        f"{patch} px; they must agree"
        for name in config.student
        if SPECS[name].patch_size != patch
    ]


def build(config: Any, inputs: Inputs) -> Experiment:
    """Everything that a run needs; the teacher's weights go to the devices here."""
    weights = tuple(config.data.weights)
    if weights and 0 in shares(sum(inputs.split.parts), weights):
        raise InputError(f"--config.data.weights: {weights} leave nothing of one root")
    mesh = sharding.make_mesh(config.fsdp)
    steps = length(config, config.data.epoch or len(inputs.split.training))
    card = load_card(inputs.teacher)
    assembly = assemble(config, card.spec, card.normalisation, steps, jax.default_backend())
    teacher_params = _teacher_params(config, inputs.teacher, mesh)
    teacher, students = assembly.teacher, assembly.students
    init, train_step = assembly.compiled_on(mesh)
    shapes = assembly.state_shapes()
    features, predictions, hidden = _evaluation_functions(
        teacher, teacher_params, students, card, mesh
    )
    return Experiment(
        config=config,
        mesh=mesh,
        split=inputs.split,
        labelled=inputs.labelled,
        order=Order(config.seed, inputs.split.parts, weights, config.data.repeats),
        recipe=Recipe(config.data.crop, RandAugment(**config.data.randaugment)),
        total_steps=steps.total,
        facts=_facts(config, inputs, card),
        teacher_card=card,
        teacher_params=teacher_params,
        students=students,
        backbones={
            "teacher": teacher,
            **{name: BackboneFunction(s.spec, s.dtype) for name, s in students.items()},
        },
        state_shapes=shapes,
        state_shardings=sharding.shardings(shapes, mesh),
        init=init,
        train_step=train_step,
        teacher_features=features,
        predictions=predictions,
        hidden_patches=hidden,
        work=assembly.work(config).total,
        peak=_peak(config),
    )


def _peak(config: Any) -> float | None:
    """Of all devices together, for matmuls in bfloat16."""
    device = known_device(jax.devices()[0].device_kind)
    if device is None or dtype_of(config.precision, jax.default_backend()) != jnp.bfloat16:
        return None
    return device.peak * jax.device_count()


def _facts(config: Any, inputs: Inputs, card: ModelCard) -> dict[str, Any]:
    """What must be the same for a run to go on."""
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
        "teacher": sha256(inputs.teacher / WEIGHTS),
        "teacher_width": card.spec.width,
    }


def _teacher_params(config: Any, directory: Path, mesh: Mesh) -> Params:
    """The frozen teacher's weights in their own precision, the position table resized once for the
    training crops.
    """
    params, card = load_model(directory)
    side = config.data.crop // card.spec.patch_size
    table = resize_position_table(jnp.asarray(params["pos_embed"]), card.spec, (side, side))
    params["pos_embed"] = np.asarray(table)
    dtype = dtype_of(config.teacher_precision, jax.default_backend())
    params = jax.tree.map(lambda array: array.astype(dtype), params)
    return sharding.place_tree(params, mesh)


def _evaluation_functions(
    teacher: BackboneFunction,
    teacher_params: Params,
    students: dict[str, StudentFunction],
    card: ModelCard,
    mesh: Mesh,
) -> tuple[Callable, Callable, Callable]:
    """Teacher and students as functions from a host batch to host arrays."""
    whole = sharding.replicated(mesh)

    @jax.jit(out_shardings=whole)
    def taught(params: Params, images: jax.Array) -> Features:
        return teacher(params, card.normalisation(images))

    @jax.jit(static_argnums=0, out_shardings=whole)
    def learnt(name: str, params: Params, images: jax.Array) -> Predictions:
        return students[name](params, card.normalisation(images))

    @jax.jit(static_argnums=0, out_shardings=whole)
    def guessed(name: str, params: Params, images: jax.Array, mask: jax.Array) -> jax.Array | None:
        pixels = card.normalisation(images)
        return students[name](params, pixels, pixels, mask).patch

    def features(images: np.ndarray) -> Features:
        return jax.device_get(taught(teacher_params, _share(images, mesh)))

    def predictions(name: str, params: Params, images: np.ndarray) -> Predictions:
        return jax.device_get(learnt(name, params, _share(images, mesh)))

    def hidden(name: str, params: Params, images: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shares = (_share(part, mesh) for part in (images, mask))
        return jax.device_get(guessed(name, params, *shares))

    return features, predictions, hidden


def _share(images: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch that every host has whole, spread over the devices."""
    share = len(images) // jax.process_count()
    first = share * jax.process_index()
    return sharding.place_batch(images[first : first + share], mesh)
