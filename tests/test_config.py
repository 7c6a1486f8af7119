from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import ROOT

from proteus_jax import config
from proteus_jax.config import Override
from proteus_jax.data.transforms.randaugment import RandAugment
from proteus_jax.errors import InputError
from proteus_jax.models.config import SPECS
from proteus_jax.training.builder import RunLength, TeacherInfo, assemble
from proteus_jax.training.schema import schema_of
from proteus_jax.weights.registry import TEACHERS

QUICKSTART = str(ROOT / "configs" / "quickstart_paper.py")
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def problems(*overrides: tuple[str, str | None]) -> list[str]:
    try:
        return config.load(QUICKSTART, [Override(*override) for override in overrides], schema_of)[
            1
        ]
    except InputError as error:
        return error.problems


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name: str) -> None:
    """Shapes only: the whole step, with a teacher of the size that the config names."""
    loaded, faults = config.load(str(ROOT / "configs" / f"{name}.py"), [], schema_of)
    settings: Any = loaded
    assert faults == []
    known = {
        name: TeacherInfo(TEACHERS[each.source].spec, TEACHERS[each.source].normalization)
        for name, each in settings.teachers.items()
    }
    start = TEACHERS[settings.start].spec if settings.start else None
    assembly = assemble(settings, known, RunLength(10, 1), "tpu", start)
    crop = settings.data.crop
    images = jax.ShapeDtypeStruct((settings.batch, crop, crop, 3), jax.numpy.uint8)
    teachers = {name: each.backbone.shapes for name, each in assembly.teachers.items()}
    state = assembly.state_shapes()
    after, metrics = jax.eval_shape(assembly.train_step, state, teachers, images)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    assert all(value.shape == () for value in metrics.values())


def test_the_papers_constants() -> None:
    settings: Any = config.load(str(ROOT / "configs" / "vits14.py"), [], schema_of)[0]
    optimizer, method = settings.optimizer, settings.make_method()
    assert (settings.batch, settings.epochs, optimizer.warmup_epochs) == (1024, 300, 5)
    assert (optimizer.name, optimizer.weight_decay, settings.drop_path) == ("adamw", 0.05, 0)
    assert (method.mask_ratio, method.loss_weights) == (0.5, {"teacher": (1, 1, 1)})
    assert settings.learning_rate is settings.steps is optimizer.warmup_steps is None
    assert settings.data.repeated_aug == 3
    assert settings.data.randaugment == RandAugment() == (2, 9.0, 0.5, 0.5)
    assert settings.data.erasing == 0.25


def test_overrides_take_the_fields_type() -> None:
    loaded, faults = config.load(
        QUICKSTART,
        [
            Override("batch", "32"),
            Override("epochs", "2"),
            Override("steps", "None"),
            Override("learning_rate", "1e-4"),
            Override("student", "vit_tiny, vit_small"),
            Override("data.root", "~/my photos=1"),
        ],
        schema_of,
    )
    settings: Any = loaded
    assert faults == []
    assert (settings.batch, settings.epochs, settings.steps) == (32, 2.0, None)
    assert settings.learning_rate == 1e-4
    assert settings.student == ("vit_tiny", "vit_small")
    assert settings.data.root == ("~/my photos=1",)
    again: Any = config.load(QUICKSTART, [Override("student", "('vit_base',)")], schema_of)[0]
    assert again.student == ("vit_base",)


def test_all_problems_come_in_one_list() -> None:
    assert problems(
        ("nonsense", "1"),
        ("batch", "-3"),
        ("data.rot", "x"),
        ("learning_rate", "fast"),
        ("seed", None),
        ("student", "vit_tiny,vit_mini"),
        ("method.loss_weights", "3"),
        ("epochs", "nan"),
        ("precision", "float16"),
        ("data.held_out.minimum", "2000"),
    ) == [
        "--config.nonsense: unknown field",
        "--config.batch: expected at least 1, found -3",
        "--config.data.rot: unknown field; did you mean --config.data.root?",
        "--config.learning_rate: expected a number, found 'fast'",
        "--config.seed: expected a whole number after it, found nothing",
        f"--config.student: expected one or more different names out of {', '.join(SPECS)}, "
        "each perhaps with _<n>blocks, found ('vit_tiny', 'vit_mini')",
        "--config.method.loss_weights: expected one of its fields: "
        "method.loss_weights.feature, method.loss_weights.patch, method.loss_weights.token",
        "--config.epochs: expected above 0, found nan",
        "--config.precision: expected one of auto, float32, bfloat16, found 'float16'",
        "--config.data.held_out: expected minimum to be at most maximum",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"data.crop": "100"}, "a multiple of the patch size 14, found 100"),
        ({"batch": "15"}, "a multiple of 2, as the method takes so many images together, found 15"),
        ({"batch": "15", "method.loss_weights.patch": "0"}, None),
        ({"batch": "15", "teachers.teacher.loss_weights.patch": "0"}, None),
        ({"method.mask_ratio": "0.01"}, "0.01 masks none of the 49 patches of a crop"),
        (
            {f"method.loss_weights.{name}": "0" for name in ("token", "feature", "patch")},
            "a factor above 0 for one of token, feature and patch of the teacher 'teacher'",
        ),
        ({"init.source": "a"}, "a counts for nothing with random weights"),
        ({"init.method": "copy"}, "init.source: expected a model to copy, found nothing"),
        ({"optimizer.name": "sgd"}, "one of adamw, muon, found 'sgd'"),
        ({"student": "(1, 2)"}, "one or more different names"),
        ({"student": "vit_tiny_0blocks"}, "one or more different names"),
        ({"student": "vit_tiny,vit_small_patch16"}, "one patch size of all"),
        (
            {"teachers.teacher.normalization": "mine"},
            "one of native, imagenet, clip, half, found 'mine'",
        ),
        ({"student": "("}, "a list, found '('"),
        ({"data.weights": "1,a"}, "a list, found '1,a'"),
        ({"data.weights": "1,0", "data.root": "a,b"}, "numbers above 0, found (1.0, 0.0)"),
        ({"data.weights": "1,2"}, "one for each of the 1 roots, found 2"),
        ({"data.weights": "(1, 2.5)", "data.root": "a,b"}, None),
        ({"data.subset.classes": "0"}, "above 0 and at most 1, found 0.0"),
        ({"data.randaugment.magnitude": "11"}, "from 0 to 10, found 11.0"),
        ({"student": ""}, "one or more different names"),
        ({"batch": "None"}, "a whole number, found 'None'"),
        ({"learning_rate": "inf"}, "above 0, found inf"),
        ({"seed": str(2**32)}, f"found {2**32}"),
        ({"seed": str(2**32 - 1)}, None),
        ({"max_skipped": "0"}, "at least 1, found 0"),
        ({"max_failed_saves": "0"}, None),
    ],
)
def test_what_cannot_be_right(overrides: dict[str, str], expected: str | None) -> None:
    found = problems(*overrides.items())
    assert len(found) == (0 if expected is None else 1)
    assert expected is None or expected in found[0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = (", "SyntaxError"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(): return 3", "should return a ConfigDict, found int"),
        (
            "from proteus_jax.configs import base\n"
            "def get_config():\n c = base.get_config()\n c.bach = 1\n return c",
            "bach",
        ),
        (
            "import ml_collections\n"
            "def get_config(): return ml_collections.ConfigDict({'batch': 2})",
            "--config.student: missing",
        ),
    ],
)
def test_files_that_give_no_configuration(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(InputError, match=complaint):
        config.load(str(file), [], schema_of)
    with pytest.raises(InputError, match="no such file"):
        config.load(str(tmp_path / "absent.py"), [], schema_of)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            "base.add_teacher(config, 'items', 'clip_vitb16')",
            "not taken, found items, teacher",
        ),
        ("base.add_teacher(config, '_x', 'clip_vitb16')", "found _x, teacher"),
        ("base.add_teacher(config, 'teacher', 'clip_vitb16')", "a teacher 'teacher' already"),
        ("base.add_teacher(config, 'a', 'clip_vitb16').image_size = -1", "a.image_size: expected"),
        ("base.add_teacher(config, 'a', '')", "a.source: expected a model, found ''"),
        ("config.unlock(); del config.teachers", "teachers: missing or of another type"),
        ("config.teachers = None", "teachers: expected teachers by name, one of them 'teacher'"),
    ],
)
def test_more_teachers_that_are_none(line: str, complaint: str, tmp_path: Path) -> None:
    lines = ("config = base.get_config()", line, "return config")
    body = "".join(f"    {each}\n" for each in lines)
    (tmp_path / "c.py").write_text(
        f"from proteus_jax.configs import base\n\n\ndef get_config():\n{body}"
    )
    try:
        found = config.load(str(tmp_path / "c.py"), [], schema_of)[1]
    except InputError as error:
        found = error.problems
    assert any(complaint in problem for problem in found), found
