"""A linear head on other test sets, written out; models side by side."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, write_classes
from test_evaluation import evaluate as command_line
from test_main import command, finish

import proteus_jax
from proteus_jax.evaluation import robustness
from proteus_jax.evaluation.results import describe
from proteus_jax.evaluation.similarity import linear_cka
from proteus_jax.evaluation.table import main as table
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.pretrained import ModelCard, load_model, save_model

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
    from proteus_jax.data.catalog import open_source
    from proteus_jax.data.images import opened
    from proteus_jax.data.views import CentreCrop

    params, card = load_model(model)
    backbone = BackboneFunction(card.spec)
    of = jax.jit(lambda params, pixels: backbone.intermediates(params, pixels, (0, 1)))
    found = np.load(head / "head.npz")
    source, _ = open_source(str(folder))
    answers = []
    for number in range(len(source)):
        view = CentreCrop(resize, 28)(opened(source.read(number)))
        first, last = of(params, card.normalisation(jax.numpy.asarray(view[None])))
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
    save_model(folder / "other", params, ModelCard(spec=TINY, licence="none"))
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
    assert sum(cell is None for row in errors["by_position"]["patch"] for cell in row) == 2
    for name in ("neighbours-student", "neighbours-teacher", "errors-by-position"):
        assert (workdir / f"{name}.png").is_file()
    # The same features by another way.
    from proteus_jax.data.catalog import open_source
    from proteus_jax.data.images import opened
    from proteus_jax.data.views import CentreCrop

    source, _ = open_source(str(photographs))
    chosen = np.unique(np.linspace(0, len(source) - 1, 11).round().astype(int))
    views = np.stack([CentreCrop(32, 28)(opened(source.read(int(n)))) for n in chosen])
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
