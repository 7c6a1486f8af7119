"""Rules for the fields of a configuration that evaluates."""

from proteus_jax.evaluation.config import EvalConfig, resolve
from proteus_jax.models.precision import PRECISIONS
from proteus_jax.schema import (
    ABOVE_ZERO,
    BOOLEAN,
    MOST_WORKERS,
    SEED,
    Rule,
    Schema,
    at_least,
    numbers,
    one_of,
    share,
    up_to,
)

PROTOCOLS = ("knn", "linear", "finegrained", "robustness", "analysis")
FINEGRAINED = (
    *("aircraft", "caltech101", "cars", "cifar10", "cifar100", "dtd", "flowers", "food", "pets"),
    *("sun397", "voc2007", "cub"),
)
_RULES: dict[str, Rule] = {
    "protocol": one_of(*PROTOCOLS),
    "model": Rule(bool, "a model: a directory, a run, or a known name"),
    "seed": SEED,
    "batch": at_least(1),
    "precision": one_of(*PRECISIONS),
    "data.root": Rule(lambda value: isinstance(value, str), "a place of images"),
    "data.resize": at_least(1),
    "data.crop": at_least(1),
    "data.workers": up_to(MOST_WORKERS),
    "data.threads": up_to(MOST_WORKERS),
    "knn.neighbours": numbers(1, whole=True),
    "knn.temperature": ABOVE_ZERO,
    "linear.epochs": ABOVE_ZERO,
    "linear.learning_rates": numbers(0),
    "linear.blocks": numbers(1, whole=True),
    "linear.held_out": share(below_one=True),
    "linear.cache": BOOLEAN,
    "robustness.head": Rule(lambda value: isinstance(value, str), "a folder, or nothing"),
    "analysis.teacher": Rule(lambda value: isinstance(value, str), "a model, or nothing"),
    "analysis.images": at_least(2),
    "finegrained.datasets": Rule(
        lambda names: set(names) <= set(FINEGRAINED) and len(set(names)) == len(names),
        f"different names out of {', '.join(FINEGRAINED)}",
    ),
}


def _check(config: EvalConfig) -> list[str]:
    problems = []
    if config.data.crop > config.data.resize:
        problems.append(
            f"--config.data.crop: expected at most data.resize, {config.data.resize}, found "
            f"{config.data.crop}"
        )
    return problems


EVALUATION = Schema(
    _RULES,
    resolve,
    _check,
    lambda field: field == "data.workers",
    numbers=("knn.neighbours", "linear.learning_rates", "linear.blocks"),
)
