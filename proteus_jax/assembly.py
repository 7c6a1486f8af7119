"""A configuration and a teacher's sizes become the functions that train; nothing runs yet."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from proteus_jax import flops, optim, sharding
from proteus_jax.losses import LossWeights
from proteus_jax.models.functional import BackboneFunction, Params, StudentFunction
from proteus_jax.models.normalisation import Normalisation
from proteus_jax.models.specs import SPECS, ViTSpec
from proteus_jax.step import Metrics, TrainState, init_state, make_train_step


class Length(NamedTuple):
    """How long a run is, in steps."""

    total: int
    warmup: int


class Assembly(NamedTuple):
    """The models, and the two functions that a run compiles."""

    teacher: BackboneFunction
    students: dict[str, StudentFunction]
    init: Callable[[], TrainState]
    train_step: Callable[[TrainState, Params, jax.Array], tuple[TrainState, Metrics]]

    def work(self, config: Any) -> flops.Work:
        """What an image of the batch costs."""
        specs = [student.spec for student in self.students.values()]
        return flops.training(
            self.teacher.spec, specs, config.data.crop, masked=config.loss.patch > 0
        )

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
            jax.jit(self.train_step, donate_argnums=0, out_shardings=outputs),
        )


def dtype_of(precision: str, platform: str) -> Any:
    """float32, bfloat16, or what `auto` means on a platform."""
    if precision == "auto":
        precision = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def length(config: Any, images: int) -> Length:
    """Steps of a run over so many images an epoch."""
    total = config.steps or max(1, round(config.epochs * images / config.batch))
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_epochs * images / config.batch)
    return Length(total, warmup)


def assemble(
    config: Any, teacher: ViTSpec, normalisation: Normalisation, steps: Length, platform: str
) -> Assembly:
    """The models and the step that a configuration describes, for "cpu", "gpu" or "tpu"."""
    grid = config.data.crop // teacher.patch_size
    taught = BackboneFunction(
        dataclasses.replace(teacher, grid=grid), dtype_of(config.teacher_precision, platform)
    )
    students = {
        name: StudentFunction(
            dataclasses.replace(SPECS[name], grid=config.data.crop // SPECS[name].patch_size),
            teacher.width,
            dtype=dtype_of(config.precision, platform),
            drop_path=config.drop_path,
            remat=config.remat,
        )
        for name in config.student
    }
    peak = config.learning_rate or optim.scaled_learning_rate(config.batch)
    schedule = optim.warmup_cosine(peak, steps.warmup, steps.total)
    optimizer = optim.adamw(schedule, config.weight_decay, jnp.dtype(config.first_moment))
    step = make_train_step(
        teacher=taught,
        students=students,
        optimizer=optimizer,
        schedule=schedule,
        normalisation=normalisation,
        weights=LossWeights(config.loss.token, config.loss.feature, config.loss.patch),
        mask_ratio=config.mask_ratio,
        ema_decay=config.ema_decay,
        seed=config.seed,
        erasing=config.data.erasing,
        accumulate=config.accumulate,
    )

    def init() -> TrainState:
        return init_state(students, optimizer, ema=config.ema_decay > 0, seed=config.seed)

    return Assembly(taught, students, init, step)
