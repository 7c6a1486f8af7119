"""The configuration of an evaluation, as a frozen record; configs/eval/base.py says what each field
means.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from proteus_jax.config import to_record


class DataConfig(NamedTuple):
    """The images, and how they are read."""

    root: str
    resize: int
    crop: int
    workers: int | None
    threads: int


class KnnConfig(NamedTuple):
    """The fields of the k-NN protocol."""

    neighbours: tuple[float, ...]
    temperature: float


class LinearConfig(NamedTuple):
    """The fields of the linear probe."""

    epochs: float
    learning_rates: tuple[float, ...]
    blocks: tuple[float, ...]
    held_out: float
    cache: bool


class FineGrainedConfig(NamedTuple):
    """The fields of the fine-grained protocol."""

    datasets: tuple[str, ...]


class RobustnessConfig(NamedTuple):
    """The fields of the robustness protocol."""

    head: str


class AnalysisConfig(NamedTuple):
    """The fields of the analysis."""

    teacher: str
    images: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """All fields of an evaluation; `as_json` holds them as config.json does."""

    as_json: dict[str, Any]
    protocol: str
    model: str
    seed: int
    batch: int
    precision: str
    data: DataConfig
    knn: KnnConfig
    linear: LinearConfig
    finegrained: FineGrainedConfig
    robustness: RobustnessConfig
    analysis: AnalysisConfig


def resolve(values: Mapping[str, Any]) -> EvalConfig:
    """Makes the record of a configuration, as JSON values, whose fields keep the rules."""
    return to_record(EvalConfig, {**values, "as_json": dict(values)})
