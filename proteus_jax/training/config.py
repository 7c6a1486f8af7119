"""A run's configuration, resolved once into frozen records; configs/base.py says what each field
means.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from proteus_jax.config import to_record
from proteus_jax.data.dataset import Reading
from proteus_jax.data.splits import HeldOut, Subset
from proteus_jax.data.transforms.randaugment import RandAugment
from proteus_jax.methods.base import Method
from proteus_jax.methods.config import PRIMARY, MethodConfig, TeacherConfig
from proteus_jax.methods.registry import make_method

# The values of init.method and init.heads.
RANDOM, COPY, SLICE, LEAST_SQUARES = "random", "copy", "slice", "least_squares"


class InitConfig(NamedTuple):
    """What students start from: "random" weights, a "copy" of the model `source`, or a "slice" of
    it or, where it is empty, of the primary teacher; and their heads: "random", or fitted by
    "least_squares". What is fitted is fitted on so many `images`.
    """

    method: str
    source: str
    heads: str
    images: int
    stream_scale: float

    @property
    def slices(self) -> bool:
        """True where students are cut out of a larger model."""
        return self.method == SLICE

    @property
    def fits_heads(self) -> bool:
        """True where heads start by least squares."""
        return self.heads == LEAST_SQUARES


class OptimizerConfig(NamedTuple):
    """The optimizer; `warmup_epochs` holds where `warmup_steps` is None. `muon_learning_rate` is
    that of Muon's matrices, `rates` are factors of the learning rates by part of the student.
    """

    name: str
    warmup_epochs: float
    warmup_steps: int | None
    weight_decay: float
    mu_dtype: str
    muon_learning_rate: float
    rates: Mapping[str, float]


class DataConfig(NamedTuple):
    """The images of a run, and how they are read and augmented."""

    root: tuple[str, ...]
    weights: tuple[float, ...]
    subset: Subset
    epoch: int | None
    repeated_aug: int
    crop: int
    randaugment: RandAugment
    erasing: float
    workers: int | None
    threads: int
    max_corrupt_fraction: float
    held_out: HeldOut
    range: str
    alpha: str
    image_column: str
    label_column: str

    @property
    def reading(self) -> Reading:
        """How images are found and become pixels."""
        return Reading.of(self)


class OnlineEvalConfig(NamedTuple):
    """Images with classes, and the protocols that measure on them during training."""

    root: str
    protocols: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All fields of a run; `as_json` holds them as config.json and checkpoints do."""

    as_json: dict[str, Any]
    teachers: Mapping[str, TeacherConfig]
    student: tuple[str, ...]
    init: InitConfig
    method: MethodConfig
    seed: int
    batch: int
    epochs: float
    steps: int | None
    learning_rate: float | None
    optimizer: OptimizerConfig
    ema_decay: float
    drop_path: float
    precision: str
    teacher_precision: str
    fsdp: int
    grad_accum_steps: int
    remat: str
    attention: str
    hosts: int | None
    devices: int | None
    data: DataConfig
    eval: OnlineEvalConfig
    log_every: int
    eval_every: int
    checkpoint_every: int
    max_skipped: int
    keep_checkpoints: int
    keep_every: int | None
    max_failed_saves: int
    preemption_timeout_s: float

    @property
    def image_size(self) -> int:
        """The side in pixels of the crops that are made: the largest that any model wants."""
        sizes = [teacher.image_size or 0 for teacher in self.teachers.values()]
        return max(self.data.crop, *sizes)

    @property
    def start(self) -> str:
        """The model that students are copied or sliced from; empty for random weights."""
        sliced_teacher = self.init.slices and not self.init.source
        return self.teachers[PRIMARY].source if sliced_teacher else self.init.source

    def make_method(self) -> Method:
        """Makes the method that the students learn by."""
        return make_method(self.method, self.teachers)

    def batch_unit(self, devices: int) -> int:
        """The number of images that the batch has to be a multiple of on so many devices: each has
        as many groups of images as the others, in every part of the batch.
        """
        return self.make_method().group * devices * self.grad_accum_steps


def resolve(values: Mapping[str, Any]) -> TrainConfig:
    """Makes the record of a configuration, as JSON values, whose fields keep the rules."""
    # The short form of teachers.teacher.source says nothing more.
    kept = {name: value for name, value in values.items() if name != "teacher"}
    method = dict(kept["method"])
    records = {
        "as_json": kept,
        "teachers": {name: TeacherConfig(**each) for name, each in kept["teachers"].items()},
        "method": MethodConfig(method.pop("name"), method),
    }
    return to_record(TrainConfig, kept | records)
