"""Before a run: what it will need and cost, from sizes alone; no weights, nothing trained. Images
are counted where they are given.

Memory is an estimate from what is stored and kept; with the TPU compiler at hand and a TPU topology
named, the real step is compiled for it and the compiler's own figures come as well.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from proteus_jax.data.sources import skimage
from proteus_jax.data.throughput import views_per_second
from proteus_jax.data.transforms.random_resized_crop import TrainTransform
from proteus_jax.errors import InputError
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import stored_shapes
from proteus_jax.models.normalization import IMAGENET
from proteus_jax.models.precision import dtype_of
from proteus_jax.runtime import sharding
from proteus_jax.runtime.filesystem import write_atomically
from proteus_jax.training.builder import (
    Assembly,
    TeacherInfo,
    assemble,
    check_compatibility,
    check_platform,
    run_length,
)
from proteus_jax.training.config import TrainConfig
from proteus_jax.training.inputs import open_split
from proteus_jax.training.planning.floors import Floor, nearest
from proteus_jax.training.planning.memory import estimate_memory
from proteus_jax.training.planning.topology import Topology, local_topology, named_topology
from proteus_jax.weights.fetch import obtain_model, teacher_spec
from proteus_jax.weights.model_dir import load_card

# Images of ImageNet-1K's training set, where a configuration does not say how many there are.
IMAGENET_IMAGES = 1_281_167
# What of a device's memory a program can have.
USABLE = 0.92
# The share of the peak that is assumed where nothing was compiled or measured.
ASSUMED = 0.4
GB = 1e9


class Settings(NamedTuple):
    """Settings of the command line: `mfu` is the share of the devices' peak that is assumed, where
    it is not to come from what was compiled; `price` that of a device-hour; `hlo` where the
    compiled program goes.
    """

    topology: str = ""
    mfu: float | None = None
    price: float | None = None
    hlo: Path | None = None


def plan(config: TrainConfig, settings: Settings) -> Iterator[str]:
    """Lines "name: value unit". InputError where batch and devices do not fit together."""
    topology = named_topology(settings.topology) if settings.topology else local_topology()
    _check(config, topology)
    if settings.hlo is not None and not (settings.topology and topology.platform == "tpu"):
        raise InputError("--hlo: expected with --topology of TPUs, as v5e:4x4")
    teachers = {
        name: TeacherInfo(_spec(each.source), IMAGENET) for name, each in config.teachers.items()
    }
    start = _spec(config.start) if config.start else None
    problems = check_platform(config, topology.platform)
    problems += check_compatibility(
        config, {name: known.spec for name, known in teachers.items()}, start
    )
    if problems:
        raise InputError(problems)
    images, counted = _images(config)
    steps = run_length(config, images)
    assembly = assemble(config, teachers, steps, topology.platform, start)
    work = assembly.work(config.data.crop)
    yield f"devices: {topology.description}"
    yield from _sizes(assembly)
    yield f"GFLOP an image: {work.total / 1e9:.1f} GFLOP"
    for name, value in work._asdict().items():
        yield f"GFLOP an image, {name.replace('_', ' ')}: {value / 1e9:.2f} GFLOP"
    yield from _memory_lines(config, assembly, topology)
    if steps.remark:
        yield f"warm-up: {steps.remark.removeprefix('warm-up of ')}"
    yield f"images an epoch: {images} images ({counted})"
    yield from _time_lines(config, work.total, steps.total, topology, settings)
    if topology.platform == "tpu" and settings.topology:
        yield from _compiler_lines(config, assembly, topology, settings.hlo)


def _images(config: TrainConfig) -> tuple[int, str]:
    """How many an epoch has, and where the number comes from."""
    if config.data.epoch:
        return config.data.epoch, "--config.data.epoch"
    if not config.data.root:
        return IMAGENET_IMAGES, "ImageNet-1K's, as no --config.data.root is given"
    if skimage.NAME in config.data.root and not skimage.are_here():
        return IMAGENET_IMAGES, f"ImageNet-1K's, as {skimage.NAME}'s are not fetched for a plan"
    training = open_split(config).training
    return len(training), "those of --config.data.root to train on"


def _spec(source: str) -> ViTSpec:
    """A known name is planned with without its weights; of anything else they are needed once."""
    return teacher_spec(source) or load_card(obtain_model(source)).spec


def _check(config: TrainConfig, topology: Topology) -> None:
    if topology.devices % config.fsdp:
        raise InputError(
            f"--config.fsdp: expected a divisor of the {topology.devices} devices, found "
            f"{config.fsdp}"
        )
    unit = config.batch_unit(topology.devices)
    if config.batch % unit:
        raise InputError(
            f"--config.batch: expected a multiple of {unit} for {topology.devices} devices and "
            f"{config.grad_accum_steps} parts, found {config.batch}"
        )


def _elements(tree: Any) -> float:
    return float(sum(array.size for array in jax.tree.leaves(tree)))


def _sizes(assembly: Assembly) -> Iterator[str]:
    shapes = [student.shapes for student in assembly.students.values()]
    yield f"trainable parameters: {sum(map(_elements, shapes)) / 1e6:.2f} M"
    for name, student in assembly.students.items():
        yield f"student parameters, {name}: {_elements(student.shapes['backbone']) / 1e6:.2f} M"
    teachers = sum(_elements(each.backbone.shapes) for each in assembly.teachers.values())
    yield f"teacher parameters: {teachers / 1e6:.2f} M"


def _memory_lines(config: TrainConfig, assembly: Assembly, topology: Topology) -> Iterator[str]:
    needed = estimate_memory(config, assembly, topology.devices, config.batch)
    yield f"memory a device: {needed.total / GB:.2f} GB"
    for name, value in needed._asdict().items():
        yield f"memory a device, {name.replace('_', ' ')}: {value / GB:.3f} GB"
    if topology.device is None:
        return
    limit = topology.device.memory * USABLE
    yield f"memory of a device: {topology.device.memory / GB:.1f} GB"
    yield f"fits: {'yes' if needed.total <= limit else 'no'} by this estimate"
    unit = config.batch_unit(topology.devices)

    def fits(units: int) -> bool:
        return estimate_memory(config, assembly, topology.devices, units * unit).total <= limit

    units = 0
    for power in reversed(range(20)):
        units += 2**power if fits(units + 2**power) else 0
    yield f"largest batch that fits: {units * unit} images"


def _time_lines(
    config: TrainConfig, work: float, steps: int, topology: Topology, settings: Settings
) -> Iterator[str]:
    rate = views_per_second(
        TrainTransform(config.image_size, config.data.randaugment),
        config.data.repeated_aug,
    )
    bfloat16 = dtype_of(config.precision, topology.platform) == jnp.bfloat16
    if settings.topology and not bfloat16:
        yield f"images a second: not known for {config.precision} on {topology.name}"
        return
    share, reason = settings.mfu or ASSUMED, "--mfu" if settings.mfu else "an assumption"
    if topology.device is None or not bfloat16:
        peak = _measured_peak()
        yield f"matmul rate measured: {peak / 1e9:.0f} GFLOP/s"
    else:
        peak = topology.device.peak * topology.devices
        floor = nearest(
            topology.name, work, config.batch / topology.devices / config.grad_accum_steps
        )
        if floor is not None:
            yield f"MFU at most: {floor.most(topology.device.peak):.0%} {_compiled_from(floor)}"
        if floor is not None and settings.mfu is None:
            share = floor.expected(topology.device.peak)
            reason = "midway between that floor and the compiler's estimate"
    images = peak * share / work
    yield f"assumed MFU: {share:.0%} ({reason})"
    yield f"images a second: {images:.1f} images/s"
    yield f"host images a second needed: {images / topology.hosts:.1f} images/s"
    yield f"host images a second measured: {rate.images:.1f} images/s on {rate.cores} cores here"
    seconds = steps * config.batch / images
    yield f"steps: {steps} of {config.batch} images"
    yield f"wall time: {seconds / 3600:.2f} h"
    hours = seconds / 3600 * topology.devices
    yield f"device-hours: {hours:.1f} h"
    if settings.price is not None:
        yield f"cost: {hours * settings.price:.2f} at {settings.price:g} a device-hour"


def _measured_peak(size: int = 1024, rounds: int = 8) -> float:
    """Operations a second of float32 matmuls on what is here."""
    product = jax.jit(jnp.matmul)
    matrix = jnp.ones((size, size))
    jax.block_until_ready(product(matrix, matrix))
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        spent.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(spent))


def _compiled_from(floor: Floor) -> str:
    return (
        f"(by what {floor.config} moves, compiled for {floor.images} images a device of "
        f"{floor.topology})"
    )


def _compiler_lines(
    config: TrainConfig, assembly: Assembly, topology: Topology, hlo: Path | None
) -> Iterator[str]:
    """The verdict of XLA's TPU compiler on the real step, or why there is none."""
    try:
        compiled = compiled_step(config, assembly, topology.name)
    except Exception as error:  # The compiler's own words are all there is.
        reason = str(error).strip().partition("\n")[0][:200]
        if hlo is not None:
            raise InputError(
                f"--hlo: {topology.name} cannot be compiled for here ({reason}); pip install "
                "'jax[tpu]'"
            ) from None
        yield f"compiled for {topology.name}: not here ({reason}); pip install 'jax[tpu]'"
        return
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert topology.device is not None
    # The most that is there at one time; the sum of all temporaries is more.
    peak, stored = analysis.peak_memory_in_bytes, analysis.argument_size_in_bytes
    yield f"compiled, memory a device: {peak / GB:.2f} GB"
    yield f"compiled, memory a device, state, teacher and images: {stored / GB:.2f} GB"
    yield f"compiled, fits: {'yes' if peak <= topology.device.memory * USABLE else 'no'}"
    if hlo is not None:
        text = compiled.as_text()
        assert text is not None
        hlo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(hlo, text)
        yield f"compiled, program: {hlo}"


def compiled_step(config: TrainConfig, assembly: Assembly, topology: str) -> jax.stages.Compiled:
    """Compiles the step ahead of time for a TPU topology; whatever the compiler raises."""
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = np.asarray(described.devices).reshape(-1, config.fsdp)
    mesh = Mesh(devices, sharding.BATCH_AXES, axis_types=(AxisType.Auto,) * 2)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda array, place: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place),
            tree,
            sharding.shardings(tree, mesh),
        )

    side = config.image_size
    images = jax.ShapeDtypeStruct(
        (config.batch, side, side, 3), jnp.uint8, sharding=sharding.over_batch(mesh)
    )
    _, step = assembly.compiled_on(mesh)
    teachers = {
        name: placed(stored_shapes(each.backbone)) for name, each in assembly.teachers.items()
    }
    return step.lower(placed(assembly.state_shapes()), teachers, images).compile()
