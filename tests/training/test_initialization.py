"""Students that start from released weights, and two teachers from the command line."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command, finish
from conftest import TINY
from small import of_spec

import proteus_jax
from proteus_jax.loading import load_heads
from proteus_jax.models.config import SPECS, ViTSpec, named_spec, student_spec
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.models.normalization import HALF
from proteus_jax.runtime.metric_writer import read_metrics
from proteus_jax.training.initialization import init_from_pretrained
from proteus_jax.weights import state_dict
from proteus_jax.weights.model_dir import ModelCard, load_card, load_model, save_model

# A finer grid, registers, other statistics and a wider stream.
OTHER = ViTSpec(width=40, depth=1, heads=2, patch_size=7, grid=8, registers=3)


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
        ModelCard(spec=OTHER, normalization=HALF, family="dinov2", license="other's"),
    )
    start = dataclasses.replace(SPECS["vit_tiny"], depth=2, grid=5)
    save_model(
        tmp_path / "start", BackboneFunction(start).init(jax.random.key(6)), ModelCard(spec=start)
    )
    config = tmp_path / "two.py"
    config.write_text(
        "from proteus_jax.configs import base, quickstart_paper as quickstart\n"
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
    assert card.license == f"that of its teachers: none; other's; {begun}"
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
    said = heads.student(heads.params, heads.normalization(jnp.asarray(pixels))).by_teacher["other"]
    moments = heads.statistics["other"]
    deviation = np.sqrt(np.maximum(moments.cls_square - moments.cls**2, 0) + 1e-6)
    np.testing.assert_allclose(
        answers["other"].cls, said.token * deviation + moments.cls, rtol=1e-4, atol=1e-4
    )
    own = proteus_jax.load(tmp_path / "run")(pixels).cls
    np.testing.assert_allclose(
        heads.student(heads.params, heads.normalization(jnp.asarray(pixels))).features.cls,
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
    assert (unfinished.card.family, unfinished.card.license) == (card.family, card.license)
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
