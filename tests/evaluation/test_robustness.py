"""A linear head on other test sets, written out; models side by side."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import command, finish
from commands import evaluate as command_line
from conftest import TINY, write_classes
from small import context_for

import proteus_jax
from proteus_jax.cli.table import main as table
from proteus_jax.data.datasets.labeled import LabeledDataset, open_labeled
from proteus_jax.data.sources.base import MemorySource
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.evaluation.cka import linear_cka
from proteus_jax.evaluation.classifiers.linear_heads import Kind
from proteus_jax.evaluation.protocols import robustness
from proteus_jax.evaluation.results import describe
from proteus_jax.feature_extractor import Model
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.weights.model_dir import ModelCard, load_model, save_model

WNIDS = ("n01", "n02", "n03")


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("variants"), np.random.default_rng(2)
    # Two of the three classes; numbers; all; and corruptions, the darker the severer.
    write_classes(root / "imagenet-a", rng, 4, WNIDS[1:])
    write_classes(root / "imagenet-v2", rng, 3, ("0", "1", "2"))
    for corruption in robustness.ALEXNET:
        for severity in robustness.SEVERITIES:
            write_classes(root / "imagenet-c" / corruption / str(severity), rng, 1, WNIDS)
    return root


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A random head on the tiny model."""
    model = describe("", proteus_jax.load(tiny_teacher))["weights_sha256"]
    folder, rng = tmp_path_factory.mktemp("head"), np.random.default_rng(3)
    np.savez(
        folder / "head.npz",
        weight=rng.normal(size=(96, 3)),
        bias=rng.normal(size=3),
        blocks=2,
        pooled=True,
        classes=np.array(WNIDS),
        model=model,
        protocol="linear",
    )
    return folder


def predictions(
    model: Path, head: Path, folder: Path, shown: list[int], resize: int = 32
) -> list[tuple[int, str]]:
    """The head's answer and the folder's name of each image, an image at a time."""
    from proteus_jax.data.dataset import open_source
    from proteus_jax.data.decode import open_image

    params, card = load_model(model)
    backbone = BackboneFunction(card.spec)
    of = jax.jit(lambda params, pixels: backbone.intermediates(params, pixels, (0, 1)))
    found = np.load(head / "head.npz")
    source, _ = open_source(str(folder))
    answers = []
    for number in range(len(source)):
        view = CenterCrop(resize, 28)(open_image(source.read(number)))
        first, last = of(params, card.normalization(jax.numpy.asarray(view[None])))
        seen = np.concatenate([first.cls[0], last.cls[0], last.patches[0].mean(axis=0)])
        scores = (seen @ found["weight"] + found["bias"])[shown]
        answers.append((shown[int(scores.argmax())], source.name(number).split("/")[0]))
    return answers


def test_heads_on_other_sets(
    tiny_teacher: Path, head: Path, variants: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "robust"
    arguments = command_line("robustness", tiny_teacher, variants, workdir)
    result = finish([*arguments, f"--config.robustness.head={head}"], tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((workdir / "results.json").read_text())
    some = predictions(tiny_teacher, head, variants / "imagenet-a", [1, 2])
    right = np.mean([WNIDS[answer] == name for answer, name in some])
    assert found["top1"]["imagenet-a"] == pytest.approx(100 * right)
    all_of_them = predictions(tiny_teacher, head, variants / "imagenet-v2", [0, 1, 2])
    right = np.mean([str(answer) == name for answer, name in all_of_them])
    assert found["top1"]["imagenet-v2"] == pytest.approx(100 * right)
    assert set(found["absent"]) == {"imagenet-r", "imagenet-sketch"}
    # Corruptions are cut to size already: to resize them first would change some of the answers.
    names = [*robustness.ALEXNET][:3]
    folders = [variants / "imagenet-c" / name / "4" for name in names]
    answers = [predictions(tiny_teacher, head, folder, [0, 1, 2], 28) for folder in folders]
    assert answers != [predictions(tiny_teacher, head, folder, [0, 1, 2]) for folder in folders]
    for name, each in zip(names, answers, strict=True):
        wrong = np.mean([WNIDS[answer] != kind for answer, kind in each])
        assert found["corruptions"][name]["4"] == pytest.approx(wrong)
    relative = [
        np.mean(list(levels.values())) / robustness.ALEXNET[name]
        for name, levels in found["corruptions"].items()
    ]
    assert len(relative) == 15
    assert found["mce"] == pytest.approx(100 * np.mean(relative))


def test_numbered_folders_are_places_among_sorted_names(tmp_path: Path) -> None:
    """ImageNet-V2's, in the order of numbers, whatever the order of the folders' names."""
    names = tuple(f"n{number:02}" for number in range(12))
    head = robustness.Head(Kind(1, False), np.zeros((2, 12)), np.zeros(12), names, "", "")
    write_classes(tmp_path, np.random.default_rng(0), 1, tuple(str(n) for n in range(12)))
    found = robustness._matched(open_labeled(str(tmp_path)), head, "imagenet-v2")
    folders = [int(found.source.name(at).split("/")[0]) for at in range(12)]
    assert found.labels.tolist() == folders
    assert folders != sorted(folders)


def test_an_error_over_some_corruptions_is_no_mce(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness, "_accuracy", lambda *_: (0.25, 2))
    context, _ = context_for(tmp_path, Model(*load_model(tiny_teacher)), tmp_path)
    head = robustness.Head(Kind(1, False), np.zeros((2, 3)), np.zeros(3), WNIDS, "", "")
    part = LabeledDataset(MemorySource([], []), np.zeros(4, int), WNIDS)
    names = [*robustness.ALEXNET]
    for count in (14, 15):
        corrupted = {name: dict.fromkeys(range(1, 6), part) for name in names[:count]}
        data = robustness.Data(head, {"imagenet-a": part}, corrupted, {})
        found = robustness.measure(context, data)
        assert (found["mce"] is None) == (count < 15)
        assert found["top1"] == {"imagenet-a": 25.0}
        assert found["corruptions"]["fog"] == dict.fromkeys("12345", 0.75)
        assert found["data"]["unreadable"] == 2 + 2 * 5 * count


def test_alexnets_errors_are_the_published_ones() -> None:
    """Of the table in Hendrycks and Dietterich's code; their mean in percent."""
    errors = robustness.ALEXNET
    assert len(errors) == 15
    assert 100 * np.mean(list(errors.values())) == pytest.approx(78.8993, abs=1e-4)
    assert (errors["snow"], errors["fog"], errors["glass_blur"]) == (0.866816, 0.819324, 0.826268)


def test_alexnet_itself_has_an_error_of_one_hundred() -> None:
    errors = {name: {"1": error, "2": error} for name, error in robustness.ALEXNET.items()}
    assert robustness.mean_corruption_error(errors) == pytest.approx(100)


def test_what_is_wrong_with_heads_and_sets(
    tiny_teacher: Path, head: Path, variants: Path, tmp_path: Path
) -> None:
    arguments = command_line("robustness", tiny_teacher, tmp_path / "none", tmp_path / "run")
    result = finish(arguments, tmp_path)
    assert result.returncode == 2
    assert "--config.robustness.head: expected the workdir of a linear evaluation" in result.stderr
    assert "--config.data.root: expected a folder with one or more of" in result.stderr
    write_classes(tmp_path / "sets/imagenet-r", np.random.default_rng(0), 1, ("n02", "n99"))
    arguments = command_line("robustness", tiny_teacher, tmp_path / "sets", tmp_path / "run")
    result = finish([*arguments, f"--config.robustness.head={head}"], tmp_path)
    assert result.returncode == 2
    assert "imagenet-r: 1 of its classes are none of the head's, as n99" in result.stderr
    arguments = command_line("robustness", other_model(tmp_path), variants, tmp_path / "run")
    result = finish([*arguments, f"--config.robustness.head={head}"], tmp_path)
    assert result.returncode == 2
    assert "--config.robustness.head: was trained on another model" in result.stderr
    assert not (tmp_path / "run").exists()


def other_model(folder: Path) -> Path:
    """Of the same sizes, with other weights."""
    params = BackboneFunction(TINY).init(jax.random.key(7))
    save_model(folder / "other", params, ModelCard(spec=TINY, license="none"))
    return folder / "other"


def test_a_run_beside_its_teacher(
    tiny_teacher: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, workdir = tmp_path / "run", tmp_path / "analysis"
    done = finish(command(run, photographs, tiny_teacher, "--config.steps=2"), tmp_path)
    assert done.returncode == 0, done.stderr
    arguments = command_line("analysis", run, photographs, workdir)
    arguments += [f"--config.analysis.teacher={tiny_teacher}", "--config.analysis.images=11"]
    result = finish(arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((workdir / "results.json").read_text())
    assert np.shape(found["cka"]["class"]) == (2, 2)
    assert found["data"]["images"] == 11
    assert sum(found["spectrum"]["teacher"]) == pytest.approx(1)
    assert 1 < found["effective_rank"]["student"]["class"] <= 11
    errors = found["errors"]
    assert len(errors["by_image"]) == 11
    by_position = np.array(errors["by_position"]["feature"])
    by_image = [image["feature"] for image in errors["by_image"].values()]
    assert by_position.mean() == pytest.approx(np.mean(by_image), rel=1e-5)
    cells = [cell for row in errors["by_position"]["patch"] for cell in row]
    hidden = [cell for cell in cells if cell is not None]
    assert len(hidden) == 2
    # Of the patches that were hidden, as those of an image are.
    by_image = [image["patch"] for image in errors["by_image"].values()]
    assert np.mean(hidden) == pytest.approx(np.mean(by_image), rel=1e-5)
    for name in ("neighbours-student", "neighbours-teacher", "errors-by-position"):
        assert (workdir / f"{name}.png").is_file()
    # The same features by another way.
    from proteus_jax.data.dataset import open_source
    from proteus_jax.data.decode import open_image

    source, _ = open_source(str(photographs))
    chosen = np.unique(np.linspace(0, len(source) - 1, 11).round().astype(int))
    views = np.stack([CenterCrop(32, 28)(open_image(source.read(int(n)))) for n in chosen])
    student, teacher = (proteus_jax.load(model)(views).cls for model in (run, tiny_teacher))
    assert found["cka"]["final"] == pytest.approx(
        linear_cka(np.asarray(student), np.asarray(teacher)), abs=1e-4
    )
    assert table([str(workdir), str(tmp_path)]) == 2
    assert f"{tmp_path}: no results.json in it" in capsys.readouterr().err


def test_models_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def results(name: str, model: str, **values: object) -> str:
        folder = tmp_path / name
        folder.mkdir()
        content = {"model": {"name": f"runs/{model}|x", "weights_sha256": model}}
        content |= {"data": {"root": "/images"}, **values}
        (folder / "results.json").write_text(json.dumps(content))
        return str(folder)

    directories = [
        results("1", "a", protocol="knn", top1={"10": 60.0, "20": 61.5}),
        results("2", "a", protocol="linear", best={"test": {"head": "h", "top1": 70.04}}),
        results("3", "b", protocol="finegrained", average=None, per_dataset={"dtd": 50.0}),
    ]
    tops = {"imagenet-a": 1.0, "imagenet-r": 2.0, "imagenet-sketch": 3.0, "imagenet-v2": 4.0}
    strong = results("6", "c", protocol="robustness", top1=tops, mce=55.0)
    assert table([strong, "--alone"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = dict(
        zip(*(line.strip("| ").split(" | ") for line in (lines[0], lines[2])), strict=True)
    )
    assert named == {
        "model": "runs/c\\|x", "A": "1.0", "R": "2.0", "Sketch": "3.0", "V2": "4.0", "mCE": "55.0"
    }  # fmt: skip
    # Two models of one name are two lines.
    twin = tmp_path / "7"
    twin.mkdir()
    text = json.loads((Path(strong) / "results.json").read_text())
    text["model"]["weights_sha256"] = "another"
    text["top1"]["imagenet-a"] = 9.0
    (twin / "results.json").write_text(json.dumps(text))
    assert table([strong, str(twin), "--alone"]) == 0
    assert capsys.readouterr().out.count("| runs/c") == 2
    assert table(directories) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | linear | knn |"
    assert lines[2] == "| runs/a\\|x | 70.0 | 61.5 |"
    assert lines[3] == "| runs/b\\|x |  |  |"
    assert "| Proteus ViT-S/14 from DINOv2-B (published) | 81.8 |  |" in lines
    assert "| DINOv2 ViT-S/14 (published) | 81.1 | 79.0 |" in lines
    assert any(line.startswith("Measured: finegrained on /images; knn on") for line in lines)
    other = results("4", "a", protocol="knn", top1={"10": 99.0})
    assert table([*directories, other]) == 2
    assert "another knn of runs/a|x than a directory before it" in capsys.readouterr().err
    frozen = results("5", "a", protocol="linear, frozen crops", best={"test": {"top1": 9.0}})
    assert table([frozen, "--alone"]) == 0
    assert "| 9.0 |" in capsys.readouterr().out
    assert table([*directories, "--alone"]) == 0
    assert "published" not in capsys.readouterr().out
