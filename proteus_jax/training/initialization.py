"""What students start from: random weights, a copy or a slice of a model; and their heads."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from proteus_jax.data.loader import training_batches
from proteus_jax.data.sampler import Sampler
from proteus_jax.data.sources.base import Source
from proteus_jax.data.transforms.random_resized_crop import TrainTransform
from proteus_jax.methods.resample import resize_images
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import (
    BackboneFunction,
    Params,
    in_precision,
    without_layer_scale,
)
from proteus_jax.models.pos_embed import resize_position_table
from proteus_jax.runtime import sharding
from proteus_jax.runtime.filesystem import write_atomically
from proteus_jax.slicing.fit import BlockError
from proteus_jax.slicing.heads import FittedHeads, fit_heads
from proteus_jax.slicing.outer import scaled
from proteus_jax.slicing.slicer import Slicer
from proteus_jax.slicing.source import SourceModel
from proteus_jax.training.builder import Assembly
from proteus_jax.training.config import TrainConfig
from proteus_jax.training.train_state import TrainState
from proteus_jax.weights.model_dir import load_model

# Images that a device takes at once while slices and heads are fitted, and the least number of such
# groups: every fourth is held out.
IMAGES_AT_ONCE, LEAST_GROUPS = 16, 4
# What makes other crops of a run's seed.
OTHER_CROPS = 0x5EED
# The errors of slices, in a workdir.
FILE = "slices.json"
Progress = Callable[[str], None]
Groups = Callable[[], jax.Array]


def init_from_pretrained(params: Params, old: ViTSpec, new: ViTSpec) -> Params:
    """A model's arrays for a spec that `models.config.student_spec` made of its own: the last of
    every so many blocks where it has fewer, the position table for its grid.
    """
    stride = old.depth // new.depth
    blocks = jax.tree.map(lambda layers: layers[stride - 1 :: stride], params["blocks"])
    result = {**params, "blocks": blocks}
    if old.positions == "table":
        grid = (new.grid, new.grid)
        table = resize_position_table(jnp.asarray(params["pos_embed"]), old, grid)
        result["pos_embed"] = np.asarray(table)
    return result


@dataclasses.dataclass(kw_only=True, eq=False)
class InitialState:
    """Makes the state of step 0, the same each time; `errors` has those of each student that was
    sliced, block by block, once it was made.
    """

    config: TrainConfig
    assembly: Assembly
    teacher_params: dict[str, Params]
    # The directory of the model that students are copied or sliced from; None for random weights.
    source: Path | None
    images: Source
    parts: tuple[int, ...]
    mesh: Mesh
    random: Callable[[], TrainState]
    errors: dict[str, list[BlockError]] = dataclasses.field(default_factory=dict)
    # What was fitted, on the host: the report wants the same state once more.
    _backbones: dict[str, Params] | None = None
    _heads: dict[str, FittedHeads] | None = None

    def __call__(self, progress: Progress = lambda text: None) -> TrainState:
        """Makes the state; `progress` hears of what takes a while."""
        state = self.random()
        with jax.transfer_guard("allow"):
            groups = functools.cache(lambda: self._groups(progress))
            if self.source is not None:
                state = self._with_backbones(state, groups, progress)
            if self.config.init.fits_heads:
                state = self._with_heads(state, groups, progress)
        return state

    def report(self, workdir: Path) -> list[str]:
        """Writes the errors of slices into a workdir, and sums them up, a line a student."""
        if not self.errors:
            return []
        rows = {name: [each._asdict() for each in errors] for name, errors in self.errors.items()}
        write_atomically(workdir / FILE, json.dumps(rows, indent=2) + "\n")
        return [slice_in_words(name, errors) for name, errors in self.errors.items()]

    def _with_backbones(self, state: TrainState, groups: Groups, progress: Progress) -> TrainState:
        """The state with backbones from a model."""
        if self._backbones is None:
            self._backbones = self._made_backbones(groups, progress)
        backbones = self._backbones
        placed = {name: sharding.place_tree(each, self.mesh) for name, each in backbones.items()}
        learning = {
            name: {**values, "backbone": placed[name]} for name, values in state.params.items()
        }
        ema = state.ema
        if ema is not None:
            # Copies of their own: the state is donated, and no array may be in it twice.
            ema = {name: sharding.place_tree(each, self.mesh) for name, each in backbones.items()}
        return state._replace(params=learning, ema=ema)

    def _made_backbones(self, groups: Groups, progress: Progress) -> dict[str, Params]:
        """Each student's backbone, copied or sliced from the model; host arrays."""
        assert self.source is not None
        params, card = load_model(self.source)
        if self.config.init.slices:
            return self._slices(params, card.spec, groups, progress)
        return {
            name: init_from_pretrained(params, card.spec, student.spec)
            for name, student in self.assembly.students.items()
        }

    def _slices(
        self, params: Params, spec: ViTSpec, groups: Groups, progress: Progress
    ) -> dict[str, Params]:
        """Each student as a slice of a model."""
        students = self.assembly.students
        student = next(iter(students.values()))
        crop = self.config.data.crop
        slicer = make_slicer(
            params,
            spec,
            crop // spec.patch_size,
            groups(),
            lambda images: resize_images(self.assembly.normalization(images), crop),
            self.mesh,
            student.dtype,
            student.attention,
        )
        made = {}
        for name, each in students.items():
            sliced = slicer.slice(each.spec, lambda text, name=name: progress(f"{name}: {text}"))
            self.errors[name] = sliced.errors
            made[name] = scaled(sliced.params, self.config.init.stream_scale)
        return made

    def _with_heads(self, state: TrainState, groups: Groups, progress: Progress) -> TrainState:
        """The state with heads by least squares."""
        if self._heads is None:
            self._heads = self._fitted_heads(state, groups(), progress)
        learning, statistics = dict(state.params), dict(state.statistics)
        for name, fitted in self._heads.items():
            heads = {
                teacher: {**own, **sharding.place_tree(fitted.params[teacher], self.mesh)}
                for teacher, own in state.params[name]["heads"].items()
            }
            learning[name] = {**learning[name], "heads": heads}
            statistics |= sharding.place_tree(fitted.moments, self.mesh)
        return state._replace(params=learning, statistics=statistics)

    def _fitted_heads(
        self, state: TrainState, groups: jax.Array, progress: Progress
    ) -> dict[str, FittedHeads]:
        """The heads of each student, on the host."""
        assembly = self.assembly
        grid = next(iter(assembly.students.values())).spec.grid

        def draw(number: int) -> Any:
            key = jax.random.fold_in(jax.random.key(self.config.seed), number)
            return assembly.method.draw(key, groups.shape[1], grid**2)

        fitted = {}
        for name, student in assembly.students.items():
            progress(f"{name}: fitting heads")
            fitted[name] = fit_heads(
                student,
                state.params[name]["backbone"],
                assembly.teachers,
                self.teacher_params,
                groups,
                assembly.normalization,
                draw,
                assembly.method.heads,
                self.mesh,
            )
        return fitted

    def _groups(self, progress: Progress) -> jax.Array:
        """The images that are fitted on."""
        config = self.config
        return fitting_images(
            self.images,
            # Other crops than those of the first steps, whose losses would look too good.
            Sampler(config.seed ^ OTHER_CROPS, self.parts, config.data.weights, 1),
            TrainTransform(config.image_size, config.data.randaugment),
            config.init.images,
            self.mesh,
            max(config.data.threads, 2),
            progress,
        )


def fitting_images(
    images: Source,
    order: Sampler,
    recipe: TrainTransform,
    wanted: int,
    mesh: Mesh,
    threads: int,
    progress: Progress = lambda text: None,
) -> jax.Array:
    """At least so many augmented images, the first of an order, uint8 [n, b, h, w, 3]: n groups,
    each over all devices.
    """
    devices = jax.device_count()
    each = min(IMAGES_AT_ONCE, max(2, wanted // (LEAST_GROUPS * devices) // 2 * 2))
    group = devices * each
    count = max(LEAST_GROUPS, -(-wanted // group))
    progress(f"making {count * group} images to fit on")
    batches = training_batches(
        images,
        order=order,
        recipe=recipe,
        batch=group,
        steps=range(count),
        host=jax.process_index(),
        hosts=jax.process_count(),
        threads=threads,
    )
    made = np.stack([batch.images for batch in batches])
    place = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
    return jax.make_array_from_process_local_data(place, made)


def make_slicer(
    params: Params,
    spec: ViTSpec,
    grid: int,
    images: jax.Array,
    normalize: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    dtype: Any,
    attention: str,
) -> Slicer:
    """Places a model's params, as they are on disk, for images of a grid of patches, and makes its
    slicer.
    """
    if spec.positions == "table":
        table = resize_position_table(jnp.asarray(params["pos_embed"]), spec, (grid, grid))
        params = {**params, "pos_embed": np.asarray(table)}
    placed = in_precision(without_layer_scale(params), dtype)
    source = dataclasses.replace(spec, grid=grid, layer_scale=False)
    function = BackboneFunction(source, dtype, attention)
    on_devices = sharding.place_tree(placed, mesh)
    return Slicer(SourceModel(on_devices, function, images, normalize, mesh))


def slice_in_words(name: str, errors: list[BlockError]) -> str:
    """One line of how good a slice is."""
    worst = max(range(len(errors)), key=lambda number: errors[number].missed)
    last = errors[-1]
    return (
        f"{name}: a slice that misses {last.missed:.1%} of the stream after the last block "
        f"({last.lost:.1%} has no room in its width), at most {errors[worst].missed:.1%} "
        f"(block {worst + 1})"
    )
