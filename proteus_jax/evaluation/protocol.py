"""The seam of evaluation: a Protocol, and the context that it measures in."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.sharding import Mesh

from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import FrozenBackbone, LoaderConfig
from proteus_jax.models.config import ViTSpec
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.preemption import PreemptionHandler
from proteus_jax.schema import Rule


class Saving(NamedTuple):
    """What a protocol that trains is given to save with: the address of its checkpoints, what it
    reports to, and the handler of requests to stop.
    """

    address: str
    console: Console
    handler: PreemptionHandler


class Context(NamedTuple):
    """A configuration, the frozen model that is measured, where that runs, and to whom it speaks.

    `digest` returns the SHA-256 of the model's weights. `saving` is None where nothing is saved on
    the way, as during training.
    """

    config: EvalConfig
    frozen: FrozenBackbone
    digest: Callable[[], str]
    mesh: Mesh
    workdir: Path
    view: CenterCrop
    reading: LoaderConfig
    say: Callable[[str], None]
    progress: Callable[[str], None]
    saving: Saving | None = None


def _fits(config: EvalConfig, spec: ViTSpec, digest: Callable[[], str]) -> list[str]:
    return []


class Protocol(NamedTuple):
    """A way to measure a model, after training and during it.

    `settings` is the record of the fields that lie under its name in a configuration, `rules` are
    their rules, and `numbers` names those that are lists of numbers. `open` finds the data;
    InputError where something is wrong. `measure` returns what results.json holds beside the model,
    and prints it. `scores` picks the numbers that a row of metrics holds, each with the name that
    follows the protocol's, and `cells` those of the comparison table, by column. `check` lists what
    of a model does not fit. `during_training` are values of its fields there, `writes_files` says
    whether it leaves more than its results.
    """

    name: str
    settings: type
    rules: Mapping[str, Rule]
    open: Callable[[EvalConfig], Any]
    measure: Callable[[Context, Any], dict[str, Any]]
    scores: Callable[[Mapping[str, Any]], dict[str, float]]
    cells: Callable[[Mapping[str, Any]], dict[str, float]] = lambda _: {}
    check: Callable[[EvalConfig, ViTSpec, Callable[[], str]], list[str]] = _fits
    numbers: tuple[str, ...] = ()
    during_training: Mapping[str, Any] = MappingProxyType({})
    writes_files: bool = False
