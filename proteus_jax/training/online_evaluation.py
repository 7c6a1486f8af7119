"""The protocols of proteus_jax.evaluation during training: teacher, students and their averages on
images with classes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from proteus_jax.config import Override, load
from proteus_jax.data.datasets.labeled import TrainTestSplit
from proteus_jax.data.reading_rules import READING_RULES
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.data.workers import worker_pool
from proteus_jax.errors import InputError
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import FrozenBackbone, LoaderConfig
from proteus_jax.evaluation.protocol import Context, Protocol
from proteus_jax.evaluation.protocols.registry import PROTOCOLS
from proteus_jax.evaluation.results import weights_digest
from proteus_jax.evaluation.schema import evaluation_schema
from proteus_jax.models.functional import Params
from proteus_jax.runtime import sharding
from proteus_jax.runtime.console import Console
from proteus_jax.training.config import TrainConfig

FOLDER = "evaluation"
# The shorter side of a test image over its center crop, as in 256 to 224.
MARGIN = 8 / 7


class Evaluation(NamedTuple):
    """A protocol with its configuration, and its data."""

    protocol: Protocol
    config: EvalConfig
    data: Any


def open_evaluations(config: TrainConfig) -> tuple[Evaluation, ...]:
    """Finds the data of the protocols that a run asks for; InputError lists what is wrong."""
    if not config.eval.root:
        return ()
    data: dict[Callable, Any] = {}
    evaluations, problems = [], []
    for name in config.eval.protocols:
        protocol, own = PROTOCOLS[name], _evaluation_config(config, name)
        try:
            if protocol.open not in data:
                data[protocol.open] = protocol.open(own)
        except InputError as error:
            problems += [_named_by_the_run(problem, name) for problem in error.problems]
            continue
        evaluations.append(Evaluation(protocol, own, data[protocol.open]))
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    return tuple(evaluations)


def _evaluation_config(config: TrainConfig, name: str) -> EvalConfig:
    """A protocol's own fields as its configuration has them, images and their size as the run's."""
    crop = config.data.crop
    fields = {
        "protocol": name,
        "model": "the run's",
        "seed": config.seed,
        "batch": config.batch,
        "data.root": config.eval.root,
        **{field: getattr(config.data, field.removeprefix("data.")) for field in READING_RULES},
        "data.resize": round(crop * MARGIN),
        "data.crop": crop,
        "data.workers": config.data.workers,
        "data.threads": max(config.data.threads, 1),
        **{f"{name}.{field}": value for field, value in PROTOCOLS[name].during_training.items()},
    }
    overrides = [Override(field, str(value)) for field, value in fields.items()]
    made, problems = load(f"eval/{name}", overrides, evaluation_schema)
    if problems:
        raise InputError(problems)
    return made


def _named_by_the_run(problem: str, protocol: str) -> str:
    """A problem of an evaluation's field, named by the run's own where it has one."""
    field, colon, rest = problem.partition(": ")
    if field == "--config.data.root":
        return f"--config.eval.root{colon}{rest}"
    return f"--config.eval.protocols: {protocol}: {problem}"


def split_of(evaluations: Sequence[Evaluation]) -> TrainTestSplit | None:
    """Returns the images with classes that a protocol learns from and is tested on, if any does."""
    splits = (each.data for each in evaluations if isinstance(each.data, TrainTestSplit))
    return next(splits, None)


def check_models(
    evaluations: Sequence[Evaluation], models: Mapping[str, FrozenBackbone]
) -> list[str]:
    """Lists what of the models does not fit the protocols."""
    problems = [
        problem
        for each in evaluations
        for model in models.values()
        for problem in each.protocol.check(each.config, model.spec, lambda: "the run's own")
    ]
    return [f"--config.eval.protocols: {problem}" for problem in dict.fromkeys(problems)]


class OnlineEvaluation:
    """Measures models by every protocol; what protocols write lies in WORKDIR/evaluation."""

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        models: Mapping[str, FrozenBackbone],
        sides: Mapping[str, int],
        workdir: Path,
        console: Console,
    ):
        self._evaluations, self._models, self._sides = evaluations, models, sides
        self._workdir, self._console = workdir, console

    def measure(self, name: str, params: Params, step: int) -> dict[str, float]:
        """Measures a model with such weights; returns scores as `<protocol>_<score>`."""
        frozen, values = self._models[name].with_params(params), {}
        for each in self._evaluations:
            context = self._context(each, name, frozen, step)
            results = each.protocol.measure(context, each.data)
            scores = each.protocol.scores(results)
            values |= {f"{each.protocol.name}_{key}": value for key, value in scores.items()}
        frozen.forget()
        return values

    def _context(self, each: Evaluation, name: str, frozen: FrozenBackbone, step: int) -> Context:
        side, data = self._sides[name], each.config.data
        pool = worker_pool(data.workers, data.threads, side)
        folder = self._workdir / FOLDER / each.protocol.name / name
        if each.protocol.writes_files and jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        return Context(
            config=each.config,
            frozen=frozen,
            digest=lambda: weights_digest(sharding.gather(frozen.params, frozen.mesh)),
            mesh=frozen.mesh,
            workdir=folder,
            view=CenterCrop(round(side * MARGIN), side),
            reading=LoaderConfig(each.config.batch, pool.workers, pool.threads),
            say=self._console.log,
            progress=lambda text: self._console.progress(
                f"step {step}: {name}, {each.protocol.name}: {text}"
            ),
        )
