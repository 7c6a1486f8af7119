"""Slices as students' beginnings and as models of their own; heads by least squares."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import assert_same_run, command, finish
from conftest import ROOT, TINY, Heard, shuffled

import proteus_jax
from proteus_jax.cli import slice as command_line
from proteus_jax.methods.teacher import Teacher
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, StudentFunction
from proteus_jax.models.normalization import CLIP, IMAGENET
from proteus_jax.runtime import sharding
from proteus_jax.runtime.metric_writer import read_metrics
from proteus_jax.slicing.heads import fit_heads
from proteus_jax.weights.model_dir import ModelCard, save_model

# As wide as heads of 64 channels allow, so that a named student is a slice of it.
WIDE = ViTSpec(width=256, depth=2, heads=4, grid=2)
FITTED = ("--config.init.method=slice", "--config.init.heads=least_squares")


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wide") / "teacher"
    params = shuffled(BackboneFunction(WIDE).init(jax.random.key(1)))
    save_model(directory, params, ModelCard(spec=WIDE, license="none"))
    return directory


def test_a_run_from_a_slice(tmp_path: Path, photographs: Path, wide_teacher: Path) -> None:
    """It begins near its teacher, is taken up again, and goes on with no other beginning."""
    start = [*FITTED, "--config.init.images=64", "--config.init.stream_scale=4"]
    start += ["--config.optimizer.name=muon", "--config.eval_every=2"]
    arguments = command(tmp_path / "run", photographs, wide_teacher, *start)
    first = finish([*arguments, "--config.steps=2"], tmp_path)
    assert first.returncode == 0, first.stderr
    assert "a slice that misses" in first.stdout
    errors = json.loads((tmp_path / "run" / "slices.json").read_text())
    assert [len(rows) for rows in errors.values()] == [2]
    begun = next(iter(read_metrics(tmp_path / "run")))
    assert begun["agreement_class"] > 0.5
    assert begun["agreement_patch"] > 0.5
    again = finish([*arguments, "--config.steps=4"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming at step 2" in again.stdout
    # Cut back to its half, it ends as before, bit for bit: with Muon's momentum and all.
    shutil.copytree(tmp_path / "run", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
    halved = command(tmp_path / "half", photographs, wide_teacher, *start)
    assert finish([*halved, "--config.steps=4"], tmp_path).returncode == 0
    assert_same_run(tmp_path / "half", tmp_path / "run")
    other = finish([*arguments, "--config.steps=6", "--config.init.stream_scale=1"], tmp_path)
    assert other.returncode == 2
    assert "init.stream_scale: the checkpoint has 4.0, this run has 1.0" in other.stderr
    other = finish([*arguments, "--config.steps=6", "--config.optimizer.name=adamw"], tmp_path)
    assert other.returncode == 2
    assert "optimizer: the checkpoint has" in other.stderr


def test_what_cannot_be_sliced(
    tmp_path: Path, photographs: Path, wide_teacher: Path, tiny_teacher: Path
) -> None:
    arguments = command(tmp_path / "run", photographs, tiny_teacher, *FITTED)
    refused = finish(arguments, tmp_path)
    assert refused.returncode == 2
    assert "--config.student: vit_tiny_2blocks: width: expected from 1 to the 32" in refused.stderr
    source = f"--config.init.source={wide_teacher}"
    arguments = command(tmp_path / "run", photographs, tiny_teacher, source)
    refused = finish(arguments, tmp_path)
    assert refused.returncode == 2
    assert "give --config.init.method=copy or slice as well" in refused.stderr
    other = tmp_path / "other"
    params = BackboneFunction(WIDE).init(jax.random.key(1))
    save_model(other, params, ModelCard(spec=WIDE, normalization=CLIP, license="none"))
    arguments = command(
        tmp_path / "run", photographs, tiny_teacher, *FITTED, f"--config.init.source={other}"
    )
    refused = finish(arguments, tmp_path)
    assert refused.returncode == 2
    assert "--config.init.source: expected a model of the channel statistics" in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("standardized", [False, True])
def test_heads_are_fitted_to_their_teachers(rng: np.random.Generator, standardized: bool) -> None:
    """A student that is its teacher but for a LayerNorm: its heads have little to learn."""
    spec = dataclasses.replace(TINY, grid=2)
    student = StudentFunction(spec, {"teacher": spec.width})
    params = shuffled(student.init(jax.random.key(0)))["backbone"]
    params = {**params, "norm": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}
    teacher = Teacher(student.backbone, IMAGENET, standardize=standardized)
    images = jnp.asarray(rng.integers(0, 256, (8, 16, 28, 28, 3)), jnp.uint8)
    mask = jnp.asarray(rng.random((8, 4)) < 0.5)
    fitted = fit_heads(
        student,
        params,
        {"teacher": teacher},
        {"teacher": params},
        images,
        IMAGENET,
        lambda number: mask,
        frozenset(("token", "feature", "patch")),
        sharding.make_mesh(),
    )
    outputs = student(
        {"backbone": params, "heads": jax.tree.map(jnp.asarray, fitted.params)},
        IMAGENET(images[0]),
    )
    expected = student.backbone(params, IMAGENET(images[0]))
    answers = outputs.by_teacher["teacher"]
    everything = [student.backbone(params, IMAGENET(group)) for group in images]
    for found, target, every in (
        (answers.token, expected.cls, np.stack([each.cls for each in everything])),
        (answers.feature, expected.patches, np.stack([each.patches for each in everything])),
    ):
        target = np.asarray(target)
        if standardized:
            rows = every.reshape(-1, 32)
            target = (target - rows.mean(axis=0)) / rows.std(axis=0)
        assert np.mean((found - target) ** 2) < 0.02 * np.mean(target**2)
    assert set(fitted.params["teacher"]) == {"token", "feature", "patch"}
    assert set(fitted.moments) == ({"teacher"} if standardized else set())


def test_the_command(tmp_path: Path, photographs: Path, tiny_teacher: Path) -> None:
    common = [str(tiny_teacher), str(photographs), "--crop=28", "--images=64"]
    output = tmp_path / "sliced"
    heard = Heard()
    assert command_line.main([*common, "--heads=1", f"--output={output}"], heard) == 0
    assert heard.lines[-1] == f"16 wide, 1 heads, 64 hidden, 2 blocks: {output}"
    assert any("fitting block" in text for text in heard.live)
    model = proteus_jax.load(output)
    assert model(np.zeros((1, 28, 28, 3), np.uint8)).cls.shape == (1, 16)
    assert model.card.source["sliced_from"] == str(tiny_teacher)
    assert (output / "README.md").is_file()
    table = tmp_path / "table.json"
    assert command_line.main([*common, "--sizes", f"--output={table}"], heard) == 0
    rows = json.loads(table.read_text())
    assert [(row["width"], row["depth"]) for row in rows] == [(16, 2), (16, 1)]
    assert all(0 < row["agreement_patch"] < 1 and row["gflops"] > 0 for row in rows)


def test_what_the_command_refuses(tmp_path: Path, photographs: Path, tiny_teacher: Path) -> None:
    common = [sys.executable, str(ROOT / "main.py"), "slice", str(tiny_teacher), str(photographs)]
    there, output = tmp_path / "file", f"--output={tmp_path / 'x'}"
    there.write_text("")
    cases: tuple[tuple[list[str], list[str]], ...] = (
        (["--heads=3", output, "--crop=28"], ["heads: expected from 1 to the 2"]),
        (["--heads=1", output, "--crop=30"], ["--crop: expected a multiple of the patch size"]),
        (["--heads=1", f"--output={there}"], ["--output: ", "is there already"]),
        (["--heads=1", f"--output={there / 'x'}", "--crop=28"], [str(there)]),
        (["--sizes", "--heads=1"], ["--sizes: expected without a size of its own"]),
        (
            ["--seed=-1", "--images=0"],
            [
                "4 problems with the input",
                "--images: expected a number above 0, found 0",
                "--seed: expected from 0 to 4294967295, found -1",
                "--student: expected a name, or a size",
                "--output: expected a directory",
            ],
        ),
    )
    for wrong, words in cases:
        refused = finish([*common, *wrong], tmp_path)
        assert refused.returncode == 2, refused.stderr
        assert all(word in refused.stderr for word in words), refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "x").exists()
