"""Evaluations as a person starts them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import command, evaluate, finish
from conftest import evaluation_config
from PIL import Image
from small import context_for

import proteus_jax
from proteus_jax.data.datasets.labeled import LabeledDataset, TrainTestSplit
from proteus_jax.data.sources.base import MemorySource
from proteus_jax.evaluation import per_class
from proteus_jax.evaluation.classifiers import knn
from proteus_jax.evaluation.feature_extraction import FeatureTable
from proteus_jax.evaluation.protocols import knn as neighbors
from proteus_jax.evaluation.protocols import ridge
from proteus_jax.evaluation.protocols.registry import PROTOCOLS
from proteus_jax.evaluation.results import write_results
from proteus_jax.evaluation.runner import _check_place
from proteus_jax.feature_extractor import Model
from proteus_jax.runtime.metric_writer import read_metrics
from proteus_jax.weights.model_dir import load_model


@pytest.mark.parametrize("name", PROTOCOLS)
def test_fields_are_those_that_have_rules(name: str) -> None:
    assert set(PROTOCOLS[name].settings._fields) == set(PROTOCOLS[name].rules)


def test_neighbors_from_the_command_line(
    tiny_teacher: Path, labeled_folder: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "knn"
    result = finish(evaluate("knn", tiny_teacher, labeled_folder, workdir), tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((workdir / "results.json").read_text())
    assert found["protocol"] == "knn"
    assert sorted(found["top1"]) == ["10", "20"]
    assert found["left_out"] == [100, 200]
    assert "left out: there are 42 training images" in result.stdout
    assert all(0 <= percent <= 100 for percent in found["top1"].values())
    assert found["constants"]["temperature"] == 0.07
    assert found["data"]["train_images"] == 42
    assert len(found["model"]["weights_sha256"]) == 64


def test_what_is_wrong_is_said_at_once(labeled_folder: Path, tmp_path: Path) -> None:
    arguments = evaluate("linear", tmp_path / "none", tmp_path / "no photos", tmp_path / "run")
    result = finish([*arguments, "--config.knn.neighbours=0", "--config.linear.epochs=x"], tmp_path)
    assert result.returncode == 2
    for words in (
        "4 problems",
        "--config.model: ",
        f"--config.data.root: {tmp_path / 'no photos'}: no such folder",
        "--config.knn.neighbours: expected different whole numbers of at least 1, found (0.0,)",
        "--config.linear.epochs: expected a number, found 'x'",
    ):
        assert words in result.stderr
    assert not (tmp_path / "run").exists()


def test_results_are_json_and_their_place_is_known(tmp_path: Path) -> None:
    """No NaN is written; what was learned from kept features may be repeated where it lies."""
    write_results(tmp_path, {"protocol": "linear, frozen crops", "top1": 1.0})
    kept = (tmp_path / "results.json").read_text()
    with pytest.raises(ValueError, match="Out of range float values"):
        write_results(tmp_path, {"protocol": "linear", "top1": float("nan")})
    assert (tmp_path / "results.json").read_text() == kept
    for protocol, fits in (("linear", True), ("knn", False)):
        config = evaluation_config(protocol, {"model": "m"})
        assert _check_place(config, str(tmp_path)) == (
            []
            if fits
            else [
                f"--workdir: {tmp_path} holds the results of linear, frozen crops; give another "
                "folder"
            ]
        )


def test_scores_where_an_image_is_broken(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels follow the images that could be read, to learn from and to test on."""
    labels = np.array([0, 0, 1, 1, 0, 1])
    part = LabeledDataset(MemorySource([], []), labels, ("a", "b"))
    kept = np.array([0, 2, 3, 4, 5])
    rows = np.where(labels[kept, None] == 0, [[1.0, 0.1]], [[-1.0, 0.1]]).astype(np.float32)
    monkeypatch.setattr(neighbors, "class_tokens", lambda *_: FeatureTable(rows, kept, 1))
    monkeypatch.setattr(neighbors, "images_on_both_sides", lambda _: "")
    context, _ = context_for(tmp_path, Model(*load_model(tiny_teacher)), tmp_path)
    for protocol in (neighbors.PROTOCOL, ridge.PROTOCOL):
        config = evaluation_config(protocol.name, {"model": "m"})
        context = context._replace(config=config)
        results = protocol.measure(context, TrainTestSplit(part, part, "test"))
        # Fewer images than any number of neighbors: all of them vote, the near ones most.
        assert protocol.scores(results) == {"top1": 100.0, "balanced_top1": 100.0}
        assert protocol.cells(results) == {protocol.name: 100.0}
        assert results["data"]["unreadable"] == 2


def test_classes_are_shown_of_the_best_number_of_neighbors(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of them comes first."""
    context, _ = context_for(tmp_path, Model(*load_model(tiny_teacher)), tmp_path)
    config = evaluation_config("knn", {"model": "m", "knn.neighbours": (1, 2, 3)})
    context = context._replace(config=config)
    labels = np.array([0, 0, 1, 1])
    part = LabeledDataset(MemorySource([], []), labels, ("a", "b"))
    tokens = FeatureTable(np.arange(8.0).reshape(4, 2), np.arange(4), 0)
    monkeypatch.setattr(neighbors, "class_tokens", lambda *_: tokens)
    monkeypatch.setattr(neighbors, "images_on_both_sides", lambda _: "")
    answers = {1: [1, 1, 1, 0], 2: [0, 0, 1, 0], 3: [0, 1, 1, 0]}
    monkeypatch.setattr(
        knn, "predictions", lambda *_, **__: {k: np.array(v) for k, v in answers.items()}
    )
    found = neighbors.measure(context, TrainTestSplit(part, part, "test"))
    assert found["top1"] == {"1": 25.0, "2": 75.0, "3": 50.0}
    assert {name: row["top1"] for name, row in found["per_class"].items()} == {
        "a": 100.0,
        "b": 50.0,
    }


def test_balanced_accuracy_is_of_the_classes_that_are_there() -> None:
    right, labels = np.array([True, False, True, True]), np.array([0, 0, 2, 2])
    assert per_class.balanced(right, labels) == pytest.approx(75.0)


def test_a_folder_that_holds_something_else_is_left_alone(
    tiny_teacher: Path, labeled_folder: Path, tmp_path: Path
) -> None:
    card = (tiny_teacher / "config.json").read_text()
    result = finish(evaluate("knn", tiny_teacher, labeled_folder, tiny_teacher), tmp_path)
    assert result.returncode == 2
    assert "holds a model or a run (model.safetensors); give another folder" in result.stderr
    assert (tiny_teacher / "config.json").read_text() == card
    workdir = tmp_path / "linear"
    workdir.mkdir()
    (workdir / "results.json").write_text('{"protocol": "linear, frozen crops"}')
    result = finish(evaluate("knn", tiny_teacher, labeled_folder, workdir), tmp_path)
    assert result.returncode == 2
    assert "holds the results of linear, frozen crops; give another folder" in result.stderr
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    result = finish(evaluate("knn", tmp_path / "run", labeled_folder, tmp_path / "x"), tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (tmp_path / "run" / "config.json").write_text('{"protocol": "knn"}')
    result = finish(evaluate("knn", tmp_path / "run", labeled_folder, tmp_path / "x"), tmp_path)
    assert result.returncode == 2
    assert "expected the configuration of a run: KeyError('student')" in result.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--config.data.crop=29", "at most data.resize"),
        ("--config.protocol=magic", "--config.protocol: expected one of knn, ridge, linear"),
        ("--config.model=", "--config.model: expected a model"),
        ("--plan", "--plan: only for a run that trains"),
    ],
)
def test_refusals(
    change: str, words: str, tiny_teacher: Path, labeled_folder: Path, tmp_path: Path
) -> None:
    changes = [change, "--config.data.resize=28"] if "crop" in change else [change]
    result = finish(
        [*evaluate("knn", tiny_teacher, labeled_folder, tmp_path / "run"), *changes], tmp_path
    )
    assert result.returncode == 2, result.stdout
    assert words in result.stderr
    assert proteus_jax.__version__ not in result.stdout


def test_classes_of_unequal_size_and_images_on_both_sides(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    """All that is learned is the larger class; some test images are learned from."""
    rng = np.random.default_rng(0)
    for split, many in (("train", 36), ("test", 18)):
        for name, count in (("healthy", many), ("rare", 2)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (28, 28, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{split} {number}.png")
    for name in ("same 0.png", "same 1.png"):
        for split in ("train", "test"):
            source = tmp_path / "data" / "train" / "healthy" / "train 0.png"
            shutil.copyfile(source, source.parents[2] / split / "healthy" / name)
    arguments = evaluate("knn", tiny_teacher, tmp_path / "data", tmp_path / "knn")
    result = finish([*arguments, "--config.knn.neighbours=20,10"], tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "knn" / "results.json").read_text())
    # Twenty healthy ones and two rare ones; the votes of the many win.
    assert found["top1"]["20"] == found["chance"] == pytest.approx(100 * 20 / 22)
    assert found["balanced_top1"]["20"] == 50.0
    assert found["per_class"] == {
        "healthy": {"images": 20, "top1": 100.0},
        "rare": {"images": 2, "top1": 0.0},
    }
    assert found["data"]["tested_images_learnt_from"] == 2
    assert "one of 2 classes has 90.9 % of the images to test on" in result.stdout
    assert re.search(r"rare +2 images +0\.00 %", result.stdout)
    assert "2 files have the same names to learn from and to test on; of 2 that" in result.stdout
    assert "2 of 22 images to test on have the features of an image to learn" in result.stdout


def test_a_run_says_what_student_and_teacher_are_worth(
    tiny_teacher: Path, photographs: Path, labeled_folder: Path, tmp_path: Path
) -> None:
    arguments = command(tmp_path / "run", photographs, tiny_teacher)
    more = (f"--config.eval.root={labeled_folder}", "--config.steps=3", "--config.eval_every=2")
    several = ("--config.student=vit_tiny_1blocks,vit_small_1blocks",)
    protocols = ("--config.eval.protocols=knn,ridge,linear",)
    result = finish([*arguments, *more, *several, *protocols], tmp_path)
    assert result.returncode == 0, result.stderr
    rows = list(read_metrics(tmp_path / "run"))
    measured = [row for row in rows if "teacher_knn_top1" in row]
    assert [row["step"] for row in measured] == [0, 2, 3]
    for name in ("vit_tiny_1blocks", "vit_small_1blocks"):
        assert 0 <= measured[-1][f"{name}/ridge_top1"] <= 100
        assert 0 <= measured[-1][f"{name}/cka"] <= 1
        assert 0 <= measured[-1][f"{name}/linear_top1"] <= 100
        assert (tmp_path / "run" / "evaluation" / "linear" / name / "head.npz").is_file()
        assert len(list((tmp_path / "run" / "report" / name).glob("errors-*.png"))) == 3
    assert "nearest neighbors: student " in result.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "step 3 of 3" in page
    # The teacher does not change, and what it is worth is what the protocol says as well.
    assert len({row["teacher_knn_top1"] for row in measured}) == 1
    finish(
        [
            *evaluate("knn", tiny_teacher, labeled_folder, tmp_path / "knn"),
            "--config.knn.neighbours=20",
        ],
        tmp_path,
    )
    found = json.loads((tmp_path / "knn" / "results.json").read_text())
    assert found["top1"]["20"] == measured[0]["teacher_knn_top1"]
    wrong = finish([*arguments, "--config.eval.root=/nowhere"], tmp_path)
    assert wrong.returncode == 2
    assert "--config.eval.root: /nowhere: no such folder" in wrong.stderr
    more = (f"--config.eval.root={labeled_folder}", "--config.eval.protocols=knn,robustness")
    wrong = finish([*arguments, *more], tmp_path)
    assert wrong.returncode == 2
    assert "--config.eval.protocols: robustness: --config.robustness.head: exp" in wrong.stderr
