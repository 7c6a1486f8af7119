"""The twelve data sets in miniature, each in its authors' layout, and the protocol on them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from commands import evaluate as command_line
from commands import finish
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from small import clusters, context_for

from proteus_jax.data import decode
from proteus_jax.data.datasets.fine_grained import DATASETS, find_datasets
from proteus_jax.data.datasets.fine_grained_layouts import VOC_CLASSES, _shown
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.errors import InputError
from proteus_jax.evaluation.feature_extraction import FeatureTable, FrozenBackbone
from proteus_jax.evaluation.protocols import fine_grained
from proteus_jax.evaluation.protocols.fine_grained import Features, average_precision, evaluate
from proteus_jax.feature_extractor import Model
from proteus_jax.models.normalization import CLIP, Normalization
from proteus_jax.weights.model_dir import load_model


def image(path: Path, label: int, number: int) -> None:
    """One whose color tells its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    pixels = rng.normal(np.eye(3)[label % 3] * 200, 50, (20, 24, 3)).clip(0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def aircraft(at: Path) -> None:
    kinds = ("707-320", "A300B4", "Boeing 717")
    for split, first in (("train", 0), ("val", 10), ("test", 20)):
        rows = []
        for number in range(first, first + 6):
            image(at / f"data/images/{number:07}.jpg", number % 3, number)
            rows.append(f"{number:07} {kinds[number % 3]}")
        lines(at / f"data/images_variant_{split}.txt", *rows)


def caltech101(at: Path) -> None:
    for label, kind in enumerate(("BACKGROUND_Google", "ant", "zebra")):
        for number in range(40):
            image(at / f"101_ObjectCategories/{kind}/image_{number:04}.jpg", label, number)


def cars(at: Path) -> None:
    for part, file in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        rows = []
        for number in range(9):
            image(at / f"cars_{part}/{number:05}.jpg", number % 3, number)
            rows.append((f"{number:05}.jpg", number % 3 + 1))
        kind = [("fname", object), ("class", object)]
        (at / file).parent.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(at / file, {"annotations": np.array(rows, dtype=kind)})


def cifar(at: Path, names: tuple[str, ...], labels: int) -> None:
    at.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        content = b""
        for row in range(6):
            planes = np.repeat(np.eye(3)[row % 3] * 200, 1024)
            pixels = (planes + rng.normal(0, 20, 3072)).clip(0, 255).astype(np.uint8)
            content += bytes([9] * (labels - 1) + [row % 3]) + pixels.tobytes()
        (at / name).write_bytes(content)


def cifar10(at: Path) -> None:
    cifar(at, (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"), 1)


def cifar100(at: Path) -> None:
    cifar(at, ("train.bin", "test.bin"), 2)


def dtd(at: Path) -> None:
    for part, first in (("train", 0), ("val", 10), ("test", 20)):
        rows = []
        for number in range(first, first + 6):
            name = f"{('banded', 'dotted', 'woven')[number % 3]}/{number}.jpg"
            image(at / "images" / name, number % 3, number)
            rows.append(name)
        lines(at / f"labels/{part}1.txt", *rows)


def flowers(at: Path) -> None:
    for number in range(1, 19):
        image(at / f"jpg/image_{number:05}.jpg", number % 3, number)
    scipy.io.savemat(at / "imagelabels.mat", {"labels": np.arange(1, 19)[None] % 3 + 1})
    ids = np.arange(1, 19).reshape(3, 1, 6)
    scipy.io.savemat(at / "setid.mat", dict(zip(("trnid", "valid", "tstid"), ids, strict=True)))


def food(at: Path) -> None:
    for part, first in (("train", 0), ("test", 20)):
        rows = []
        for number in range(first, first + 9):
            name = f"{('apple_pie', 'pho', 'waffles')[number % 3]}/{number}"
            image(at / f"images/{name}.jpg", number % 3, number)
            rows.append(name)
        lines(at / f"meta/{part}.txt", *rows)


def pets(at: Path) -> None:
    for part, first in (("trainval", 0), ("test", 20)):
        rows = ["#Image CLASS-ID SPECIES BREED ID"] if part == "test" else []
        for number in range(first, first + 9):
            name = f"{('Abyssinian', 'beagle', 'pug')[number % 3]}_{number}"
            image(at / f"images/{name}.jpg", number % 3, number)
            rows.append(f"{name} {number % 3 + 1} 1 1")
        lines(at / f"annotations/{part}.txt", *rows)


def sun397(at: Path) -> None:
    for part, first in (("Training", 0), ("Testing", 20)):
        rows = []
        for number in range(first, first + 9):
            name = f"/{('a/abbey', 'a/alley/indoor', 'z/zoo')[number % 3]}/sun_{number}.jpg"
            image(at / name[1:], number % 3, number)
            rows.append(name)
        lines(at / f"{part}_01.txt", *rows)


def voc2007(at: Path, *, lists: bool = True) -> None:
    main = at / "ImageSets/Main"
    for part, first in (("train", 0), ("val", 10), ("test", 20)):
        names = [f"{number:06}" for number in range(first, first + 9)]
        lines(main / f"{part}.txt", *names)
        columns: dict[str, list[str]] = {kind: [] for kind in VOC_CLASSES}
        for number, name in enumerate(names, first):
            image(at / f"JPEGImages/{name}.jpg", number % 3, number)
            objects = ""
            for place, kind in enumerate(VOC_CLASSES):
                # In turn shown, not shown, and only difficult to see.
                shown = 1 if place % 3 == number % 3 else -1
                shown = 0 if shown < 0 and (place + number) % 5 == 0 else shown
                columns[kind].append(f"{name} {shown:2}")
                if shown >= 0:
                    objects += (
                        f"<object><name>{kind}</name><difficult>{1 - shown}</difficult></object>"
                    )
            lines(at / f"Annotations/{name}.xml", f"<annotation>{objects}</annotation>")
        for kind, rows in columns.items() if lists else ():
            lines(main / f"{kind}_{part}.txt", *rows)


def cub(at: Path) -> None:
    rows = []
    for number in range(1, 19):
        name = f"00{number % 3 + 1}.Bird/b_{number}.jpg"
        image(at / "images" / name, number % 3, number)
        rows.append((f"{number} {name}", f"{number} {number % 3 + 1}", f"{number} {number % 2}"))
    for file, column in zip(
        ("images.txt", "image_class_labels.txt", "train_test_split.txt"),
        zip(*rows, strict=True),
        strict=True,
    ):
        lines(at / file, *column)


MAKERS = {
    "aircraft": (aircraft, "fgvc-aircraft-2013b"),
    "caltech101": (caltech101, ""),
    "cars": (cars, ""),
    "cifar10": (cifar10, "cifar-10-batches-bin"),
    "cifar100": (cifar100, "cifar-100-binary"),
    "dtd": (dtd, "dtd"),
    "flowers": (flowers, ""),
    "food": (food, "food-101"),
    "pets": (pets, ""),
    "sun397": (sun397, "SUN397"),
    "voc2007": (voc2007, "VOCdevkit/VOC2007"),
    "cub": (cub, "CUB_200_2011"),
}
# How many images of each part.
COUNTS = {
    "aircraft": (6, 6, 6),
    "caltech101": (90, 0, None),
    "cars": (9, 0, 9),
    "cifar10": (30, 0, 6),
    "cifar100": (6, 0, 6),
    "dtd": (6, 6, 6),
    "flowers": (6, 6, 6),
    "food": (9, 0, 9),
    "pets": (9, 0, 9),
    "sun397": (9, 0, 9),
    "voc2007": (9, 9, 9),
    "cub": (9, 0, 9),
}


@pytest.fixture(scope="module")
def all_twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    for name, (make, top) in MAKERS.items():
        make(root / name / top)
    return root


def test_names() -> None:
    assert tuple(DATASETS) == tuple(MAKERS)
    by_class = ("aircraft", "caltech101", "flowers", "pets")
    expected = dict.fromkeys(DATASETS, "accuracy") | dict.fromkeys(by_class, "mean_per_class")
    assert {name: each.metric for name, each in DATASETS.items()} == expected | {"voc2007": "map"}


def test_of_several_objects_of_a_class_a_plain_one_counts(tmp_path: Path) -> None:
    """Wherever the difficult ones stand in the annotation."""
    objects = {"cat": (1, 0, 1), "dog": (0, 1), "cow": (1, 1)}
    text = "".join(
        f"<object><name>{kind}</name><difficult>{each}</difficult></object>"
        for kind, difficult in objects.items()
        for each in difficult
    )
    (tmp_path / "a.xml").write_text(f"<annotation>{text}</annotation>")
    shown = dict(zip(VOC_CLASSES, _shown(tmp_path / "a.xml"), strict=True))
    assert (shown["cat"], shown["dog"], shown["cow"], shown["sheep"]) == (1, 1, 0, -1)


@pytest.mark.parametrize("name", DATASETS)
def test_each_layout(name: str, all_twelve: Path) -> None:
    """The parts have their sizes, and each image the class that its color tells."""
    found, absent = find_datasets(str(all_twelve), [name])
    assert absent == {}
    for part, count in zip(found[name], COUNTS[name], strict=True):
        if part is None:
            assert count == 0
            continue
        assert count is None or len(part.source) == count
        assert len(part.labels) == len(part.source)
        if name == "voc2007":
            assert part.labels.shape == (9, 20)
            continue
        assert set(part.labels.tolist()) == {0, 1, 2}
        colors = {}
        for number, label in enumerate(part.labels.tolist()):
            content = part.source.read(number)
            if isinstance(content, bytes):
                content = np.asarray(Image.open(io.BytesIO(content)))
            colors.setdefault(label, set()).add(int(content.mean(axis=(0, 1)).argmax()))
        assert all(len(seen) == 1 for seen in colors.values()), colors
        assert len(set.union(*colors.values())) == 3


def test_caltechs_draws(all_twelve: Path) -> None:
    """As the original code draws them: a new image at each draw, or one that was drawn before."""
    found, _ = find_datasets(str(all_twelve), ["caltech101"])
    train, _, test = found["caltech101"]
    np.random.seed(0)  # noqa: NPY002
    drawn = np.random.choice(40, 30)  # noqa: NPY002
    names = [train.source.name(number) for number in range(30)]
    assert names == [f"BACKGROUND_Google/image_{at:04}.jpg" for at in drawn]
    first = {test.source.name(n) for n in range(len(test.source)) if test.labels[n] == 0}
    assert first == {f"BACKGROUND_Google/image_{n:04}.jpg" for n in range(40)} - set(names)


def test_vocs_lists_and_annotations_agree(tmp_path: Path, all_twelve: Path) -> None:
    voc2007(tmp_path / "voc2007", lists=False)
    listed, _ = find_datasets(str(all_twelve), ["voc2007"])
    annotated, _ = find_datasets(str(tmp_path), ["voc2007"])
    for one, other in zip(listed["voc2007"], annotated["voc2007"], strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.labels, other.labels)
        assert set(one.labels.ravel().tolist()) == {-1, 0, 1}
    file = next((tmp_path / "voc2007/Annotations").glob("*.xml"))
    file.write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>')
    with pytest.raises(InputError, match="declares entities"):
        find_datasets(str(tmp_path), ["voc2007"])


def prepare_miniature(builder_name: str, data_dir: Path, patch: pytest.MonkeyPatch) -> None:
    """A data set of tensorflow-datasets with three examples a split, under its own features."""
    import tensorflow_datasets as tfds

    def example(name: str, feature: Any, number: int) -> Any:
        if isinstance(feature, tfds.features.Image):
            shape: Any = feature.shape
            gray = np.full([side or 8 for side in shape], number, np.uint8)
            file = io.BytesIO()
            Image.fromarray(gray.squeeze()).save(file, "png")
            return file.getvalue()
        if isinstance(feature, tfds.features.ClassLabel):
            return number % int(feature.num_classes or 1)
        if isinstance(feature, tfds.features.BBoxFeature):
            return tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
        if isinstance(feature, tfds.features.Sequence):
            single = isinstance(feature.feature, tfds.features.ClassLabel)
            if not single:
                return []
            # Of VOC: what is shown, and what of it is not difficult to see.
            return [number, number + 1] if "no_difficult" in name else [number, number + 1, 9]
        return str(number)

    builder = tfds.builder(builder_name, data_dir=str(data_dir), file_format="array_record")
    features: Any = builder.info.features

    def examples(_: Any = None) -> Any:
        for number in range(3):
            yield (
                number,
                {name: example(name, feature, number) for name, feature in features.items()},
            )

    splits = ("train", "validation", "test")
    patch.setattr(type(builder), "_split_generators", lambda *_: {s: examples() for s in splits})
    builder.download_and_prepare()


def test_each_from_tensorflow_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but aircraft, which it does not have, under the features of its own builders."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    prepared = {name: dataset.tfds for name, dataset in DATASETS.items() if dataset.tfds}
    for builder, *_ in prepared.values():
        prepare_miniature(builder, tmp_path, monkeypatch)
    found, absent = find_datasets("tfds:", list(DATASETS))
    assert sorted(found) == sorted(prepared)
    assert list(absent) == ["aircraft"]
    for name, splits in found.items():
        assert (splits.validation is None) == (prepared[name][2] is None)
        for part in filter(None, splits):
            shades = [
                int(decode.open_image(part.source.read(at)).pixels()[0, 0, 0])
                for at in range(len(part.source))
            ]
            assert sorted(shades) == [0, 1, 2]
            labels = part.labels
            if name == "voc2007":
                labels = [int(np.flatnonzero(row == 1)[0]) for row in labels]
                assert ((part.labels == 1).sum(axis=1) == 2).all()
            assert list(labels) == shades


def test_what_is_missing_and_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of aircraft, dtd in it"):
        find_datasets(str(tmp_path), ["aircraft", "dtd"])
    dtd(tmp_path / "dtd")
    found, absent = find_datasets(str(tmp_path), ["aircraft", "dtd"])
    assert list(found) == ["dtd"]
    assert "no data/images_variant_train.txt below" in absent["aircraft"]
    (tmp_path / "dtd/images/banded/0.jpg").unlink()
    pets(tmp_path / "pets")
    (tmp_path / "pets/annotations/test.txt").write_text("Abyssinian_100\n")
    cifar10(tmp_path / "cifar10")
    (tmp_path / "cifar10/data_batch_1.bin").write_bytes(b"\x80\x04pickle")
    cars(tmp_path / "cars")
    (tmp_path / "cars/devkit/cars_train_annos.mat").write_bytes(bytes(300))
    with pytest.raises(InputError) as error:
        find_datasets(str(tmp_path), [*DATASETS])
    said = str(error.value)
    assert "cars: not the layout of its authors: ValueError: cars_train_annos.mat" in said
    assert "dtd: 1 images are missing, as" in said
    assert "pets: not the layout of its authors: IndexError" in said
    assert "cifar10: data_batch_1.bin: expected a multiple of 3073 bytes" in said
    assert len(error.value.problems) == 4


def refit(learned: Features, tested: Features, decay: float) -> LogisticRegression:
    return LogisticRegression(C=1 / decay, tol=1e-10, max_iter=5000).fit(
        learned.rows.astype(np.float64), learned.labels
    )


def test_the_protocol_by_scikit_learn(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sweep, choice and last fit written out, with validation set."""
    decays = np.logspace(-2, 3, 5)
    monkeypatch.setattr(fine_grained, "DECAYS", decays)
    train, validation, test = (Features(*clusters(rng, n)) for n in (80, 60, 200))
    found = evaluate(train, validation, test, "mean_per_class")

    def scaled(learned: Features, tested: Features) -> tuple[Features, Features]:
        mean, deviation = learned.rows.mean(axis=0), learned.rows.std(axis=0)
        return Features((learned.rows - mean) / deviation, learned.labels), Features(
            (tested.rows - mean) / deviation, tested.labels
        )

    percents = []
    for decay in decays:
        one, other = scaled(train, validation)
        predicted = refit(one, other, decay).predict(other.rows)
        percents.append(100 * balanced_accuracy_score(other.labels, predicted))
    best = int(np.argmax(percents))
    assert found.c == pytest.approx(1 / decays[best])
    assert found.validation == pytest.approx(percents[best])
    both = Features(*(np.concatenate(p) for p in zip(train, validation, strict=True)))
    one, other = scaled(both, test)
    predicted = refit(one, other, decays[best]).predict(other.rows)
    assert found.percent == pytest.approx(100 * balanced_accuracy_score(other.labels, predicted))


def test_what_is_difficult_to_see_counts_as_absent(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels of 1, -1 and 0 (VOC's difficult objects), learned from and scored."""
    monkeypatch.setattr(fine_grained, "DECAYS", np.array([1.0]))

    def drawn(count: int) -> Features:
        rows = rng.normal(size=(count, 4)).astype(np.float32)
        labels = np.where(rows[:, :2] > 0.4, 1, np.where(rows[:, :2] > 0.1, 0, -1))
        return Features(rows, labels)

    train, validation, test = drawn(60), drawn(30), drawn(50)
    found = evaluate(train, validation, test, "map")
    both = Features(*(np.concatenate(p) for p in zip(train, validation, strict=True)))
    mean, deviation = both.rows.mean(axis=0), both.rows.std(axis=0)
    expected = []
    for kind in range(2):
        model = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(
            (both.rows - mean) / deviation, both.labels[:, kind] == 1
        )
        scores = model.decision_function((test.rows - mean) / deviation)
        order = np.argsort(-scores)
        right = (test.labels[order, kind] == 1).astype(float)
        precision, recall = np.cumsum(right) / np.arange(1, 51), np.cumsum(right) / right.sum()
        expected.append(
            np.mean([precision[recall >= at - 1e-9].max(initial=0) for at in np.arange(11) / 10])
        )
    assert found.percent == pytest.approx(100 * np.mean(expected), abs=1e-6)


def test_of_values_of_c_that_are_as_good_the_largest_is_taken(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest decay, on classes far apart; the draw of a validation set is the original's."""
    assert fine_grained.DECAYS[[0, -1]] == pytest.approx([1e-6, 1e5])
    assert len(fine_grained.DECAYS) == 45
    monkeypatch.setattr(fine_grained, "DECAYS", np.array([1e-3, 1e-1, 1e1]))
    labels = np.arange(50) % 2
    rows = (rng.normal(size=(50, 3)) * 0.1 + np.array([[-5.0], [5.0]])[labels]).astype(np.float32)
    found = evaluate(Features(rows, labels), None, Features(rows, labels), "accuracy")
    assert found == (100.0, pytest.approx(1e3), 100.0)
    # A class that only those drawn for validation show is not learned before C is chosen.
    order = np.arange(50)
    np.random.RandomState(0).shuffle(order)
    assert len(order[:10]) == int(50 * fine_grained.VALIDATION)
    alone = np.where(np.isin(np.arange(50), order[:10]), 1, 0)
    found = evaluate(Features(rows, alone), None, Features(rows, alone), "accuracy")
    assert found.validation == 0.0


def test_images_are_resized_to_the_crop(
    all_twelve: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to a larger side and cut, and with CLIP's statistics whatever the model has."""
    context, _ = context_for(tmp_path, Model(*load_model(tiny_teacher)), tmp_path)
    assert context.view == CenterCrop(32, 28)
    found, _ = find_datasets(str(all_twelve), ["dtd"])
    seen: list[tuple[CenterCrop, Normalization]] = []

    def table(
        frozen: FrozenBackbone, _: Any, source: Any, view: CenterCrop, *rest: Any, **more: Any
    ):
        seen.append((view, frozen.normalization))
        return FeatureTable(np.random.default_rng(0).normal(size=(len(source), 3)), np.arange(6), 0)

    monkeypatch.setattr(FrozenBackbone, "table", table)
    monkeypatch.setattr(fine_grained, "DECAYS", np.array([1.0]))
    fine_grained.measure(context, fine_grained.Data(found, {}))
    assert seen == [(CenterCrop(28, 28), CLIP)] * 3


def test_eleven_points(rng: np.random.Generator) -> None:
    scores, positive = rng.normal(size=400), rng.random(400) < 0.3
    scores = scores + positive
    # Near the area under the curve, which it samples.
    area = average_precision_score(positive, scores)
    assert average_precision(scores, positive) == pytest.approx(area, abs=0.03)
    assert average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, False, True])) == (
        pytest.approx((6 * 1.0 + 5 * 2 / 3) / 11)
    )
    assert average_precision(np.arange(3.0), np.zeros(3, bool)) == 0.0


def test_from_the_command_line(all_twelve: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """One with a class for each image, one with several, each with a validation part."""
    workdir, chosen = tmp_path / "fine", ("dtd", "voc2007")
    arguments = command_line("finegrained", tiny_teacher, all_twelve, workdir)
    some = f"--config.finegrained.datasets={','.join(chosen)}"
    result = finish([*arguments, some], tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((workdir / "results.json").read_text())
    assert tuple(found["per_dataset"]) == chosen
    assert found["absent"] == {}
    assert found["metrics"]["voc2007"] == "map"
    assert found["constants"]["normalisation"]["mean"][0] == 0.48145466
    assert "no average: 2 of 12 data sets were measured" in result.stdout
    assert found["average"] is None


def test_an_average_is_of_all_twelve(
    all_twelve: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, said = context_for(tmp_path, Model(*load_model(tiny_teacher)), tmp_path)
    found, _ = find_datasets(str(all_twelve), [*DATASETS])
    percents = iter(range(1, 13))
    nothing = Features(np.zeros((1, 1), np.float32), np.zeros(1, int))
    monkeypatch.setattr(fine_grained, "_features", lambda *_: (nothing, 1))
    monkeypatch.setattr(
        fine_grained, "evaluate", lambda *_: fine_grained.Result(float(next(percents)), 1.0, 2.0)
    )
    results = fine_grained.measure(context, fine_grained.Data(found, {}))
    assert results["average"] == pytest.approx(6.5)
    assert list(results["per_dataset"].values()) == list(range(1, 13))
    assert said[-1].split() == ["average", "6.50", "%"]
    # A broken image of each part that there is.
    assert results["data"]["unreadable"] == sum(
        part is not None for splits in found.values() for part in splits
    )
