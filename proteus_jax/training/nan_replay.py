"""A step that went wrong, kept: its batch and the state before it, from which it is made again.

DUMP/state holds the state as a checkpoint, DUMP/batch.npz the images, DUMP/dump.json the
configuration and what the run saw; all of it is sealed. Neither the images' folder nor the workdir
is needed to replay.
"""

import contextlib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import proteus_jax
from proteus_jax.checkpoint.checkpointer import Checkpoints
from proteus_jax.checkpoint.checksums import SEAL, verify_checksums, write_checksums
from proteus_jax.checkpoint.items import FORMAT, VERSION
from proteus_jax.config import complete
from proteus_jax.engine.monitors import StepRecord
from proteus_jax.errors import Diverged, InputError, about, refusing
from proteus_jax.methods.config import PRIMARY
from proteus_jax.methods.resample import resize_images
from proteus_jax.methods.teacher import common_grid_size, teacher_features
from proteus_jax.models.vit import Features
from proteus_jax.runtime import sharding
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.filesystem import write_atomically
from proteus_jax.runtime.workdir import Workdir, is_remote
from proteus_jax.training.builder import Assembly, TeacherInfo, assemble, run_length
from proteus_jax.training.config import TrainConfig
from proteus_jax.training.fingerprint import teacher_facts
from proteus_jax.training.resume import compare_facts
from proteus_jax.training.schema import training_schema
from proteus_jax.training.setup import Experiment, placed_teacher
from proteus_jax.training.train_state import Skipped, TrainState, from_items, to_items
from proteus_jax.weights.fetch import obtain_model
from proteus_jax.weights.model_dir import load_card

STATE, BATCH, ABOUT = "state", "batch.npz", "dump.json"
SEALED_AS = "a dump"
# Images that go through the models together where each is looked at.
TOGETHER = 64
FOLDER = "dump"


class StepSnapshot(NamedTuple):
    """A step as the loop saw it: this host's share of the images uint8 [b, H, W, 3], their numbers
    in the source [b], and the metrics, by key.
    """

    step: int
    images: np.ndarray
    numbers: np.ndarray
    metrics: Mapping[str, float]


def write_dump(
    experiment: Experiment, moment: StepSnapshot, state: TrainState, folder: Path, address: str
) -> None:
    """Writes a step that was not finite. All hosts take part; `state` is that of any later step
    without a good one between, `address` is what `folder` is called on all hosts.

    OSError where it cannot be written.
    """
    share = {"images": moment.images, "numbers": moment.numbers.astype(np.int32)}
    placed = {key: sharding.place_batch(each, experiment.mesh) for key, each in share.items()}
    whole = sharding.gather(placed, experiment.mesh)
    # Skipped updates changed nothing but these counters.
    counted = (int(moment.metrics[key]) - 1 for key in ("skipped", "skipped_in_a_row"))
    before = state._replace(
        step=_set(state.step, moment.step - 1),
        skipped=Skipped(*map(_set, state.skipped, counted)),
    )
    failures: list[str] = []
    with contextlib.closing(
        Checkpoints(f"{address}/{STATE}", failed=lambda _, reason: failures.append(reason))
    ) as checkpoints:
        if jax.process_index() == 0:
            # The same command diverges at the same step; another one's dump is none of this run.
            # Without its seal first: half of a dump is none.
            (folder / SEAL).unlink(missing_ok=True)
            checkpoints.store.forget()
        checkpoints.save(moment.step, to_items(before), experiment.facts)
    if failures:
        raise OSError(failures[0])
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / BATCH, images=whole["images"])
        source = experiment.split.training
        written = {
            "proteus_jax": proteus_jax.__version__,
            "step": moment.step,
            "images_an_epoch": experiment.config.data.epoch or len(experiment.split.training),
            "names": [source.name(number) for number in whole["numbers"].tolist()],
            "metrics": {key: repr(value) for key, value in moment.metrics.items()},
            "configuration": experiment.config.as_json,
        }
        write_atomically(folder / ABOUT, json.dumps(written, indent=2) + "\n")
        write_checksums(folder, SEALED_AS)


def keep(
    experiment: Experiment, record: StepRecord, state: TrainState, place: Workdir, error: Diverged
) -> None:
    """Writes the step of which training diverged into the workdir, and notes on the error where it
    lies, or why it does not.
    """
    moment = StepSnapshot(
        record.step,
        record.batch.images,
        record.batch.numbers,
        {key: float(value) for key, value in jax.device_get(dict(record.metrics)).items()},
    )
    folder = place.local / FOLDER / f"step_{record.step}"
    try:
        write_dump(experiment, moment, state, folder, place.address_of(folder))
    except Exception as failure:
        # Whatever a store may say: that the run diverged is what it ends with.
        error.add_note(f"its batch and state could not be kept: {failure}")
    else:
        error.add_note(
            "its batch and the state before it are kept: python main.py --replay "
            f"{place.named(folder)}"
        )


def _set(counter: jax.Array, value: int) -> jax.Array:
    """Another value where a counter lies."""
    return jax.jit(lambda now: now * 0 + value, out_shardings=counter.sharding)(counter)


def replay(source: str, console: Console) -> None:
    """Makes the step of a dump again and says what of it is not finite; Diverged where anything is,
    as in the run.
    """
    if is_remote(source):
        raise InputError(f"--replay: {source}: copy the folder to this machine first")
    folder = Path(source).expanduser()
    description, images = _read(folder)
    config = description["configuration"]
    with refusing(f"--replay: {folder} is no dump of a step"):
        assembly, directories = _assembled(config, description["images_an_epoch"])
    mesh = _mesh(config, len(images))
    params = {
        name: placed_teacher(assembly.teachers[name], directory, mesh)
        for name, directory in directories.items()
    }
    _, train_step = assembly.compiled_on(mesh)
    shapes = assembly.state_shapes()
    with contextlib.closing(Checkpoints(str((folder / STATE).absolute()))) as checkpoints:
        newest = checkpoints.store.newest()
        if newest.step is None:
            raise InputError(f"{folder / STATE}: expected the state of a step, found none")
        places = sharding.shardings(shapes, mesh)
        state = from_items(checkpoints.restore(newest.step, to_items(shapes), to_items(places)))
        facts = checkpoints.facts(newest.step)
    step = newest.step
    ours = {FORMAT: VERSION, "teachers": teacher_facts(assembly, directories)}
    different = compare_facts({key: facts.get(key) for key in ours}, ours).refused
    if different:
        raise InputError([f"--replay: another teacher than the run's: {d}" for d in different])
    console.line(
        f"step {step}: {len(images)} images of {images.shape[1]} px on {jax.device_count()} "
        f"devices, from {folder}"
    )
    for line in _not_finite(config, assembly, params, state, images, description["names"], mesh):
        console.line(f"  {line}")
    _, metrics = train_step(state, params, sharding.place_batch(images, mesh))
    values = {key: float(value) for key, value in jax.device_get(metrics).items()}
    console.line(f"{'':36}{'the run':>16}{'again':>16}")
    for key, value in values.items():
        seen = description["metrics"].get(key, float("nan"))
        console.line(f"{key:36}{seen:16.8g}{value:16.8g}")
    if values["skipped_in_a_row"] > 0:
        raise Diverged(f"step {step}: a loss or gradient is not finite, as in the run")
    console.line(f"step {step}: every loss and gradient is finite here, other than in the run")


def _read(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Reads dump.json and batch.npz; InputError where the folder is no dump."""
    wrong = f"--replay: {folder} is no dump of a step"
    reason = verify_checksums(folder, SEALED_AS) if folder.is_dir() else "no such folder"
    if reason is not None:
        raise InputError(f"{wrong}: {reason}")
    with about(wrong), refusing("it cannot be read"):
        description = json.loads((folder / ABOUT).read_text())
        names, metrics = description["names"], description["metrics"]
        with np.load(folder / BATCH, allow_pickle=False) as arrays:
            images = arrays["images"]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{ABOUT}: expected names of images")
        if not (
            isinstance(description["images_an_epoch"], int) and description["images_an_epoch"] > 0
        ):
            raise ValueError(f"{ABOUT}: expected a number of images_an_epoch")
        description["metrics"] = {key: float(value) for key, value in metrics.items()}
        config = description["configuration"] = complete(
            description["configuration"], training_schema
        )
        expected = (config.batch, config.image_size, config.image_size, 3)
        if images.dtype != np.uint8 or images.shape != expected:
            shape = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{BATCH}: expected uint8 {list(expected)}, found {shape}")
    return description, images


def _assembled(config: TrainConfig, images: int) -> tuple[Assembly, dict]:
    """The functions of a run, and where its teachers' weights lie."""
    directories = {name: obtain_model(each.source) for name, each in config.teachers.items()}
    cards = {name: load_card(directory) for name, directory in directories.items()}
    start = load_card(obtain_model(config.start)).spec if config.start else None
    known = {name: TeacherInfo(card.spec, card.normalization) for name, card in cards.items()}
    steps = run_length(config, images)
    return assemble(config, known, steps, jax.default_backend(), start), directories


def _mesh(config: TrainConfig, images: int) -> jax.sharding.Mesh:
    """The mesh of all devices here; InputError where the batch does not divide among them."""
    devices = jax.device_count()
    if images % config.batch_unit(devices):
        raise InputError(
            f"--replay: {images} images in {config.grad_accum_steps} parts do not divide among the "
            f"{devices} devices here"
        )
    return sharding.make_mesh(config.fsdp if devices % config.fsdp == 0 else 1)


def _not_finite(
    config: TrainConfig,
    assembly: Assembly,
    params: dict[str, Any],
    state: TrainState,
    images: np.ndarray,
    names: list[str],
    mesh: jax.sharding.Mesh,
) -> list[str]:
    """Lists what is not finite: parameters, and the features that a teacher or a student has of
    each image.
    """

    def finite(features: Features) -> jax.Array:
        patches = jnp.isfinite(features.patches).all((1, 2))
        return patches & jnp.isfinite(features.cls).all(1)

    normalize, grid = assembly.normalization, common_grid_size(assembly.students)

    @jax.jit
    @functools.partial(sharding.traced_on, mesh)
    def look(params: dict[str, Any], students: dict[str, Any], images: jax.Array) -> dict:
        pixels = normalize(images)
        seen = {
            name: finite(
                teacher_features(teacher, params[name], pixels, normalize, config.data.crop, grid)
            )
            for name, teacher in assembly.teachers.items()
        }
        small = resize_images(pixels, config.data.crop)
        for name, student in assembly.students.items():
            seen[name] = finite(student.backbone(students[name]["backbone"], small))
        return seen

    lines = []
    for name, values in state.params.items():
        wrong = sum(not bool(jnp.isfinite(array).all()) for array in jax.tree.leaves(values))
        lines.append(f"{name}: {wrong} arrays of parameters are not finite")
    parts = [
        jax.device_get(look(params, state.params, images[start : start + TOGETHER]))
        for start in range(0, len(images), TOGETHER)
    ]
    for name in (*assembly.teachers, *assembly.students):
        bad = np.flatnonzero(~np.concatenate([part[name] for part in parts])).tolist()
        label = "the teacher" if name == PRIMARY else name
        named = ", ".join(names[at] if at < len(names) else f"image {at}" for at in bad[:8])
        lines.append(
            f"{label}: features of {len(bad)} images are not finite{': ' * bool(bad)}{named}"
        )
    return lines
