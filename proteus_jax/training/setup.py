"""A configuration becomes the things that train: teacher, students, optimizer, step, images,
devices.

Everything that can be wrong is found here, before anything is written.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proteus_jax.data.sampler import Sampler, shares
from proteus_jax.data.splits import Split
from proteus_jax.data.transforms.random_resized_crop import TrainTransform
from proteus_jax.errors import InputError
from proteus_jax.evaluation.feature_extraction import FrozenBackbone
from proteus_jax.evaluation.teacher_agreement import StudentOutputs
from proteus_jax.methods.config import PRIMARY
from proteus_jax.methods.teacher import Teacher
from proteus_jax.models.flops import known_device
from proteus_jax.models.functional import (
    Params,
    StudentFunction,
    in_precision,
    without_layer_scale,
)
from proteus_jax.models.normalization import Normalization
from proteus_jax.models.pos_embed import resize_position_table
from proteus_jax.models.precision import dtype_of
from proteus_jax.models.vit import Features
from proteus_jax.runtime import sharding
from proteus_jax.training.builder import (
    TeacherInfo,
    assemble,
    run_length,
)
from proteus_jax.training.config import TrainConfig
from proteus_jax.training.fingerprint import fingerprint
from proteus_jax.training.inference import evaluation_functions, frozen_backbones
from proteus_jax.training.initialization import InitialState
from proteus_jax.training.inputs import Inputs
from proteus_jax.training.online_evaluation import Evaluation, check_models
from proteus_jax.training.train_state import TrainState
from proteus_jax.training.train_step import Metrics
from proteus_jax.weights.model_dir import ModelCard, load_card, load_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run needs, placed and compiled at first use."""

    config: TrainConfig
    mesh: Mesh
    split: Split
    evaluations: tuple[Evaluation, ...]
    order: Sampler
    recipe: TrainTransform
    total_steps: int
    # What is not as was asked for; empty where all is.
    remarks: tuple[str, ...]
    facts: dict[str, Any]
    cards: dict[str, ModelCard]
    teacher_params: dict[str, Params]
    # Statistics and side of the images that are made for a step.
    normalization: Normalization
    side: int
    students: dict[str, StudentFunction]
    # Names of the losses in a row of metrics, the primary teacher's first.
    loss_names: tuple[str, ...]
    # The primary teacher's and each student's backbone, for the protocols of evaluation, with the
    # sides in pixels of their images. Students' weights are those that they are given.
    backbones: dict[str, FrozenBackbone]
    sides: dict[str, int]
    state_shapes: TrainState
    state_shardings: TrainState
    init: InitialState
    train_step: Callable[[TrainState, dict[str, Params], jax.Array], tuple[TrainState, Metrics]]
    # The first teacher's, its patches on the students' grid.
    teacher_features: Callable[[np.ndarray], Features]
    student_outputs: Callable[[str, TrainState, np.ndarray], StudentOutputs]
    # The patch head's predictions of the patches under a mask [b, n].
    hidden_patches: Callable[[str, TrainState, np.ndarray, np.ndarray], np.ndarray]
    # Floating-point operations for an image, and what all devices could do in a second; None where
    # that is not known.
    work: float
    peak: float | None


def build_experiment(config: TrainConfig, inputs: Inputs) -> Experiment:
    """Everything that a run needs; the teachers' weights go to the devices here."""
    weights = config.data.weights
    if weights and 0 in shares(sum(inputs.split.parts), weights):
        raise InputError(f"--config.data.weights: {weights} leave nothing of one root")
    mesh = sharding.make_mesh(config.fsdp)
    steps = run_length(config, config.data.epoch or len(inputs.split.training))
    cards = {name: load_card(directory) for name, directory in inputs.teachers.items()}
    start = None if inputs.start is None else load_card(inputs.start)
    assembly = assemble(
        config,
        {name: TeacherInfo(card.spec, card.normalization) for name, card in cards.items()},
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
    features, outputs, hidden = evaluation_functions(config, assembly, teacher_params, mesh)
    backbones = frozen_backbones(assembly, teacher_params, mesh)
    problems = check_models(inputs.evaluations, backbones)
    if problems:
        raise InputError(problems)
    return Experiment(
        config=config,
        mesh=mesh,
        split=inputs.split,
        evaluations=inputs.evaluations,
        order=Sampler(config.seed, inputs.split.parts, weights, config.data.repeated_aug),
        recipe=TrainTransform(config.image_size, config.data.randaugment),
        total_steps=steps.total,
        remarks=assembly.remarks,
        facts=fingerprint(config, inputs, assembly, cards, start),
        cards=cards,
        teacher_params=teacher_params,
        normalization=assembly.normalization,
        side=config.image_size,
        students=assembly.students,
        loss_names=assembly.method.loss_names,
        backbones=backbones,
        sides={PRIMARY: assembly.teachers[PRIMARY].side or config.data.crop}
        | dict.fromkeys(assembly.students, config.data.crop),
        state_shapes=shapes,
        state_shardings=places,
        init=InitialState(
            config=config,
            assembly=assembly,
            teacher_params=teacher_params,
            source=inputs.start,
            images=inputs.split.training,
            parts=inputs.split.parts,
            mesh=mesh,
            random=init,
        ),
        train_step=train_step,
        teacher_features=features,
        student_outputs=outputs,
        hidden_patches=hidden,
        work=assembly.work(config.data.crop).total,
        peak=_peak(config),
    )


def _peak(config: TrainConfig) -> float | None:
    """Peak of all devices together, for matmuls in bfloat16."""
    device = known_device(jax.devices()[0].device_kind)
    if device is None or dtype_of(config.precision, jax.default_backend()) != jnp.bfloat16:
        return None
    return device.peak * jax.device_count()


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
