"""Small models and problems that several tests share."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import evaluation_config, shuffled
from tensorboardX.proto import event_pb2

from proteus_jax.checkpoint.checkpointer import Checkpoints
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.evaluation.feature_extraction import LoaderConfig, freeze
from proteus_jax.evaluation.protocol import Context
from proteus_jax.evaluation.results import weights_digest
from proteus_jax.feature_extractor import Model
from proteus_jax.methods.losses import LossWeights
from proteus_jax.methods.proteus import Proteus
from proteus_jax.methods.teacher import Teacher
from proteus_jax.models.config import SYNCLR, ViTSpec
from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.models.normalization import CLIP, IMAGENET
from proteus_jax.runtime import sharding
from proteus_jax.training.train_state import Skipped, TrainState, init_state, to_items
from proteus_jax.training.train_step import TrainStep
from proteus_jax.weights import state_dict

PLAIN = ViTSpec(width=32, depth=2, heads=2, patch_size=8, grid=4, **SYNCLR)
SMALL = ViTSpec(width=16, depth=2, heads=2, grid=3, patch_size=4)
TIMM = dataclasses.replace(
    PLAIN, interpolate_offset=0.0, interpolate_antialias=True, mask_deviation=0.0
)
RATES = (1e-3, 0.1, 3.0)
TEACHERS = {
    "wide": (dataclasses.replace(SMALL, width=24, depth=1), IMAGENET, (1.0, 0.5, 2.0), False),
    "odd": (
        dataclasses.replace(SMALL, width=12, depth=1, registers=2),
        CLIP,
        (0.5, 1.0, 0.25),
        True,
    ),
}
STUDENTS = {
    "one": dataclasses.replace(SMALL, depth=1),
    "two": dataclasses.replace(SMALL, width=8, depth=1),
}
RATE, DECAY, SEED, RATIO = 0.05, 0.9, 5, 0.45
REFERENCE = os.environ.get("PROTEUS_JAX_REFERENCE")


def of_spec(spec: ViTSpec, seed: int = 0) -> dict[str, Any]:
    """Canonical arrays, none constant."""
    rng = np.random.default_rng(seed)
    arrays = state_dict.from_params(BackboneFunction(spec).init(jax.random.key(0)), spec)
    return {
        name: (array + rng.normal(0, 0.2, array.shape)).astype(np.float32)
        for name, array in arrays.items()
    }


def clusters(
    rng: np.random.Generator, count: int, width: int = 12, classes: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(0, classes, count)
    labels[:classes] = np.arange(classes)
    centers = np.random.default_rng(9).normal(size=(classes, width))
    return (centers[labels] + rng.normal(size=(count, width))).astype(np.float32), labels


def context_for(
    folder: Path, model: Model, workdir: Path, **changes: Any
) -> tuple[Context, list[str]]:
    settings = {
        "epochs": 6.0,
        "learning_rates": RATES,
        "blocks": (1, 2),
        "held_out": 0.2,
        "cache": False,
    }
    fields = {"batch": 16, "model": "m", "data.root": folder, "data.crop": 28, "data.resize": 32}
    own = {f"linear.{name}": value for name, value in (settings | changes).items()}
    config = evaluation_config("linear", fields | own)
    mesh, said = sharding.make_mesh(), []
    context = Context(
        config=config,
        frozen=freeze(model, mesh),
        digest=lambda: weights_digest(model.params),
        mesh=mesh,
        workdir=workdir,
        view=CenterCrop(32, 28),
        reading=LoaderConfig(16),
        say=said.append,
        progress=lambda _: None,
    )
    return context, said


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Every scalar of the event files, read record by record."""
    found = {}
    for path in sorted(folder.iterdir()):
        for event in events(path):
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    return found


def events(path: Path) -> Iterator[Any]:
    """Of one file, record by record."""
    content, position = path.read_bytes(), 0
    while position < len(content):
        length = int.from_bytes(content[position : position + 8], "little")
        yield messages.Event.FromString(content[position + 12 : position + 12 + length])
        position += length + 16


messages: Any = event_pb2  # its classes are made at run time


def assert_equal(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Each array within a share of its own largest value."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape
        if one.size:
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@functools.cache
def training() -> tuple[Any, Any, Any, Any]:
    """Students, teachers' params, step and state of two students who follow two teachers."""
    widths = {name: spec.width for name, (spec, *_) in TEACHERS.items()}
    students = {name: StudentFunction(spec, widths) for name, spec in STUDENTS.items()}
    backbones = {name: BackboneFunction(spec) for name, (spec, *_) in TEACHERS.items()}
    params = {
        name: shuffled(backbone.init(jax.random.key(7)), seed=11)
        for name, backbone in backbones.items()
    }
    teachers = {
        name: Teacher(backbones[name], statistics, standardize=standard)
        for name, (_, statistics, _, standard) in TEACHERS.items()
    }
    weights = {name: LossWeights(*factors) for name, (_, _, factors, _) in TEACHERS.items()}
    optimizer = optax.sgd(RATE)
    step = TrainStep(
        method=Proteus(loss_weights=weights, mask_ratio=RATIO),
        teachers=teachers,
        students=students,
        optimizer=optimizer,
        schedule=lambda count: RATE + 0.0 * count,
        normalization=IMAGENET,
        ema_decay=DECAY,
        seed=SEED,
    )
    state = init_state(students, optimizer, ema=True, seed=1, standardize={"odd": 12})
    state = state._replace(params=shuffled(state.params, seed=13))
    state = state._replace(ema={name: values["backbone"] for name, values in state.params.items()})
    return students, params, jax.jit(step), state


def state(value: float) -> TrainState:
    params = {"a": {"weights": jnp.full((300,), value)}}
    nothing = jnp.zeros((), jnp.int32)
    skipped = Skipped(nothing, nothing + 0)
    return TrainState(nothing + int(value), params, {"a": {"mean": params["a"]}}, None, {}, skipped)


def saved(folder: Path, *steps: int, **more: Any) -> list[int]:
    told: list[int] = []
    checkpoints = Checkpoints(str(folder), saved=lambda step, _: told.append(step), **more)
    with contextlib.closing(checkpoints):
        for step in steps:
            checkpoints.save(step, to_items(state(step)), {"seed": 1})
    return told


def official(spec: ViTSpec) -> dict[str, Any]:
    """Random weights under the official names; none is constant, so that a mix-up would show."""
    arrays = state_dict.from_params(BackboneFunction(spec).init(jax.random.key(0)), spec)
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0.5, 0.1, value.shape).astype(np.float32) for name, value in arrays.items()
    }


def reference(*names: str) -> Path:
    if not REFERENCE or not Path(REFERENCE).is_dir():
        pytest.skip("PROTEUS_JAX_REFERENCE names no folder of golden files")
    return Path(REFERENCE).joinpath(*names)
