"""Teachers of other statistics, sizes, grids and scales, several at once, and students that start
from released weights.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from test_families import of_spec
from test_main import command, finish

import proteus_jax
from proteus_jax.loading import load_heads
from proteus_jax.methods.feature_standardization import (
    batch_moments,
    ema_update,
    init_moments,
    standardize,
    unstandardize,
)
from proteus_jax.methods.losses import LossWeights
from proteus_jax.methods.proteus import Proteus
from proteus_jax.methods.resample import renormalize, resize_images, resize_patch_grid
from proteus_jax.methods.teacher import Teacher
from proteus_jax.models.config import SPECS, ViTSpec, named_spec, student_spec
from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.models.normalization import CLIP, HALF, IMAGENET, Normalization
from proteus_jax.models.vit import Features
from proteus_jax.runtime.metric_writer import read_metrics
from proteus_jax.training.initialization import init_from_pretrained
from proteus_jax.training.optimizer import adamw
from proteus_jax.training.train_state import TrainState, init_state
from proteus_jax.training.train_step import TrainStep
from proteus_jax.weights import state_dict
from proteus_jax.weights.model_dir import ModelCard, load_card, load_model, save_model

BATCH, CROP = 8, 56
SMALL = ViTSpec(width=16, depth=1, heads=2, grid=4)
# A finer grid, registers, other statistics and a wider stream.
OTHER = ViTSpec(width=40, depth=1, heads=2, patch_size=7, grid=8, registers=3)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (BATCH, CROP, CROP, 3), dtype=np.uint8)


def trained(
    teachers: dict[str, Teacher],
    images: np.ndarray,
    steps: int = 1,
    skipped: int = 0,
    **changes: Any,
) -> tuple[TrainState, list[dict], dict]:
    """After some steps on the same images: state, rows of metrics, the teachers' parameters.
    `skipped` steps without an update come first.
    """
    widths = {name: teacher.backbone.spec.width for name, teacher in teachers.items()}
    students = {"small": StudentFunction(changes.pop("spec", SMALL), widths)}
    optimizer = adamw(1e-3)
    normalisation = next(iter(teachers.values())).normalisation
    weights = {name: LossWeights() for name in teachers} | changes.pop("weights", {})
    step = TrainStep(
        method=Proteus(loss_weights=weights, mask_ratio=0.5),
        teachers=teachers, students=students, optimizer=optimizer,
        schedule=lambda updates: 1e-3 / (1 + updates),
        normalisation=normalisation, ema_decay=0.0, seed=3, **changes,
    )  # fmt: skip
    params = {
        name: teacher.backbone.init(jax.random.key(number))
        for number, (name, teacher) in enumerate(teachers.items(), 1)
    }
    scaled = {name: widths[name] for name, each in teachers.items() if each.standardise}
    state = init_state(students, optimizer, ema=False, seed=3, standardise=scaled)
    state = state._replace(
        step=jnp.int32(skipped), skipped=state.skipped._replace(total=jnp.int32(skipped))
    )
    compiled, rows = jax.jit(step), []
    for _ in range(steps):
        state, metrics = compiled(state, params, images)
        rows.append(jax.device_get(metrics))
    return state, rows, params


def test_what_is_there_already_is_not_touched() -> None:
    """Equal sizes, statistics and grids give back the very same arrays."""
    pixels, tokens = jnp.ones((1, 56, 56, 3)), jnp.ones((1, 16, 5))
    features = Features(tokens[:, 0], tokens, tokens[:, :0])
    assert resize_images(pixels, 56) is pixels
    assert renormalize(pixels, IMAGENET, Normalization(*IMAGENET)) is pixels
    assert resize_patch_grid(features, 4) is features


def test_the_plain_path_is_bit_for_bit_the_same(images: np.ndarray) -> None:
    backbone = BackboneFunction(TINY)
    plain, rows, _ = trained({"teacher": Teacher(backbone, IMAGENET)}, images, steps=2)
    stated = Teacher(backbone, IMAGENET, side=CROP)
    again, same, _ = trained({"teacher": stated}, images, steps=2)
    assert rows == same
    jax.tree.map(np.testing.assert_array_equal, plain, again)


def test_other_statistics() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    moved = renormalize(IMAGENET(jnp.asarray(pixels)), IMAGENET, CLIP)
    np.testing.assert_allclose(moved, CLIP(jnp.asarray(pixels)), atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (7, 5)])
def test_grids_are_resampled_as_pytorch_resizes(old: int, new: int) -> None:
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    tokens = np.random.default_rng(0).normal(size=(2, old * old, 6)).astype(np.float32)
    features = Features(jnp.zeros((2, 6)), jnp.asarray(tokens), jnp.zeros((2, 3, 6)))
    found = resize_patch_grid(features, new)
    grid = torch.from_numpy(tokens.reshape(2, old, old, 6).transpose(0, 3, 1, 2))
    expected = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    expected = expected.numpy().transpose(0, 2, 3, 1).reshape(2, new * new, 6)
    np.testing.assert_allclose(found.patches, expected, atol=1e-5)
    assert found.registers is features.registers


def test_grids_are_resampled_antialiased() -> None:
    """Columns that take turns fade where three become one; a step between two halves stays."""
    taken = np.tile([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0], (9, 1))
    halves = np.repeat([[0.0] * 9, [1.0] * 9], [4, 5], axis=0)
    tokens = np.stack([taken, halves], axis=-1).reshape(1, 81, 2).astype(np.float32)
    features = Features(jnp.zeros((1, 2)), jnp.asarray(tokens), jnp.zeros((1, 0, 2)))
    found = np.asarray(resize_patch_grid(features, 3).patches).reshape(3, 3, 2)
    assert np.abs(found[..., 0]).max() < 0.2
    np.testing.assert_allclose(found[..., 1], found[:, :1, 1].repeat(3, axis=1), atol=1e-5)
    assert found[0, 0, 1] < 0.1
    assert found[2, 0, 1] > 0.9


def test_a_finer_grid_with_registers_teaches_a_coarser_one(images: np.ndarray) -> None:
    """The losses of the first step against the same written out by hand."""
    teacher = Teacher(BackboneFunction(OTHER), CLIP)
    weights = {"teacher": LossWeights(1.0, 1.0, 0.0)}
    _, (row,), params = trained({"teacher": teacher}, images, weights=weights)
    student = StudentFunction(SMALL, {"teacher": OTHER.width})
    values = student.init(jax.random.key(3))
    said = student(values, CLIP(jnp.asarray(images))).by_teacher["teacher"]
    target = teacher.backbone(params["teacher"], CLIP(jnp.asarray(images)))
    assert target.patches.shape == (BATCH, 64, OTHER.width)
    target = resize_patch_grid(target, 4)
    assert row["small/token_loss"] == pytest.approx(
        float(jnp.mean((said.token - target.cls) ** 2)), rel=1e-5
    )
    errors = jnp.concatenate(
        [(said.token - target.cls)[:, None] ** 2, (said.feature - target.patches) ** 2], axis=1
    )
    assert row["small/feature_loss"] == pytest.approx(float(jnp.mean(errors)), rel=1e-5)


def test_a_teacher_of_larger_images(images: np.ndarray) -> None:
    """The batch is as large as the teacher wants; the student's images are made of it."""
    large = np.random.default_rng(1).integers(0, 256, (BATCH, 84, 84, 3), dtype=np.uint8)
    backbone = BackboneFunction(dataclasses.replace(TINY, grid=6))
    teacher = Teacher(backbone, IMAGENET, side=84)
    _, (row,), params = trained({"teacher": teacher}, large)
    pixels = IMAGENET(jnp.asarray(large))
    target = backbone(params["teacher"], pixels)
    student = StudentFunction(SMALL, {"teacher": TINY.width})
    said = student(student.init(jax.random.key(3)), resize_images(pixels, CROP)).by_teacher[
        "teacher"
    ]
    expected = float(jnp.mean((said.token - target.cls) ** 2))
    assert row["small/token_loss"] == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(row["small/patch_loss"])


def test_several_teachers(images: np.ndarray) -> None:
    """Each has its heads and factors; the first learns as it does alone."""
    first = Teacher(BackboneFunction(TINY), IMAGENET)
    second = Teacher(BackboneFunction(OTHER), HALF)
    weights = {"other": LossWeights(2.0, 0.5, 0.0)}
    _, (alone,), _ = trained({"teacher": first}, images)
    state, (row,), _ = trained({"teacher": first, "other": second}, images, weights=weights)
    for key in ("token_loss", "feature_loss", "patch_loss"):
        assert row[f"small/{key}"] == pytest.approx(alone[f"small/{key}"], rel=1e-6)
    assert row["small/other_patch_loss"] == 0
    total = sum(row[f"small/{key}_loss"] for key in ("token", "feature", "patch"))
    total += 2 * row["small/other_token_loss"] + 0.5 * row["small/other_feature_loss"]
    assert row["small/loss"] == pytest.approx(total, rel=1e-5)
    assert set(state.params["small"]["heads"]) == {"teacher", "other"}


def test_standardised_tokens(images: np.ndarray) -> None:
    """Mean 0 and deviation 1 by the batch's own moments first, then by the running ones."""
    rng = np.random.default_rng(0)
    cls = jnp.asarray(rng.normal(5, 3, (64, 6)).astype(np.float32))
    patches = jnp.asarray(rng.normal(-2, 0.1, (64, 9, 6)).astype(np.float32))
    features = Features(cls, patches, cls[:, None][:, :0])
    moments = batch_moments(features)
    found = standardize(features, moments)
    for tokens in (found.cls, found.patches.reshape(-1, 6)):
        np.testing.assert_allclose(tokens.mean(axis=0), 0, atol=1e-3)
        np.testing.assert_allclose(tokens.std(axis=0), 1, atol=1e-2)
    back = unstandardize(found, moments)
    np.testing.assert_allclose(back.cls, cls, atol=1e-4)
    np.testing.assert_allclose(back.patches, patches, atol=1e-4)
    running = init_moments(6)
    for step in range(3):
        running = ema_update(jnp.asarray(step), running, batch_moments(features))
    np.testing.assert_allclose(running.cls, moments.cls, rtol=1e-5)

    scaled = Teacher(BackboneFunction(TINY), IMAGENET, standardise=True)
    state, rows, params = trained({"teacher": scaled}, images, steps=2)
    seen = tiny_features(params["teacher"], images)
    np.testing.assert_allclose(
        state.statistics["teacher"].cls, batch_moments(seen).cls, rtol=1e-4, atol=1e-5
    )
    # A student that says nothing of note is off by the targets' variance, 1, and its own.
    assert 0.9 < rows[0]["small/token_loss"] < 4
    # Steps without an update have left no moments, and no trace in the learning rate.
    later, (row,), _ = trained({"teacher": scaled}, images, skipped=3)
    np.testing.assert_allclose(later.statistics["teacher"].cls, batch_moments(seen).cls, rtol=1e-4)
    assert row["learning_rate"] == np.float32(1e-3)
    assert 0.9 < row["small/token_loss"] < 4


def tiny_features(params: Any, images: np.ndarray) -> Features:
    return jax.jit(BackboneFunction(TINY))(params, IMAGENET(jnp.asarray(images)))


def test_names_of_students() -> None:
    assert named_spec("vit_base_6blocks") == dataclasses.replace(SPECS["vit_base"], depth=6)
    assert named_spec("vit_base_clip_3blocks") is not None
    assert named_spec("vit_base_13blocks") is None
    assert named_spec("vit_base_0blocks") is None
    assert named_spec("vit_x") is None
    assert student_spec("vit_small_patch16", 112).grid == 7
    start = dataclasses.replace(SPECS["vit_small"], depth=12, registers=4, grid=37)
    spec = student_spec("vit_small_4blocks", 98, start)
    assert (spec.depth, spec.registers, spec.grid) == (4, 4, 7)
    for name, crop, complaint in (
        ("vit_base", 98, "768 wide with 12 heads, the model to start from 384 with 6"),
        ("vit_small_5blocks", 98, "expected a divisor"),
        ("vit_small", 100, "do not divide crops of 100 px"),
    ):
        with pytest.raises(ValueError, match=complaint):
            student_spec(name, crop, start)


def test_a_start_takes_every_so_many_blocks() -> None:
    old = ViTSpec(width=16, depth=6, heads=2, grid=4)
    params = state_dict.to_params(of_spec(old), old)
    new = dataclasses.replace(old, depth=2)
    found = init_from_pretrained(params, old, new)
    kernel = params["blocks"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(found["blocks"]["attn"]["qkv"]["kernel"], kernel[[2, 5]])
    np.testing.assert_array_equal(found["pos_embed"], params["pos_embed"])
    # Nothing changes where nothing has to: the features are the released model's.
    same = init_from_pretrained(params, old, old)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_two_teachers_and_a_start_from_the_command_line(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """A whole run: it says who teaches, is taken up again, and its heads answer afterwards."""
    save_model(
        tmp_path / "other",
        BackboneFunction(OTHER).init(jax.random.key(5)),
        ModelCard(spec=OTHER, normalisation=HALF, family="dinov2", licence="other's"),
    )
    start = dataclasses.replace(SPECS["vit_tiny"], depth=2, grid=5)
    save_model(
        tmp_path / "start", BackboneFunction(start).init(jax.random.key(6)), ModelCard(spec=start)
    )
    config = tmp_path / "two.py"
    config.write_text(
        "from proteus_jax.configs import base, quickstart\n"
        "def get_config():\n"
        "    config = quickstart.get_config()\n"
        "    config.teachers.teacher.standardize = True\n"
        f"    base.add_teacher(config, 'other', {str(tmp_path / 'other')!r})\n"
        "    return config\n"
    )
    arguments = [
        f"--config={config}" if word.startswith("--config=") else word
        for word in command(
            tmp_path / "run",
            photographs,
            tiny_teacher,
            "--config.student=vit_tiny_2blocks",
            "--config.init.method=copy",
            f"--config.init.source={tmp_path / 'start'}",
            "--config.teachers.teacher.image_size=42",
            "--config.ema_decay=0.9",
        )
    ]
    first = finish([*arguments, "--config.steps=4"], tmp_path)
    assert first.returncode == 0, first.stderr
    assert f"{tmp_path / 'other'}: 1 blocks, 40 wide" in first.stdout
    assert "(images of 42 px, standardized)" in first.stdout
    rows = list(read_metrics(tmp_path / "run"))
    assert {"token_loss", "other_token_loss", "agreement_class"} <= set().union(*rows)
    assert "other_token_loss" in rows[-1]
    card = load_card(tmp_path / "run" / "student")
    begun = "and that of the weights it started from: not stated"
    assert card.licence == f"that of its teachers: none; other's; {begun}"
    assert set(card.source["teachers"]) == {"teacher", "other"}
    text = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "other's" in text
    for source in (str(tiny_teacher), str(tmp_path / "other")):
        assert source in text
    assert "cosine of class tokens" in text
    # The average is another student than the last one, and is measured as itself.
    ours, average = (load_model(tmp_path / "run" / each)[0] for each in ("student", "student_ema"))
    apart = jax.tree.map(lambda one, other: float(np.abs(one - other).max()), ours, average)
    assert max(jax.tree.leaves(apart)) > 1e-5
    measured = [row for row in rows if "ema_cka" in row][-1]
    assert measured["ema_cka"] != measured["cka"]

    heads = load_heads(tmp_path / "run")
    assert heads is not None
    assert set(heads.statistics) == {"teacher", "other"}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    answers = heads.predictions(pixels)
    assert answers["teacher"].patches.shape == (2, 4, TINY.width)
    assert answers["other"].cls.shape == (2, OTHER.width)
    # In the teacher's own scale, of which it learned the standardized tokens.
    said = heads.student(heads.params, heads.normalisation(jnp.asarray(pixels))).by_teacher["other"]
    moments = heads.statistics["other"]
    deviation = np.sqrt(np.maximum(moments.cls_square - moments.cls**2, 0) + 1e-6)
    np.testing.assert_allclose(
        answers["other"].cls, said.token * deviation + moments.cls, rtol=1e-4, atol=1e-4
    )
    own = proteus_jax.load(tmp_path / "run")(pixels).cls
    np.testing.assert_allclose(
        heads.student(heads.params, heads.normalisation(jnp.asarray(pixels))).features.cls,
        own,
        atol=1e-5,
    )
    # A run that was made longer and has not ended again has a newer student than its export.
    exported = tmp_path / "run" / "student" / "config.json"
    kept = exported.read_text()
    facts = json.loads(kept)
    assert "step" not in proteus_jax.load(tmp_path / "run").card.source
    facts["source"]["steps"] = 2
    exported.write_text(json.dumps(facts))
    assert proteus_jax.load(tmp_path / "run").card.source["step"] == 4
    exported.write_text(kept)
    # What has not ended is the same, but for its export.
    shutil.rmtree(tmp_path / "run" / "student")
    unfinished = proteus_jax.load(tmp_path / "run")
    assert (unfinished.card.family, unfinished.card.licence) == (card.family, card.licence)
    # Another factor, another teacher or another start is another run.
    other = finish([*arguments, "--config.teachers.other.loss_weights.token=2"], tmp_path)
    assert other.returncode == 2
    assert "method.other.token: the checkpoint has 1.0" in other.stderr


def test_a_start_is_where_training_begins(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """At a learning rate of nearly nothing the student stays what it started from."""
    start = dataclasses.replace(SPECS["vit_tiny"], depth=2, grid=5)
    params = BackboneFunction(start).init(jax.random.key(6))
    save_model(tmp_path / "start", params, ModelCard(spec=start))
    arguments = command(
        tmp_path / "run",
        photographs,
        tiny_teacher,
        "--config.student=vit_tiny_2blocks",
        "--config.init.method=copy",
        f"--config.init.source={tmp_path / 'start'}",
        "--config.learning_rate=1e-12",
        "--config.optimizer.weight_decay=0",
        "--config.ema_decay=0.9",
        "--config.steps=1",
        "--config.optimizer.warmup_steps=0",
    )
    result = finish(arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    found, card = load_model(tmp_path / "run" / "student")
    expected = init_from_pretrained(params, start, card.spec)
    # One step of Adam moves a weight by its rate, which ends at 1e-5 whatever its peak.
    average, _ = load_model(tmp_path / "run" / "student_ema")
    for each in (found, average):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), each, expected)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"]["source"]


def test_a_clip_student_answers_with_its_class_token_alone(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """The paper's CLIP recipe to its end: nothing is measured of patches, and nothing is missed."""
    arguments = command(
        tmp_path / "run",
        photographs,
        tiny_teacher,
        "--config.student=vit_small_clip_1blocks",
        "--config.teachers.teacher.normalization=imagenet",
        "--config.method.loss_weights.feature=0",
        "--config.method.loss_weights.patch=0",
        "--config.steps=2",
    )
    result = finish(arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    rows = list(read_metrics(tmp_path / "run"))
    assert any("agreement_class" in row for row in rows)
    assert not any("agreement_patch" in row for row in rows)
    card = load_card(tmp_path / "run" / "student")
    assert (card.family, card.spec.pre_norm) == ("clip", True)


def test_what_does_not_fit_together(tmp_path: Path, photographs: Path, tiny_teacher: Path) -> None:
    result = finish(
        command(
            tmp_path / "run",
            photographs,
            tiny_teacher,
            "--config.init.method=copy",
            f"--config.init.source={tiny_teacher}",
            "--config.teachers.teacher.image_size=30",
            "--config.teachers.teacher.normalization=mine",
            "--config.student=vit_tiny,vit_small_patch16",
        ),
        tmp_path,
    )
    assert result.returncode == 2
    assert "expected one of native, imagenet, clip, half, found 'mine'" in result.stderr
    assert not (tmp_path / "run").exists()
    result = finish(
        command(
            tmp_path / "run",
            photographs,
            tiny_teacher,
            "--config.init.method=copy",
            f"--config.init.source={tiny_teacher}",
            "--config.teachers.teacher.image_size=30",
        ),
        tmp_path,
    )
    assert (
        "vit_tiny_2blocks is 192 wide with 3 heads, the model to start from 32 with 2"
        in result.stderr
    )
    assert "patches of 14 px, which do not divide images of 30 px" in result.stderr
