"""A configuration and a teacher's sizes become the functions that train; nothing runs yet."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from proteus_jax.errors import InputError
from proteus_jax.methods.base import Method
from proteus_jax.methods.config import PRIMARY
from proteus_jax.methods.teacher import Teacher
from proteus_jax.models import flops
from proteus_jax.models.attention import choose
from proteus_jax.models.config import ViTSpec, student_spec
from proteus_jax.models.functional import BackboneFunction, Params, StudentFunction
from proteus_jax.models.normalization import Normalization
from proteus_jax.models.precision import dtype_of
from proteus_jax.runtime import sharding
from proteus_jax.slicing.sizes import sliced_spec
from proteus_jax.training.config import OptimizerConfig, TrainConfig
from proteus_jax.training.optimizer import (
    adamw,
    muon,
    scaled_learning_rate,
    warmup_cosine,
    with_rates,
)
from proteus_jax.training.train_state import TrainState, init_state
from proteus_jax.training.train_step import Metrics, TrainStep

# A warm-up that would take all of a run takes this part of it.
SHORTENED = 10
# Channels of a head of nearly every ViT: what is asked of a platform before its models are known.
HEAD = 64


class RunLength(NamedTuple):
    """How long a run is, in steps; `remark` says where its warm-up is shorter than was asked for,
    and is empty where it is not.
    """

    total: int
    warmup: int
    remark: str = ""


class Assembly(NamedTuple):
    """The models, and the two functions that a run compiles."""

    method: Method
    teachers: dict[str, Teacher]
    students: dict[str, StudentFunction]
    # Of the images that students see.
    normalization: Normalization
    init: Callable[[], TrainState]
    train_step: Callable[[TrainState, dict[str, Params], jax.Array], tuple[TrainState, Metrics]]
    # What there is to say of how it came out.
    remarks: tuple[str, ...] = ()

    def work(self, crop: int) -> flops.Work:
        """FLOPs for an image of the batch, with crops of so many pixels."""
        specs = [student.spec for student in self.students.values()]
        teachers = [(each.backbone.spec, each.side or crop) for each in self.teachers.values()]
        return flops.training(teachers, specs, crop, masked_share=self.method.masked_share)

    def state_shapes(self) -> TrainState:
        """The train state without its numbers."""
        return jax.eval_shape(self.init)

    def compiled_on(self, mesh: Mesh) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
        """`init` and `train_step` for a mesh, compiled at first use; the state is born sharded, and
        donated.
        """
        places = sharding.shardings(self.state_shapes(), mesh)
        outputs = (places, sharding.replicated(mesh))
        return (
            jax.jit(self.init, out_shardings=places),
            jax.jit(
                sharding.traced_on(mesh, self.train_step), donate_argnums=0, out_shardings=outputs
            ),
        )


def run_length(config: TrainConfig, images: int) -> RunLength:
    """Steps of a run over so many images an epoch."""
    total = config.steps or max(1, round(config.epochs * images / config.batch))
    warmup = config.optimizer.warmup_steps
    if warmup is None:
        warmup = round(config.optimizer.warmup_epochs * images / config.batch)
    if not warmup or warmup < total:
        return RunLength(total, warmup)
    # The learning rate would never be reached.
    shorter = total // SHORTENED
    return RunLength(
        total,
        shorter,
        f"warm-up of {shorter} steps in place of {warmup}, as the run has {total} in all "
        "(--config.optimizer.warmup_steps, --config.optimizer.warmup_epochs)",
    )


class TeacherInfo(NamedTuple):
    """The facts about a model that are known before its weights."""

    spec: ViTSpec
    normalization: Normalization


def assemble(
    config: TrainConfig,
    teachers: Mapping[str, TeacherInfo],
    steps: RunLength,
    platform: str,
    start: ViTSpec | None = None,
) -> Assembly:
    """The models and the step that a configuration describes, for "cpu", "gpu" or "tpu"; teachers
    by the names in `config.teachers`, `start` is what the students start from.
    """
    remarks: list[str] = []
    attention = functools.partial(_attention, config, platform, remarks)
    built = _teachers(config, teachers, dtype_of(config.teacher_precision, platform), attention)
    widths = {name: teacher.backbone.spec.width for name, teacher in built.items()}
    students = _students(config, widths, dtype_of(config.precision, platform), attention, start)
    peak = config.learning_rate or scaled_learning_rate(config.batch)
    schedule = warmup_cosine(peak, steps.warmup, steps.total)
    optimizer = _optimizer(config.optimizer, schedule, steps)
    # Students see images as the primary teacher does.
    normalization = built[PRIMARY].normalization
    method = config.make_method()
    step = TrainStep(
        method=method,
        teachers=built,
        students=students,
        optimizer=optimizer,
        schedule=schedule,
        normalization=normalization,
        ema_decay=config.ema_decay,
        seed=config.seed,
        erasing=config.data.erasing,
        grad_accum_steps=config.grad_accum_steps,
    )
    standardized = {name: widths[name] for name, each in built.items() if each.standardize}

    def init() -> TrainState:
        return init_state(
            students,
            optimizer,
            ema=config.ema_decay > 0,
            seed=config.seed,
            standardize=standardized,
        )

    all_remarks = tuple(dict.fromkeys(filter(None, [steps.remark, *remarks])))
    return Assembly(method, built, students, normalization, init, step, all_remarks)


def _optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, steps: RunLength
) -> optax.GradientTransformation:
    """The optimizer that a configuration names; `schedule` is the rate of AdamW's part."""
    settings = config.weight_decay, jnp.dtype(config.mu_dtype)
    if config.name == "muon":
        of_matrices = warmup_cosine(config.muon_learning_rate, steps.warmup, steps.total)
        return with_rates(muon(of_matrices, schedule, *settings), config.rates)
    return with_rates(adamw(schedule, *settings), config.rates)


def _attention(
    config: TrainConfig, platform: str, remarks: list[str], spec: ViTSpec, dtype: Any
) -> str:
    """Chooses attention's implementation for a model; remarks on it are added to `remarks`."""
    try:
        choice = choose(config.attention, platform, dtype, spec.width // spec.heads)
    except ValueError as error:
        raise InputError(f"--config.attention: {error}") from None
    remarks.append(choice.remark)
    return choice.implementation


def _teachers(
    config: TrainConfig, known: Mapping[str, TeacherInfo], dtype: Any, attention: Callable[..., str]
) -> dict[str, Teacher]:
    """Builds the teachers, each with its position table made for the size of images that it sees,
    and its LayerScale in its weights.
    """
    built = {}
    for name, given in config.teachers.items():
        spec = known[name].spec
        grid = (given.image_size or config.data.crop) // spec.patch_size
        built[name] = Teacher(
            BackboneFunction(
                dataclasses.replace(spec, grid=grid, layer_scale=False),
                dtype,
                attention(spec, dtype),
            ),
            given.statistics(known[name].normalization),
            given.image_size,
            given.standardize,
        )
    return built


def _students(
    config: TrainConfig,
    widths: dict[str, int],
    dtype: Any,
    attention: Callable[..., str],
    start: ViTSpec | None,
) -> dict[str, StudentFunction]:
    """Builds the students, each with heads of the teachers' widths."""
    specs = {name: spec_of(config, name, start) for name in config.student}
    return {
        name: StudentFunction(
            spec,
            widths,
            dtype=dtype,
            drop_path=config.drop_path,
            remat=config.remat,
            attention=attention(spec, dtype),
        )
        for name, spec in specs.items()
    }


def spec_of(config: TrainConfig, name: str, start: ViTSpec | None) -> ViTSpec:
    """The spec of a student by its name; `start` is what it is copied or sliced from. ValueError
    where they do not fit together.
    """
    if start is not None and config.init.slices:
        return sliced_spec(start, config.data.crop, name=name)
    return student_spec(name, config.data.crop, start)


def check_platform(config: TrainConfig, platform: str) -> list[str]:
    """Lists what is asked for and a platform does not have, in words."""
    problems = []
    if config.teacher_precision == "float16" and platform == "tpu":
        problems.append(
            "--config.teacher_precision: expected auto, bfloat16 or float32 on a TPU, which has no "
            "float16"
        )
    for precision in dict.fromkeys([config.precision, config.teacher_precision]):
        try:
            choose(config.attention, platform, dtype_of(precision, platform), HEAD)
        except ValueError as error:
            problems.append(f"--config.attention: {error}")
    return list(dict.fromkeys(problems))


def check_compatibility(
    config: TrainConfig, teachers: Mapping[str, ViTSpec], start: ViTSpec | None
) -> list[str]:
    """Lists what the sizes of the models make wrong, in words. Students without a model to start
    from have been checked with the configuration.
    """
    problems = []
    for name, given in config.teachers.items():
        side = given.image_size or config.data.crop
        if name in teachers and side % teachers[name].patch_size:
            field = f"teachers.{name}.image_size" if given.image_size else "data.crop"
            problems.append(
                f"--config.{field}: {given.source} has patches of {teachers[name].patch_size} px, "
                f"which do not divide images of {side} px"
            )
    for name in config.student if start is not None else ():
        try:
            spec = spec_of(config, name, start)
        except ValueError as error:
            problems.append(f"--config.student: {error}")
            continue
        reasons = config.make_method().problems(spec.grid**2)
        problems += [f"--config.method.{reason}" for reason in reasons]
    return list(dict.fromkeys(problems))
