"""The protocol analysis: a student beside its teacher, on images without labels.

Linear CKA between all layers, spectrum and effective rank of features, the nearest images by
either, and, where the model is a run that still has a checkpoint, its losses by image and by
position.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proteus_jax.data.dataset import open_source
from proteus_jax.data.passed_over import PassedOver
from proteus_jax.data.sources.base import Source
from proteus_jax.errors import InputError, Unreadable, collecting
from proteus_jax.evaluation.cka import effective_rank, linear_cka, spectrum
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import (
    FeatureTable,
    FrozenBackbone,
    compiled_pass,
    feature_pass,
    freeze,
)
from proteus_jax.evaluation.protocol import Context, Protocol
from proteus_jax.evaluation.reporting import figures
from proteus_jax.evaluation.results import describe
from proteus_jax.evaluation.teacher_agreement import nearest
from proteus_jax.feature_extractor import Model
from proteus_jax.loading import Heads, load_any, load_heads
from proteus_jax.methods.config import PRIMARY
from proteus_jax.methods.feature_standardization import standardize
from proteus_jax.methods.resample import renormalize, resize_images, resize_patch_grid
from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.models.normalization import Normalization
from proteus_jax.schema import Rule, at_least

QUERIES, NEIGHBORS = 6, 5
# So many shares of the spectrum are written down.
SHARES = 64
# The share of patches that is hidden to measure the patch head, as in training.
HIDDEN = 0.5


class Settings(NamedTuple):
    """The teacher that a model is compared with, and the largest number of images."""

    teacher: str
    images: int


class Data(NamedTuple):
    """Images, the teacher, and the student's heads where its checkpoint is at hand."""

    source: Source
    chosen: np.ndarray
    teacher: Model
    heads: Heads | None
    passed_over: PassedOver = PassedOver()


class Layers(NamedTuple):
    """Tokens of each block: class tokens [b, blocks, d] and mean patch tokens [b, blocks, d], and
    the features after the final LayerNorm: class [b, d] and mean patch token [b, d].
    """

    cls: Any
    patches: Any
    final: Any
    final_patches: Any


def open_data(config: EvalConfig) -> Data:
    """The images of --config.data.root and the teacher."""
    problems, source, teacher, heads = [], None, None, None
    passed_over = PassedOver()
    with collecting(problems, "--config.data.root"):
        if not config.data.root:
            raise InputError("expected a place of images, found nothing")
        source, passed_over = open_source(config.data.root, config.data.reading)
        if len(source) < 2:
            raise InputError(f"expected two images or more, found {len(source)}")
    with collecting(problems, "--config.analysis.teacher"):
        if not config.settings.teacher:
            raise InputError("expected a model, found nothing")
        teacher = load_any(config.settings.teacher)
        _refuse_crop(config, teacher)
        heads = load_heads(config.model)
        _refuse_other_teacher(heads, teacher)
    if problems or source is None or teacher is None:
        raise InputError(problems)
    count = min(config.settings.images, len(source))
    chosen = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int))
    return Data(source, chosen, teacher, heads, passed_over)


def _refuse_crop(config: EvalConfig, teacher: Model) -> None:
    patch = teacher.spec.patch_size
    if config.data.crop % patch:
        raise InputError(f"its patch size {patch} does not divide data.crop {config.data.crop}")


def _refuse_other_teacher(heads: Heads | None, teacher: Model) -> None:
    if heads is None:
        return
    student_size = heads.teacher["width"], heads.teacher["spec"]["patch_size"]
    teacher_size = teacher.spec.width, teacher.spec.patch_size
    if student_size != teacher_size:
        raise InputError(
            f"expected a teacher as the run had, {student_size[0]} wide with patches of "
            f"{student_size[1]} px, "
            f"found {teacher_size[0]} and {teacher_size[1]}"
        )


def layers(backbone: BackboneFunction, params: Params, images: jax.Array) -> Layers:
    """The tokens that are compared, float32."""
    depth = backbone.spec.depth
    blocks = backbone.intermediates(params, images, range(depth), normalize=False)
    final = backbone(params, images)
    parts = (
        jnp.stack([block.cls for block in blocks], axis=1),
        jnp.stack([block.patches.mean(axis=1) for block in blocks], axis=1),
        final.cls,
        final.patches.mean(axis=1),
    )
    return Layers(*(part.astype(jnp.float32) for part in parts))


def measure(context: Context, data: Data) -> dict[str, Any]:
    """`cka` is {tokens: [student's blocks][teacher's blocks]}; `effective_rank` and `spectrum` are
    {model: ...}; `errors` null where the heads are not at hand. Pictures lie beside the results.
    """
    teacher = freeze(data.teacher, context.mesh, context.frozen.backbone.dtype)
    tables = {
        name: _table(context, frozen, data, name)
        for name, frozen in (("student", context.frozen), ("teacher", teacher))
    }
    student, teacher_layers = (Layers(*table.values) for table in tables.values())
    cka = {
        "class": _alignment(student.cls, teacher_layers.cls),
        "patches": _alignment(student.patches, teacher_layers.patches),
        "final": linear_cka(student.final, teacher_layers.final),
    }
    numbers = tables["student"].numbers
    views = _views(context, data, numbers)
    for name, tokens in (("student", student.final), ("teacher", teacher_layers.final)):
        if len(numbers) > 1 and jax.process_index() == 0:
            neighbors = nearest(tokens, min(NEIGHBORS, len(numbers) - 1))
            queries = np.linspace(0, len(numbers) - 1, min(QUERIES, len(numbers)))
            sheet = figures.neighbor_sheet(views, queries.round().astype(int).tolist(), neighbors)
            figures.save_picture(sheet, context.workdir / f"neighbours-{name}.png")
    errors = None if data.heads is None else _errors(context, data, data.heads, teacher)
    ranks = {
        name: {"class": effective_rank(of.final), "patches": effective_rank(of.final_patches)}
        for name, of in (("student", student), ("teacher", teacher_layers))
    }
    context.say(f"  linear CKA of class tokens, final   {cka['final']:.3f}")
    for name, rank in ranks.items():
        context.say(f"  effective rank of class tokens, {name}   {rank['class']:.1f}")
    if errors is None:
        context.say("  errors: absent, as the model is no run with a checkpoint: it has no heads")
    return {
        "cka": cka,
        "effective_rank": ranks,
        "spectrum": {
            "student": spectrum(student.final)[:SHARES].tolist(),
            "teacher": spectrum(teacher_layers.final)[:SHARES].tolist(),
        },
        "errors": errors,
        "teacher": describe(context.config.settings.teacher, data.teacher),
        "data": {
            "root": context.config.data.root,
            "images": len(numbers),
            "unreadable": tables["student"].unreadable,
            "passed_over": data.passed_over.as_json(),
        },
    }


def _table(context: Context, frozen: FrozenBackbone, data: Data, name: str) -> FeatureTable:
    return frozen.table(
        layers,
        data.source,
        context.view,
        context.reading,
        chosen=data.chosen,
        progress=lambda text: context.progress(f"{name}: {text}"),
    )


def _alignment(student: np.ndarray, teacher: np.ndarray) -> list[list[float]]:
    """CKA of every block of one with every block of the other."""
    return [
        [linear_cka(student[:, row], teacher[:, column]) for column in range(teacher.shape[1])]
        for row in range(student.shape[1])
    ]


def _views(context: Context, data: Data, numbers: np.ndarray) -> np.ndarray:
    """The images as the models saw them."""
    views = []
    for number in numbers.tolist():
        try:
            views.append(context.view(data.source.open(number)))
        except Unreadable:  # between the pass and now
            views.append(np.zeros((context.view.crop, context.view.crop, 3), np.uint8))
    return np.stack(views)


def _errors(context: Context, data: Data, heads: Heads, teacher: FrozenBackbone) -> dict[str, Any]:
    """The three losses by image, and those of patches by position as a grid."""
    mesh, student = context.mesh, heads.student
    side = context.config.data.crop // student.spec.patch_size
    # The teacher gets its images as it got them in training.
    side_seen = heads.teacher["side"] or context.config.data.crop
    given = Normalization(*(tuple(part) for part in heads.teacher["normalization"]))
    ranks = np.random.default_rng(0).permutation(side * side)
    mask = jnp.asarray(ranks < max(int(side * side * HIDDEN), 1))

    def losses(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        pixels = heads.normalization(images)
        seen = renormalize(resize_images(pixels, side_seen), heads.normalization, given)
        target = resize_patch_grid(teacher.backbone(params[1], seen), side)
        if heads.moments is not None:
            target = standardize(target, heads.moments)
        masks = jnp.broadcast_to(mask, (len(images), len(mask)))
        outputs = student(params[0], pixels, pixels, masks).by_teacher[PRIMARY]
        assert outputs.patch is not None
        return {
            "token": jnp.mean((outputs.token - target.cls) ** 2, axis=-1),
            "feature": jnp.mean((outputs.feature - target.patches) ** 2, axis=-1),
            "patch": jnp.mean((outputs.patch - target.patches) ** 2, axis=-1),
        }

    table = feature_pass(
        compiled_pass(losses, mesh),
        (heads.params, teacher.params),
        data.source,
        context.view,
        context.reading,
        mesh,
        data.chosen,
        lambda text: context.progress(f"errors: {text}"),
    )
    errors, hidden = table.values, np.asarray(mask)
    names = [data.source.name(number) for number in table.numbers.tolist()]
    patch = errors["patch"][:, hidden].mean(axis=1)
    position = np.where(hidden, errors["patch"].mean(axis=0), np.nan)
    if jax.process_index() == 0:
        tile = figures.number_tile(errors["feature"].mean(axis=0).reshape(side, side))
        figures.save_picture(tile, context.workdir / "errors-by-position.png")
    return {
        "step": heads.step,
        "by_image": {
            name: {
                "token": float(errors["token"][row]),
                "feature": float(errors["feature"][row].mean()),
                "patch": float(patch[row]),
            }
            for row, name in enumerate(names)
        },
        "by_position": {
            "feature": errors["feature"].mean(axis=0).reshape(side, side).tolist(),
            "patch": [
                [None if np.isnan(value) else float(value) for value in row]
                for row in position.reshape(side, side)
            ],
        },
    }


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """The CKA of the final class tokens, and the student's effective rank."""
    rank = results["effective_rank"]["student"]["class"]
    return {"cka": results["cka"]["final"], "effective_rank": rank}


PROTOCOL = Protocol(
    name="analysis",
    settings=Settings,
    rules={
        "teacher": Rule(lambda value: isinstance(value, str), "a model, or nothing"),
        "images": at_least(2),
    },
    open=open_data,
    measure=measure,
    scores=scores,
    writes_files=True,
)
