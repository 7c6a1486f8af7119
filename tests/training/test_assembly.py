"""What a configuration says of teachers, students and training reaches the step."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY
from test_step import STUDENTS, TEACHER, make

from proteus_jax import config
from proteus_jax.methods.losses import LossWeights
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import StudentFunction
from proteus_jax.models.normalization import CLIP, HALF, IMAGENET
from proteus_jax.training import builder
from proteus_jax.training.builder import (
    TeacherInfo,
    assemble,
    check_platform,
    dtype_of,
    run_length,
)
from proteus_jax.training.schema import schema_of
from proteus_jax.training.train_state import Skipped, TrainState

SECOND = ViTSpec(width=24, depth=1, heads=2, patch_size=7, grid=4)


@pytest.fixture
def configuration(tmp_path: Path) -> Any:
    """Two teachers that want different things, and no field at its default."""
    file = tmp_path / "two.py"
    file.write_text(
        "from proteus_jax.configs import base\n\n\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.student = ('vit_tiny_2blocks', 'vit_small_1blocks')\n"
        "    config.teacher, config.batch, config.grad_accum_steps = 'dinov2_vits14', 128, 2\n"
        "    weights = config.method.loss_weights\n"
        "    weights.token, weights.feature, weights.patch = 0.5, 2.0, 0.0\n"
        "    config.drop_path, config.ema_decay, config.method.mask_ratio = 0.3, 0.75, 0.25\n"
        "    config.seed, config.data.crop, config.data.erasing = 5, 56, 0.4\n"
        "    config.steps, config.optimizer.warmup_steps = 100, 10\n"
        "    second = base.add_teacher(config, 'another', 'clip_vitb16')\n"
        "    second.image_size, second.normalization = 84, 'half'\n"
        "    second.loss_weights.token, second.loss_weights.patch = 3.0, 0.25\n"
        "    return config\n"
    )
    found, problems = config.load(str(file), [], schema_of)
    assert not problems
    return found


NOTHING = TrainState(jnp.zeros(()), {}, {}, None, {}, Skipped(jnp.zeros(()), jnp.zeros(())))
KNOWN = {"teacher": TeacherInfo(TINY, CLIP), "another": TeacherInfo(SECOND, IMAGENET)}


def test_a_further_teachers_crop_may_be_unset(tmp_path: Path, configuration: Any) -> None:
    overrides = [config.Override("teachers.another.image_size", "None")]
    found, problems = config.load(str(tmp_path / "two.py"), overrides, schema_of)
    assert not problems
    assert found.image_size == 56


def test_each_teacher_has_its_own(configuration: Any) -> None:
    first, second = configuration.teachers.values()
    assert (first.standardize, second.standardize) == (False, True)
    # What the second does not say is the method's.
    method = configuration.make_method()
    assert method.loss_weights == {
        "teacher": LossWeights(0.5, 2.0, 0.0),
        "another": LossWeights(3.0, 2.0, 0.25),
    }
    # The second alone has a patch loss and wants larger images.
    assert (method.masks, method.group, method.heads) == (True, 2, {"token", "feature"})
    assert configuration.image_size == 84
    made = assemble(configuration, KNOWN, run_length(configuration, 1000), "cpu")
    one, other = made.teachers["teacher"], made.teachers["another"]
    assert (one.backbone.spec.grid, one.side, one.normalization) == (4, None, CLIP)
    assert (other.backbone.spec.grid, other.side, other.normalization) == (12, 84, HALF)
    assert not one.backbone.spec.layer_scale
    assert other.standardize
    # Students see images as the first teacher does.
    assert made.normalization == CLIP
    assert {name: each.drop_path for name, each in made.students.items()} == {
        "vit_tiny_2blocks": 0.3,
        "vit_small_1blocks": 0.3,
    }


def test_what_the_step_is_made_of(configuration: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    begun: dict[str, Any] = {}
    monkeypatch.setattr(builder, "TrainStep", lambda **each: asked.update(each))
    made = assemble(configuration, KNOWN, run_length(configuration, 1000), "cpu")
    monkeypatch.setattr(builder, "init_state", lambda *_, **each: begun.update(each) or NOTHING)
    made.init()
    assert asked["method"].mask_ratio == 0.25
    assert asked["method"].loss_weights["another"] == LossWeights(3.0, 2.0, 0.25)
    names = ("ema_decay", "seed", "erasing", "grad_accum_steps", "normalization")
    assert tuple(asked[name] for name in names) == (0.75, 5, 0.4, 2, CLIP)
    assert list(asked["teachers"]) == ["teacher", "another"]
    assert list(asked["students"]) == ["vit_tiny_2blocks", "vit_small_1blocks"]
    # 5e-4 for each 512 images of the whole batch, whatever parts it is taken in.
    assert float(asked["schedule"](10)) == pytest.approx(
        1e-5 + 0.5 * (5e-4 * 128 / 512 - 1e-5) * (1 + np.cos(np.pi / 10))
    )
    assert begun == {"ema": True, "seed": 5, "standardize": {"another": 24}}


def test_precisions_by_platform() -> None:
    for platform, expected in (("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")):
        assert dtype_of("auto", platform) == jnp.dtype(expected)
        assert dtype_of("float16", platform) == jnp.float16


@pytest.mark.parametrize("field", ["precision", "teacher_precision"])
def test_a_kernel_that_a_precision_does_not_have_is_refused(field: str) -> None:
    """For the student and for the teacher."""
    overrides = [config.Override("attention", "cudnn"), config.Override(field, "float32")]
    found, problems = config.load(str(ROOT / "configs" / "vitb14.py"), overrides, schema_of)
    assert not problems
    (problem,) = check_platform(found, "gpu")
    assert problem == "--config.attention: expected auto or xla on a gpu in float32, found cudnn"


def test_a_warm_up_as_long_as_its_run_is_shortened() -> None:
    overrides = [config.Override("steps", "100"), config.Override("optimizer.warmup_steps", "100")]
    found, _ = config.load(str(ROOT / "configs" / "vitb14.py"), overrides, schema_of)
    assert run_length(found, 1000).warmup == 10


@pytest.mark.parametrize("what", ["erasing", "drop path"])
def test_noise_follows_the_step(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes and dropped branches: others at the next step, none where there should be none."""
    if what == "erasing":
        changed, plain = make(erasing=1.0), make()
    else:
        spec = STUDENTS["small"].spec
        dropped = StudentFunction(spec, {"teacher": TINY.width}, drop_path=0.9)
        plain = make()
        monkeypatch.setitem(STUDENTS, "small", dropped)
        changed = make()
    images = np.random.default_rng(0).integers(0, 256, (4, 56, 56, 3), dtype=np.uint8)
    params = {"teacher": TEACHER.init(jax.random.key(1))}
    seen = []
    for step, init in (changed, plain):
        compiled, state = jax.jit(step), init()
        for number in (0, 1, 1):
            _, metrics = compiled(state._replace(step=jnp.int32(number)), params, images)
            seen.append(float(metrics["small/token_loss"]))
    # The token loss knows no mask.
    assert len(set(seen[:3])) == 2
    assert seen[1] == seen[2]
    assert len(set(seen[3:])) == 1
    assert seen[3] not in seen[:3]
